from refault.analysis import Analysis
from trace_events.event import Event


def test_a_fault_that_names_its_killer_is_a_refault(events):
    (refault,) = Analysis(events).refaults()
    assert (refault.gfn, refault.zap.seq, refault.fault.seq, refault.gap) == (0x200, 5, 8, 3_900)


def test_the_chain_runs_from_the_root_to_the_event(events):
    analysis = Analysis(events)
    assert [event.seq for event in analysis.chain(analysis.by_seq[6])] == [3, 4, 6]
    assert analysis.root(analysis.by_seq[6]).seq == 3
    assert [event.seq for event in analysis.chain(analysis.by_seq[0])] == [0]


def test_a_chain_ends_where_a_filter_dropped_the_cause(events):
    analysis = Analysis(event for event in events if event.seq != 3)
    assert [event.seq for event in analysis.chain(analysis.by_seq[6])] == [4, 6]


def test_blame_goes_to_the_operation_then_to_the_daemon(events):
    analysis = Analysis(events)
    assert analysis.reason(analysis.by_seq[5]) == "swap_out"
    zap = Event(0, 0, "refault:spte_zap", "kswapd0", args={"gfn": 1, "level": 1, "why": "x"})
    assert Analysis([zap]).reason(zap) == "kswapd0"


def test_blame_for_a_zap_inside_a_vcpu_goes_to_its_bracket():
    vcpu = "CPU 0/KVM"
    fault = Event(0, 0, "refault:host_fault", vcpu, 0, args={})
    start = Event(1, 0, "refault:mmu_notifier_start", vcpu, 0, cause=0, args={"event": "clear"})
    zap = Event(2, 0, "refault:spte_zap", vcpu, 0, cause=1, args={"gfn": 1, "level": 1})
    reclaim = Event(0, 0, "vmscan:mm_vmscan_direct_reclaim_begin", vcpu, 0, args={})
    assert Analysis([reclaim, start, zap]).reason(zap) == "direct reclaim in CPU 0/KVM"
    assert Analysis([fault, start, zap]).reason(zap) == "copy-on-write in CPU 0/KVM"


def test_zaps_that_nobody_missed_are_unanswered(events):
    assert [event.seq for event in Analysis(events).unanswered()] == [6]


def test_most_refaulted_counts_frames(events):
    assert Analysis(events).most_refaulted() == [(0x200, 1)]
    assert Analysis(events).reasons() == {"swap_out": 1}


def test_counters_are_sorted_by_count_then_name(events):
    counters = Analysis(events).counters()
    assert list(counters.items())[:2] == [("kvm:kvm_entry", 3), ("kvm:kvm_exit", 3)]


def test_a_large_leaf_is_about_every_frame_it_covers():
    zap = Event(0, 0, "refault:spte_zap", "vmm", args={"gfn": 0x200, "level": 2})
    analysis = Analysis([zap])
    assert analysis.about(0x3FF) == [zap]
    assert analysis.about(0x400) == []


def test_descendants_are_everything_below(events):
    assert [event.seq for event in Analysis(events).descendants(3)] == [4, 5, 6]


def test_select_takes_globs(events):
    assert [event.seq for event in Analysis(events).select("refault:spte_*")] == [5, 6]

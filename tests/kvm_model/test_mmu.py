"""The fault path, event by event."""

from __future__ import annotations

import pytest

from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.memory_failure import memory_failure
from host_mm.mmap import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
    do_mmap,
    do_munmap,
)
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from host_mm.mprotect import do_mprotect
from host_mm.process import BUS_MCEERR_AR
from kvm_model.instrument import leaf_spte, map_for_instrument
from kvm_model.mmu.faultin_pfn import kvm_mmu_max_mapping_level
from kvm_model.mmu.mmu_internal import KvmPageFault
from kvm_model.mmu.spte import PG_LEVEL_4K, spte_to_pfn
from kvm_model.mmu.tdp_mmu import kvm_tdp_mmu_map
from tests.kvm_model.machine import BASE, PAGE, Machine


def test_a_first_store_maps_writable_at_once() -> None:
    m = Machine()
    assert m.run(("w", 0x3000, 7), ("r", 0x3000)) == [7]
    assert m.vcpus[0].stat["pf_taken"] == 1 == m.vcpus[0].stat["pf_fixed"]
    spte = m.leaf(3)
    assert spte & 0xFFF == 0xB77
    assert spte >> 57 & 3 == 3


def test_a_first_load_maps_the_zero_page_read_only() -> None:
    m = Machine()
    assert m.run(("r", 0x3000)) == [0]
    spte = m.leaf(3)
    assert spte_to_pfn(spte) == m.host.zero_pfn
    assert spte & 0xFFF == 0x975
    assert not spte >> 57 & 3


def test_a_load_of_a_page_the_host_wrote_maps_writable() -> None:
    m = Machine()
    m.run(("w", 0x3000, 7))
    m.do(lambda: do_madvise(m.mm, BASE, 64 * PAGE, MADV_PAGEOUT))
    assert m.run(("r", 0x3000), ("w", 0x3000, 8), ("r", 0x3000)) == [7, 8]
    assert m.vcpus[0].stat["pf_taken"] == 2


def test_the_store_over_a_zero_page_is_cut_by_its_own_notifier_and_faults_again() -> None:
    m = Machine()
    m.run(("r", 0x5000))
    since = len(m.events)
    m.run(("w", 0x5000, 9))
    kvm = [n for n in m.names(since=since) if n in (
        "kvm_page_fault", "kvm_unmap_hva_range", "spte_zap", "fault_retry", "spte_install")]
    assert kvm == [
        "kvm_page_fault", "kvm_unmap_hva_range", "spte_zap", "fault_retry", "kvm_page_fault", "spte_install",
    ]
    faults = [e for e in m.events[since:] if e.name == "kvm_page_fault"]
    zap = m.last("spte_zap")
    assert faults[0].args["error_code"] == 0x1AA
    assert faults[0].killed_by is None
    assert faults[1].args["error_code"] == 0x182
    assert faults[1].killed_by == zap.seq
    assert m.last("spte_install").killed_by == zap.seq
    assert m.last("fault_retry").args["reason"] == "stale-after-gup"
    assert m.run(("r", 0x5000)) == [9]


def test_events_inside_a_fault_name_it_as_their_cause() -> None:
    m = Machine()
    m.run(("r", 0x5000), ("w", 0x5000, 9))
    by_seq = {e.seq: e for e in m.events}
    zap = m.last("spte_zap")
    chain = []
    cause = zap.cause
    while cause is not None:
        chain.append(by_seq[cause].name)
        cause = by_seq[cause].cause
    assert chain == ["mmu_notifier_start", "host_fault", "kvm_page_fault"]
    assert m.last("kvm_mmu_set_spte").cause == m.last("kvm_page_fault").seq


def test_a_bracket_open_over_the_gfn_makes_the_fault_retry_until_it_closes() -> None:
    m = Machine()
    range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE + 3 * PAGE, BASE + 4 * PAGE)
    m.do(lambda: mmu_notifier_invalidate_range_start(range_))
    assert m.run(("w", 0x4000, 1), ("r", 0x4000)) == [1]
    task = m.spawn(("w", 0x3000, 7))
    m.sched.run_until(lambda: m.names().count("fault_retry") >= 3)
    assert {e.args["reason"] for e in m.events if e.name == "fault_retry"} == {"stale-before-gup"}
    assert leaf_spte(m.kvm, 3) == (0, 0)
    m.do(lambda: mmu_notifier_invalidate_range_end(range_))
    m.finish(task)
    assert m.run(("r", 0x3000)) == [7]


def test_a_bracket_between_gup_and_mmu_lock_is_seen_under_the_lock() -> None:
    m = Machine()
    m.run(("w", 0x4000, 1))
    vcpu = m.vcpus[0]
    raced: list[int] = []

    def race(kind: str) -> None:
        # The fault has its frame and is about to take mmu_lock for read.
        if kind == "lock" and not raced and "gup_answer" in m.names(since=mark):
            raced.append(1)
            range_ = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, m.mm, BASE + 3 * PAGE, BASE + 4 * PAGE)
            mmu_notifier_invalidate_range_start(range_)
            mmu_notifier_invalidate_range_end(range_)

    mark = len(m.events)
    m.sched.set_on_point(race)
    assert m.run(("w", 0x3000, 7), ("r", 0x3000)) == [7]
    assert m.last("fault_retry").args["reason"] == "stale-under-lock"
    assert vcpu.stat["pf_taken"] == 3


def test_every_frame_reference_is_given_back() -> None:
    m = Machine()
    m.run(("w", 0x3000, 7), ("r", 0x5000))
    pfn = spte_to_pfn(m.leaf(3))
    m.do(m.host.lru.lru_add_drain_all) if hasattr(m.host.lru, "lru_add_drain_all") else None
    held = m.host.pages.refcount[pfn]
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, BASE))
    assert m.host.pages.refcount[pfn] == held


def test_a_page_mapped_writable_is_dirty_even_if_only_read() -> None:
    m = Machine()
    m.run(("w", 0x3000, 7))
    m.do(lambda: do_madvise(m.mm, BASE, 64 * PAGE, MADV_PAGEOUT))
    m.run(("r", 0x3000))
    assert m.host.pages.flags[spte_to_pfn(m.leaf(3))] & 1 << 4


def test_no_memory_behind_the_slot_is_a_memory_fault() -> None:
    m = Machine()
    m.do(lambda: do_munmap(m.mm, BASE + 3 * PAGE, PAGE))
    exit_ = m.run_raw(("r", 0x3000))
    assert (exit_.kind, exit_.gpa) == ("memory-fault", 0x3000)


def test_a_store_to_memory_the_vmm_may_only_read_is_a_memory_fault() -> None:
    m = Machine()
    m.run(("w", 0x3000, 1))
    m.do(lambda: do_mprotect(m.mm, BASE, 64 * PAGE, PROT_READ))
    assert m.run(("r", 0x3000)) == [1]
    assert not m.leaf(3) >> 57 & 3
    assert m.run_raw(("w", 0x3000, 2)).kind == "memory-fault"


def test_failed_memory_is_a_signal_to_the_vmm_and_the_access_waits_for_what_it_does() -> None:
    m = Machine()
    m.run(("w", 0x3000, 7), ("w", 0x4000, 8))
    pfn = spte_to_pfn(m.leaf(3))
    assert m.do(lambda: memory_failure(m.host, pfn)) == 0
    assert not m.leaf(3) & 7, "unmapped by its notifier"
    exit_ = m.run_raw(("r", 0x3000), ("r", 0x4000))
    assert exit_.kind == "intr"
    (signal,) = m.process.signals
    assert (signal.code, signal.address) == (BUS_MCEERR_AR, BASE + 3 * PAGE)
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    m.do(lambda: do_mmap(m.mm, BASE + 3 * PAGE, PAGE, PROT_READ | PROT_WRITE, flags))
    assert m.run() == [0, 8]


def test_dropped_pages_come_back_zero() -> None:
    m = Machine()
    m.run(("w", 0x3000, 7))
    m.do(lambda: do_madvise(m.mm, BASE, 64 * PAGE, MADV_DONTNEED))
    assert m.run(("r", 0x3000)) == [0]


def test_two_vcpus_share_one_root() -> None:
    m = Machine(vcpus=2)
    m.run(("w", 0x3000, 7))
    assert m.run(("r", 0x3000), vcpu=1) == [7]
    assert m.vcpus[0].root_hpa == m.vcpus[1].root_hpa
    assert m.kvm.tdp_mmu_roots[0].root_count == 3
    assert m.vcpus[1].stat["pf_taken"] == 0


def test_the_kvm_gives_every_frame_back_when_it_is_destroyed() -> None:
    m = Machine(slot=False)
    free = m.host.allocator.nr_free_pages()
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE))
    m.run(("r", 0x3000), ("r", 0x23000))
    m.do(m.kvm.destroy)
    # What stays are the VMM's own page tables for the zero page.
    assert free - m.host.allocator.nr_free_pages() <= 3
    assert not m.kvm.sps
    assert not m.kvm.tdp_mmu_roots


# -- MMIO ---------------------------------------------------------------------------------------

MMIO = 0x1000_0000


def test_the_first_mmio_access_installs_an_mmio_spte_and_the_second_misconfigures() -> None:
    m = Machine()
    exit_ = m.run_raw(("r", MMIO))
    assert (exit_.kind, exit_.gpa, exit_.size, exit_.write) == ("mmio", MMIO, 8, False)
    m.vcpus[0].complete_mmio(0x55)
    assert m.run() == [0x55]
    assert m.names().count("mark_mmio_spte") == 1
    assert m.leaf(MMIO >> 12) & 7 == 6
    m.vcpus[0].mmio_gfn = 0
    assert m.run_raw(("w", MMIO, 3)).data == 3
    assert m.last("kvm_exit").args["exit_reason"] == 49
    assert m.last("handle_mmio_page_fault").args == {"addr": 0, "gfn": MMIO >> 12, "access": 0}
    assert [e.args["type"] for e in m.events if e.name == "kvm_mmio"] == [0, 1, 2]


def test_an_mmio_spte_of_an_old_generation_is_made_again() -> None:
    m = Machine()
    m.run_raw(("w", MMIO, 1))
    old = m.leaf(MMIO >> 12)
    m.do(lambda: m.kvm.set_user_memory_region(1, 0x100000, PAGE, BASE))
    m.run_raw(("w", MMIO, 2))
    check = m.last("check_mmio_spte").args
    assert check["kvm_gen"] != check["spte_gen"]
    assert m.names().count("mark_mmio_spte") == 2
    assert m.leaf(MMIO >> 12) != old


def test_without_mmio_caching_nothing_is_installed() -> None:
    m = Machine(params={"kvm.mmio_caching": "N"})
    m.run_raw(("w", MMIO, 1))
    m.run_raw(("w", MMIO, 1))
    assert "mark_mmio_spte" not in m.names()
    assert m.last("kvm_exit").args["exit_reason"] == 48


# -- levels -------------------------------------------------------------------------------------


def huge_machine(monkeypatch: pytest.MonkeyPatch, host_level: int = 2, pages: int = 1024) -> Machine:
    """A VM whose host claims to map everything at `host_level`."""
    m = Machine(pages=pages, ram=32 << 20)
    monkeypatch.setattr("kvm_model.mmu.faultin_pfn.lookup_address_in_mm", lambda mm, hva: (0x81, host_level))
    return m


def map_huge(m: Machine, gfn: int, pfn: int, *, exec_: bool = False) -> int:
    """Map a fault whose frame is decided, as the fault path does under mmu_lock."""
    from kvm_model.mmu import faultin_pfn, mmu_roots

    vcpu = m.vcpus[0]

    def body() -> int:
        mmu_roots.kvm_mmu_reload(vcpu)
        mmu_roots.mmu_topup_memory_caches(vcpu)
        fault = KvmPageFault(gfn << 12, 0x14 if exec_ else 2, nx_workaround=m.kvm.spte.nx_huge_pages)
        fault.slot = m.kvm.slots().gfn_to_memslot(gfn)
        fault.pfn = pfn
        fault.map_writable = True
        m.kvm.mmu_lock.read_lock()
        faultin_pfn.kvm_mmu_hugepage_adjust(m.kvm, fault)
        r = kvm_tdp_mmu_map(vcpu, fault)
        m.kvm.mmu_lock.read_unlock()
        return r

    return int(m.do(body))


def test_the_level_is_the_least_of_slot_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    m = huge_machine(monkeypatch, host_level=3)
    slot = m.kvm.slots().gfn_to_memslot(0)
    assert slot is not None
    # The slot is 4 MiB: 1G would stick out, 2M fits.
    assert kvm_mmu_max_mapping_level(m.kvm, slot, 5) == 2
    assert kvm_mmu_max_mapping_level(m.kvm, slot, 5, PG_LEVEL_4K) == 1
    monkeypatch.setattr("kvm_model.mmu.faultin_pfn.lookup_address_in_mm", lambda mm, hva: (0x25, 1))
    assert kvm_mmu_max_mapping_level(m.kvm, slot, 5) == 1


def test_a_huge_host_page_makes_a_huge_spte_and_logging_splits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    m = huge_machine(monkeypatch)
    m.kvm.truths = None
    m.sched.set_on_point(None)
    assert map_huge(m, 0x205, 0x405) == 5
    requested = m.last("kvm_mmu_spte_requested").args
    assert (requested["pfn"], requested["level"]) == (0x405, 2)
    assert leaf_spte(m.kvm, 0x205)[1] == 2
    assert m.leaf(0x205) & 0x80
    assert spte_to_pfn(m.leaf(0x205)) == 0x400
    assert m.kvm.stat["pages_2m"] == 1
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 1024 * PAGE, BASE, 1))
    assert m.last("kvm_mmu_split_huge_page").args["errno"] == 0
    _address, level = leaf_spte(m.kvm, 0x205)
    assert level == 1
    assert spte_to_pfn(m.leaf(0x205)) == 0x405
    assert not m.leaf(0x205) & 2
    assert m.kvm.stat == m.kvm.stat | {"pages_2m": 0, "pages_4k": 512}


def test_ending_the_log_recovers_the_huge_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    m = huge_machine(monkeypatch)
    m.kvm.truths = None
    m.sched.set_on_point(None)
    map_huge(m, 0x205, 0x405)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 1024 * PAGE, BASE, 1))
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 1024 * PAGE, BASE, 0))
    assert leaf_spte(m.kvm, 0x205)[1] == 2
    assert spte_to_pfn(m.leaf(0x205)) == 0x400
    assert m.kvm.stat == m.kvm.stat | {"pages_2m": 1, "pages_4k": 0}


def test_a_fetch_under_the_nx_mitigation_maps_4k(monkeypatch: pytest.MonkeyPatch) -> None:
    m = Machine(pages=1024, ram=32 << 20, params={"kvm.nx_huge_pages": "Y"})
    monkeypatch.setattr("kvm_model.mmu.faultin_pfn.lookup_address_in_mm", lambda mm, hva: (0x81, 2))
    m.kvm.truths = None
    m.sched.set_on_point(None)
    map_huge(m, 0x205, 0x405)
    assert leaf_spte(m.kvm, 0x205)[1] == 2
    assert not m.leaf(0x205) & 4
    map_huge(m, 0x206, 0x406, exec_=True)
    assert leaf_spte(m.kvm, 0x206)[1] == 1
    assert m.leaf(0x206) & 4
    map_huge(m, 0x207, 0x407)
    assert leaf_spte(m.kvm, 0x207)[1] == 1


def test_a_tool_gets_its_4k_leaf() -> None:
    m = Machine()
    m.do(lambda: map_for_instrument(m.kvm, 9))
    address, level = leaf_spte(m.kvm, 9)
    assert level == 1
    assert m.host.ram.u64[address >> 3] & 7 == 7
    assert leaf_spte(m.kvm, 10) == (0, 0)

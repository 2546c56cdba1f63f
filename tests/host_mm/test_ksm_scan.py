"""ksmd's rounds: what they look at, what they pass over, and what they tell."""

from __future__ import annotations

from host_mm import ksm, ksm_merge, ksm_scan, ksm_tree
from host_mm.fork import exit_process, fork_process
from host_mm.ksm import run_store, scan_until_quiet
from host_mm.ksm_types import KSM_RUN_MERGE, KSM_RUN_STOP
from host_mm.migrate import move_pages
from tests.host_mm.ksm_machine import BASE, fill, frame, holds, leave_nothing, mergeable, on
from tests.host_mm.machine import make_host
from trace_events.stream import Listener


def test_a_page_that_changes_between_two_scans_is_left_alone() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "ab"))

    def body() -> None:
        run_store(host, KSM_RUN_MERGE)
        for byte in range(8):
            fill(process, 0, byte)
            fill(process, 1, byte)
            done = host.ksm.full_scans
            while host.ksm.full_scans == done:
                host.sched.sleep(1_000_000)
        run_store(host, KSM_RUN_STOP)

    on(host, body)
    assert host.ksm.ksm_pages_shared == host.ksm.ksm_pages_unshared == 0
    assert host.ksm.stat()["pages_volatile"] == 2


def test_smart_scan_passes_over_pages_that_found_no_partner() -> None:
    host = make_host()
    on(host, lambda: mergeable(host, "abc"))

    def body() -> None:
        run_store(host, KSM_RUN_MERGE)
        while host.ksm.full_scans < 12:
            host.sched.sleep(1_000_000)
        run_store(host, KSM_RUN_STOP)

    on(host, body)
    # Ages 0 to 3 are looked at; then 1 scan is passed over, one looked at (age 5), 2 passed over, ...
    assert host.ksm.ksm_pages_skipped == 3 * 6
    assert host.ksm.ksm_pages_scanned == 3 * 6


def test_a_forked_ksm_page_is_found_in_the_child_that_ksmd_never_saw() -> None:
    host = make_host()
    parent = on(host, lambda: mergeable(host, "aab"))
    on(host, lambda: scan_until_quiet(host))
    child = on(host, lambda: fork_process(parent))
    kpfn = frame(parent)
    assert {frame(child, 0), frame(child, 1)} == {kpfn}
    assert host.pages.mapcount[kpfn] == 4
    assert on(host, lambda: move_pages(parent, [BASE], [1], move_all=True)) == [1]
    assert {frame(who, page) for who in (parent, child) for page in (0, 1)} == {frame(parent)} != {kpfn}
    on(host, lambda: scan_until_quiet(host))
    assert host.ksm.ksm_pages_sharing >= 3
    on(host, lambda: fill(child, 0, 9))
    assert on(host, lambda: holds(parent, 0, ord("a")))
    on(host, lambda: exit_process(parent))
    assert on(host, lambda: holds(child, 1, ord("a")))
    leave_nothing(host, child)


def test_a_process_that_ends_stays_on_the_list_until_ksmd_comes_by() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aab"))
    on(host, lambda: scan_until_quiet(host))
    on(host, lambda: exit_process(process))
    assert process.mm in host.mms
    assert process.mm.pgd
    leave_nothing(host)
    assert host.ksm.ksm_pages_shared == host.ksm.ksm_pages_sharing == 0


def test_a_mapping_that_is_never_scanned_leaves_at_once() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aab"))
    on(host, lambda: exit_process(process))
    assert not host.mms
    assert not host.ksm.mm_slots


def test_the_events_read_as_the_kernels() -> None:
    host = make_host()
    lines: list[str] = []
    formats = {tp.name: tp for module in (ksm, ksm_scan, ksm_merge, ksm_tree) for tp in module.TRACEPOINTS}
    host.stream.listen(Listener(
        ["ksm:*"],
        lambda event: lines.append(f"{event.name}: {formats[event.name].format(tuple(event.args.values()))}"),
    ))
    process = on(host, lambda: mergeable(host, "aa"))
    on(host, lambda: scan_until_quiet(host))
    kpfn = frame(process)
    assert lines == [
        "ksm_enter: mm 0000000000000001",
        "ksm_start_scan: seq 0 rmap size 0", "ksm_stop_scan: seq 0 rmap size 2",
        "ksm_start_scan: seq 1 rmap size 2",
        f"ksm_merge_with_ksm_page: pfn {kpfn} rmap_item 0000000010001000 mm 0000000000000001 error 0",
        f"ksm_merge_with_ksm_page: ksm pfn {kpfn} rmap_item 0000000010000000 mm 0000000000000001 error 0",
        "ksm_stop_scan: seq 1 rmap size 2",
        "ksm_start_scan: seq 2 rmap size 2", "ksm_stop_scan: seq 2 rmap size 2",
    ]

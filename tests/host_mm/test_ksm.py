"""KSM: the order of its brackets, what it merges and what it must not, and who finds a KSM page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from host_mm import ksm_merge
from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import pte_dirty, pte_write
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE, get_user_pages_unlocked
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.host import HostMm
from host_mm.ksm import run_store, scan_until_quiet
from host_mm.ksm_types import KSM_RUN_UNMERGE, folio_stable_node
from host_mm.madvise import MADV_FREE, MADV_UNMERGEABLE, do_madvise
from host_mm.migrate import move_pages
from host_mm.mm_types import VM_MERGEABLE, MmStruct
from host_mm.mmap import do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_dirty, PG_ksm, get_page, put_page
from host_mm.process import Process
from host_mm.profile import LINUX_5_10
from host_mm.rmap_unmap import try_to_unmap
from host_mm.swap_state import folio_alloc_swap
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.ksm_machine import BASE, entry, fill, frame, holds, leave_nothing, mergeable, on
from tests.host_mm.machine import PAGE, make_host
from trace_events.stream import Listener


class Steps(mn.MmuNotifier):
    """Brackets with their page, stores to entries and primary flushes, in the order they happen."""

    def __init__(self, host: HostMm, mm: MmStruct) -> None:
        self.log: list[str] = []
        self.classes: set[tuple[int, int]] = set()
        host.pte_hooks.append(
            lambda where, _, old, new: self.log.append("set" if new else "clear") if where is mm else None
        )
        host.stream.listen(Listener(
            ["refault:primary_flush"], lambda event: self.log.append("flush"), ancestors=False
        ))

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        assert range_.end - range_.start == PAGE
        self.classes.add((range_.event, range_.order))
        self.log.append(f"start {(range_.start - BASE) // PAGE}")
        return 0

    def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
        self.log.append("end")


def steps(process: Process, body: Callable[[], Any]) -> list[str]:
    seen = Steps(process.host, process.mm)
    mmu_notifier_register(seen, process.mm)
    on(process.host, body)
    assert seen.classes <= {(mn.MMU_NOTIFY_CLEAR, mn.ORDER_UNDER_PTL)}
    return seen.log


ONE = ["clear", "flush", "set", "end"]


def test_the_ksm_page_gets_one_bracket_and_each_merged_page_two() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aaba"))
    log = steps(process, lambda: scan_until_quiet(host))
    assert log == [part for page in (1, 0, 0, 3, 3) for part in (f"start {page}", *ONE)]
    assert len({frame(process, page) for page in (0, 1, 3)}) == 1
    assert not any(pte_write(entry(process, page)) or pte_dirty(entry(process, page)) for page in (0, 1, 3))
    assert host.ksm.stat() | {"pages_shared": 1, "pages_sharing": 2, "pages_unshared": 1} == host.ksm.stat()


def test_a_page_of_zeros_becomes_the_zero_page_by_two_brackets() -> None:
    host = make_host()
    host.ksm.use_zero_pages = True
    process = on(host, lambda: mergeable(host, b"\0a"))
    assert steps(process, lambda: scan_until_quiet(host)) == ["start 0", *ONE, "start 0", *ONE]
    assert frame(process) == host.zero_pfn
    assert process.mm.ksm_zero_pages == host.ksm.ksm_zero_pages == 1
    on(host, lambda: fill(process, 0, 7))
    assert process.mm.ksm_zero_pages == host.ksm.ksm_zero_pages == 0
    assert on(host, lambda: holds(process, 0, 7))


def test_a_page_that_somebody_holds_gets_its_entry_back_and_is_not_merged() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aa"))
    held = on(host, lambda: get_user_pages_unlocked(process.mm, BASE + PAGE, FOLL_WRITE))
    before = entry(process, 1)
    log = steps(process, lambda: scan_until_quiet(host))
    assert log[:5] == ["start 1", *ONE]
    assert set(log) == {"start 1", *ONE}
    assert entry(process, 1) == before
    assert host.ksm.ksm_pages_shared == 0
    on(host, lambda: put_page(host, held))
    on(host, lambda: scan_until_quiet(host))
    assert frame(process, 0) == frame(process, 1)


def test_without_that_comparison_the_holder_writes_into_everybodys_page() -> None:
    host = make_host(breaks=frozenset({"ksm-ignore-refs"}))
    process = on(host, lambda: mergeable(host, "aa"))
    held = on(host, lambda: get_user_pages_unlocked(process.mm, BASE + PAGE, FOLL_WRITE))
    on(host, lambda: scan_until_quiet(host))
    host.ram.b[held << 12] = 0
    on(host, lambda: put_page(host, held))
    assert not on(host, lambda: holds(process, 0, ord("a")))


def test_a_pinned_page_is_not_merged() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aa"))
    pinned = on(host, lambda: pin_user_page(process.mm, BASE, FOLL_WRITE | FOLL_LONGTERM))
    on(host, lambda: scan_until_quiet(host))
    assert frame(process, 0) == pinned != frame(process, 1)
    assert pte_write(entry(process, 0))
    on(host, lambda: unpin_user_page(host, pinned))


def test_a_write_between_the_two_brackets_keeps_its_page() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aa"))
    starts: list[int] = []

    class Writer(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            starts.append((range_.start - BASE) // PAGE)
            if starts == [1, 0, 0]:
                fill(process, 0, 7)
            return 0

    mmu_notifier_register(Writer(), process.mm)
    on(host, lambda: scan_until_quiet(host))
    assert starts[:3] == [1, 0, 0]
    assert on(host, lambda: holds(process, 0, 7) and holds(process, 1, ord("a")))
    assert host.ksm.ksm_pages_shared == 0
    audit(host)


def test_the_dirty_bit_that_write_protection_takes_goes_to_the_page() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "a"))
    pfn = frame(process)

    def body() -> int:
        host.lru.lru_add_drain_all()
        host.pages.flags[pfn] &= ~PG_dirty
        folio_lock(host, pfn)
        get_page(host, pfn)
        left = ksm_merge.write_protect_page(process.mm.vma_lookup(BASE), pfn)
        folio_unlock(host, pfn)
        put_page(host, pfn)
        return left

    assert on(host, body) == entry(process)
    assert host.pages.flags[pfn] & PG_dirty
    assert not pte_dirty(entry(process))


def test_the_last_sharers_write_copies_too_and_the_node_goes_with_its_page() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aa"))
    on(host, lambda: scan_until_quiet(host))
    kpfn = frame(process)
    assert steps(process, lambda: fill(process, 0, 1)) == ["start 0", *ONE]
    assert host.pages.mapcount[kpfn] == 1
    on(host, lambda: fill(process, 1, 2))
    assert frame(process, 1) != kpfn
    assert host.vmstat["cow_ksm"] == 2
    on(host, lambda: scan_until_quiet(host))
    assert host.ksm.ksm_pages_shared == host.ksm.ksm_pages_sharing == 0


def test_unmergeable_leaves_exclusive_pages_that_are_read_only_until_written() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aab"))
    on(host, lambda: scan_until_quiet(host))
    log = steps(process, lambda: do_madvise(process.mm, BASE, 3 * PAGE, MADV_UNMERGEABLE))
    assert log == ["start 0", *ONE, "start 1", *ONE]
    assert frame(process, 0) != frame(process, 1)
    assert not any(host.pages.flags[frame(process, page)] & PG_ksm for page in range(3))
    assert not pte_write(entry(process, 0))
    assert not process.mm.vma_lookup(BASE).flags & VM_MERGEABLE
    # Reuse: no bracket, no copy.
    assert steps(process, lambda: fill(process, 0, 5)) == ["set"]


def test_two_processes_share_a_frame_and_each_write_parts_one() -> None:
    host = make_host()
    first = on(host, lambda: mergeable(host, "xa", "first"))
    second = on(host, lambda: mergeable(host, "ayx", "second"))
    on(host, lambda: scan_until_quiet(host))
    assert frame(first, 1) == frame(second, 0)
    assert frame(first, 0) == frame(second, 2)
    assert (host.ksm.ksm_pages_shared, host.ksm.ksm_pages_sharing) == (2, 2)
    assert (first.mm.ksm_merging_pages, second.mm.ksm_merging_pages) == (2, 2)
    on(host, lambda: fill(first, 1, 3))
    assert on(host, lambda: holds(second, 0, ord("a")))
    assert on(host, lambda: holds(first, 1, 3))
    leave_nothing(host, first, second)


def test_a_full_ksm_page_is_followed_by_another_in_a_chain() -> None:
    host = make_host()
    host.ksm.max_page_sharing = 4
    process = on(host, lambda: mergeable(host, "a" * 10 + "b"))
    on(host, lambda: scan_until_quiet(host))
    stat = host.ksm.stat()
    assert (stat["pages_shared"], stat["pages_sharing"]) == (3, 7)
    assert (stat["stable_node_chains"], stat["stable_node_dups"]) == (1, 3)
    assert len({frame(process, page) for page in range(10)}) == 3
    on(host, lambda: do_munmap(process.mm, BASE, 9 * PAGE))
    host.ksm.stable_node_chains_prune_millisecs = 0
    on(host, lambda: [fill(process, 10, byte) or scan_until_quiet(host) for byte in (1, ord("a"))])
    stat = host.ksm.stat()
    assert (stat["pages_shared"], stat["pages_sharing"]) == (1, 1)
    assert (stat["stable_node_chains"], stat["stable_node_dups"]) == (0, 0)
    leave_nothing(host, process)


def test_after_migration_the_node_leads_to_the_new_frame() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aab"))
    on(host, lambda: scan_until_quiet(host))
    old = frame(process)
    node = folio_stable_node(host, old)
    assert node is not None
    assert on(host, lambda: move_pages(process, [BASE], [1])) == [-13]
    assert on(host, lambda: move_pages(process, [BASE], [1], move_all=True)) == [1]
    new = frame(process)
    assert (node.kpfn, folio_stable_node(host, new)) == (new, node)
    assert new == frame(process, 1) != old
    on(host, lambda: [fill(process, 2, ord("a")), scan_until_quiet(host)])
    assert frame(process, 2) == new
    leave_nothing(host, process)


def _reclaim_all(host: HostMm) -> None:
    host.lru.lru_add_drain_all()
    for _ in range(6):
        for nid in range(len(host.nodes)):
            host.reclaim(0, nid)
        host.swap_device.drain()


@pytest.mark.parametrize("write", [False, True])
def test_a_swapped_ksm_page_comes_back_once_and_as_copies_for_the_others(write: bool) -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aaab"))
    on(host, lambda: scan_until_quiet(host))
    on(host, lambda: _reclaim_all(host))
    assert [frame(process, page) for page in range(3)] == [-1, -1, -1]
    assert host.swap is not None
    assert sorted(host.swap.swap_count(slot) for slot in range(1, 20))[-2:] == [1, 3]
    for page in range(3):
        if write:
            on(host, lambda page=page: copy_to_user(process, BASE + page * PAGE, bytes([page])))
            assert pte_write(entry(process, page))
        found = on(host, lambda page=page: copy_from_user(process, BASE + page * PAGE, PAGE))
        assert found == (bytes([page]) if write else b"a") + b"a" * (PAGE - 1)
    assert len({frame(process, page) for page in range(3)}) == 3
    assert host.vmstat["ksm_swpin_copy"] == 2
    audit(host)
    on(host, lambda: scan_until_quiet(host))
    assert len({frame(process, page) for page in range(3)}) == (3 if write else 1)
    leave_nothing(host, process)


def test_a_ksm_page_still_in_the_swap_cache_is_mapped_again_as_one() -> None:
    host = make_host()
    process = on(host, lambda: mergeable(host, "aab"))
    on(host, lambda: scan_until_quiet(host))
    kpfn = frame(process)

    def out_and_in() -> None:
        folio_lock(host, kpfn)
        assert folio_alloc_swap(host, kpfn) == 0
        assert try_to_unmap(host, kpfn)
        folio_unlock(host, kpfn)
        assert frame(process, 0) == frame(process, 1) == -1
        assert holds(process, 0, ord("a"))
        assert holds(process, 1, ord("a"))

    on(host, out_and_in)
    assert frame(process, 0) == frame(process, 1) == kpfn
    assert host.pages.flags[kpfn] & PG_ksm
    assert host.vmstat["ksm_swpin_copy"] == 0
    leave_nothing(host, process)


def test_run_2_parts_everything_and_forgets_it() -> None:
    host = make_host()
    host.ksm.use_zero_pages = True
    first = on(host, lambda: mergeable(host, b"aab\0\0"))
    second = on(host, lambda: mergeable(host, "ab"))
    on(host, lambda: scan_until_quiet(host))
    assert on(host, lambda: run_store(host, KSM_RUN_UNMERGE)) == 0
    stat = host.ksm.stat()
    gone = ("pages_shared", "pages_sharing", "pages_unshared", "ksm_zero_pages")
    assert not any(stat[name] for name in gone)
    assert host.ksm.ksm_rmap_items == 0
    assert not host.ksm.stable_tree
    frames = [frame(first, page) for page in range(5)] + [frame(second, page) for page in range(2)]
    assert len(set(frames)) == 7
    on(host, lambda: scan_until_quiet(host))
    assert host.ksm.stat()["pages_shared"] == 2
    leave_nothing(host, first, second)


def test_linux_5_10_tells_the_new_entry_before_it_sets_it() -> None:
    host = make_host(profile=LINUX_5_10)
    told: list[int] = []

    class Told(mn.MmuNotifier):
        def change_pte(self, mm: MmStruct, address: int, pte: int) -> None:
            told.append((address - BASE) // PAGE)

    process = on(host, lambda: mergeable(host, "aa"))
    mmu_notifier_register(Told(), process.mm)
    on(host, lambda: scan_until_quiet(host))
    assert told == [1, 0, 0]
    on(host, lambda: fill(process, 0, 4))
    assert on(host, lambda: holds(process, 1, ord("a")))


def test_a_page_merged_into_a_lazily_freed_ksm_page_goes_with_it() -> None:
    """As mm/ksm.c and mm/madvise.c of 6.18 read, which nobody ran: MADV_FREE by its last owner leaves a KSM
    page clean and not swap-backed, the stable tree still offers it, replace_page maps it by a clean entry,
    and reclaim discards it."""
    host = make_host()
    process = on(host, lambda: mergeable(host, "aab"))
    on(host, lambda: [scan_until_quiet(host), fill(process, 1, 9)])
    on(host, lambda: [do_madvise(process.mm, BASE, PAGE, MADV_FREE), host.lru.lru_add_drain_all()])
    on(host, lambda: [fill(process, 2, ord("a")), scan_until_quiet(host)])
    assert frame(process, 2) == frame(process, 0)
    on(host, lambda: _reclaim_all(host))
    assert on(host, lambda: holds(process, 2, 0))

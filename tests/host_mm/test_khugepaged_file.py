"""Huge pages of shared memory: mapped by faults of all who share it, joined by collapse, parted by swap."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.huge_memory_split import split_huge_pages
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.khugepaged import khugepaged_do_scan
from host_mm.madvise import (
    MADV_COLLAPSE,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_REMOVE,
    do_madvise,
)
from host_mm.migrate import move_pages
from host_mm.mm_types import MM_SHMEMPAGES
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.page import folio_mapcount
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, RW, Recorder

HUGE = 512 * PAGE


def machine(policy: str = "always", pages: int = 1024, **params: str) -> Shared:
    s = Shared(pages=pages, ram=32 << 20, swap=8 << 20, params={"thp.shmem_enabled": policy} | params)
    # Both mappings begin where 2 MiB begin.
    assert not s.at % HUGE
    assert not s.bt % HUGE
    return s


def level(process: Process, address: int) -> int:
    entry, found = lookup_address_in_mm(process.mm, address)
    return found if entry & 1 else 0


def small(policy: str = "never", **params: str) -> Shared:
    """512 small pages, page n begins with n + 1."""
    s = machine(policy, **params)
    s.do(lambda: [copy_to_user(s.a, s.at + n * PAGE, (n + 1).to_bytes(8, "little")) for n in range(512)])
    s.quiet()
    assert level(s.a, s.at) == 1
    return s


def words(process: Process, at: int) -> list[int]:
    return [int.from_bytes(copy_from_user(process, at + n * PAGE, 8), "little") for n in range(512)]


def test_a_fault_makes_a_huge_page_that_all_who_share_the_file_map_whole() -> None:
    s = machine()
    s.do(lambda: copy_to_user(s.a, s.at + 3 * PAGE, b"abc"))
    assert level(s.a, s.at) == 2
    assert copy_from_user(s.b, s.bt + 3 * PAGE, 3) == b"abc"
    assert level(s.b, s.bt) == 2
    folio = s.file.i_pages[0]
    assert folio_mapcount(s.host.pages, folio) == 2
    assert s.host.pages.refcount[folio] == 514
    assert s.a.mm.rss[MM_SHMEMPAGES] == 512
    s.end()


@pytest.mark.parametrize(("policy", "advice", "pages", "expected"), [
    ("always", None, 1024, 2), ("never", MADV_HUGEPAGE, 1024, 1), ("advise", None, 1024, 1),
    ("advise", MADV_HUGEPAGE, 1024, 2), ("within_size", None, 1024, 2), ("always", MADV_NOHUGEPAGE, 1024, 1),
    ("always", None, 511, 1),
])
def test_the_policy_says_where(policy: str, advice: int | None, pages: int, expected: int) -> None:
    s = machine(policy, pages)
    if advice is not None:
        s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, advice))
    s.do(lambda: copy_to_user(s.a, s.at, b"x"))
    assert level(s.a, s.at) == expected
    s.end()


def test_part_of_it_taken_away_in_one_process_leaves_the_others_mapping_whole() -> None:
    s = machine()
    s.do(lambda: copy_to_user(s.a, s.at, b"x"), lambda: copy_to_user(s.b, s.bt, b"y"))
    s.do(lambda: do_mprotect(s.a.mm, s.at + 4 * PAGE, PAGE, 1))
    assert (level(s.a, s.at), level(s.b, s.bt)) == (0, 2), "the entry of a file's just goes"
    s.do(lambda: do_madvise(s.b.mm, s.bt, HUGE, MADV_DONTNEED))
    assert copy_from_user(s.b, s.bt, 1) == b"y"
    assert level(s.b, s.bt) == 2
    s.end()


def test_collapse_brackets_each_folio_then_each_table_and_maps_at_once() -> None:
    s = small()
    notes = Recorder(s.at)
    mmu_notifier_register(notes, s.a.mm)
    s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, MADV_COLLAPSE))
    ranges = [(first, last) for _, first, last in notes.take()]
    assert ranges == [*((n * PAGE, (n + 1) * PAGE) for n in range(512)), (0, HUGE)]
    assert level(s.a, s.at) == 2
    assert words(s.a, s.at) == words(s.b, s.bt) == list(range(1, 513))
    assert level(s.b, s.bt) == 2
    s.end()


def test_holes_become_zeros_and_what_is_swapped_out_is_read() -> None:
    s = small()
    s.do(lambda: do_madvise(s.a.mm, s.at + 8 * PAGE, 4 * PAGE, MADV_REMOVE))
    s.do(lambda: do_madvise(s.a.mm, s.at + 16 * PAGE, 4 * PAGE, MADV_PAGEOUT))
    s.quiet()
    s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, MADV_COLLAPSE))
    found = words(s.a, s.at)
    assert found == [0 if 8 <= n < 12 else n + 1 for n in range(512)]
    assert level(s.a, s.at) == 2
    s.end()


def test_a_page_that_somebody_holds_ends_it_and_all_go_back() -> None:
    s = small()
    pfn = pin_user_page(s.a.mm, s.at + 300 * PAGE, FOLL_WRITE)
    with pytest.raises(KernelError, match="EAGAIN"):
        s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, MADV_COLLAPSE))
    s.host.lru.lru_add_drain_all()
    audit(s.host)
    unpin_user_page(s.host, pfn)
    assert words(s.a, s.at) == list(range(1, 513))
    s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, MADV_COLLAPSE))
    assert level(s.a, s.at) == 2
    s.end()


def test_a_file_without_a_page_there_is_not_collapsed() -> None:
    s = machine("never")
    with pytest.raises(KernelError, match="EINVAL"):
        s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, MADV_COLLAPSE))
    s.end()


def test_khugepaged_joins_pages_of_a_file_and_leaves_mapping_to_faults() -> None:
    s = machine("always")
    s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, MADV_NOHUGEPAGE))
    s.do(lambda: [copy_to_user(s.a, s.at + n * PAGE, (n + 1).to_bytes(8, "little")) for n in range(512)])
    s.quiet()
    s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, MADV_HUGEPAGE))
    s.do(lambda: khugepaged_do_scan(s.host))
    assert level(s.a, s.at) == 0
    assert words(s.a, s.at) == list(range(1, 513))
    assert level(s.a, s.at) == 2
    s.end()


def test_reclaim_unmaps_it_splits_it_and_swaps_the_pieces_out() -> None:
    s = machine()
    s.do(lambda: [copy_to_user(s.a, s.at + n * PAGE, (n + 1).to_bytes(8, "little")) for n in range(512)])
    for _ in range(3):
        s.do(lambda: do_madvise(s.a.mm, s.at, HUGE, MADV_PAGEOUT))
        s.quiet()
    assert s.host.vmstat["thp_split_page"] == 1
    assert any(value < 0 for value in s.file.i_pages.values())
    assert words(s.b, s.bt) == list(range(1, 513))
    s.end()


@pytest.mark.parametrize("seed", range(8))
def test_two_processes_under_random_collapse_split_holes_and_swap(seed: int) -> None:
    s = machine("always")
    host = s.host
    host.sched.set_strategy(RandomStrategy(seed, period=2 + seed % 6))
    left = [3]

    def writer(process: Process, at: int, word: int) -> None:
        rng = random.Random(f"{seed} {word}")
        expected = dict.fromkeys(range(0, 512, 8), 0)
        for _ in range(60):
            page = rng.choice(list(expected))
            address = at + page * PAGE + word * 8
            expected[page] = rng.getrandbits(50)
            copy_to_user(process, address, expected[page].to_bytes(8, "little"))
            other = rng.choice(list(expected))
            got = copy_from_user(process, at + other * PAGE + word * 8, 8)
            assert int.from_bytes(got, "little") == expected[other]
        left[0] -= 1

    def disturber() -> None:
        rng = random.Random(seed)
        while left[0] > 1:
            with suppress(KernelError):
                match rng.randrange(7):
                    case 0 | 1:
                        do_madvise(s.a.mm, s.at, HUGE, MADV_COLLAPSE)
                    case 2:
                        split_huge_pages(s.b.mm, s.bt, s.bt + PAGE)
                    case 3:
                        do_madvise(s.b.mm, s.bt + (rng.randrange(64) * 8 + 1) * PAGE, PAGE, MADV_REMOVE)
                    case 4:
                        do_madvise(s.a.mm, s.at, HUGE, MADV_PAGEOUT)
                    case 5:
                        exit_process(fork_process(s.a))
                    case 6:
                        move_pages(s.a, [s.at + rng.randrange(512) * PAGE], [0])
            host.sched.point("disturber")
        left[0] -= 1

    mmu_notifier_register(Recorder(), s.a.mm)
    tasks = [
        host.sched.spawn("a", lambda: writer(s.a, s.at, 1)),
        host.sched.spawn("b", lambda: writer(s.b, s.bt, 2)),
        host.sched.spawn("disturber", disturber),
    ]
    host.sched.run_until(lambda: all(task.done for task in tasks))
    assert all(task.error is None for task in tasks), [task.error for task in tasks]
    host.sched.set_strategy(None)
    s.end()


def test_rights_of_a_whole_huge_page_change_by_one_entry() -> None:
    s = machine()
    s.do(lambda: copy_to_user(s.a, s.at, b"x"))
    s.do(lambda: do_mprotect(s.a.mm, s.at, HUGE, 1))
    assert level(s.a, s.at) == 2
    s.do(lambda: do_mprotect(s.a.mm, s.at, HUGE, RW))
    s.do(lambda: copy_to_user(s.a, s.at, b"y"))
    assert copy_from_user(s.b, s.bt, 1) == b"y"
    s.end()

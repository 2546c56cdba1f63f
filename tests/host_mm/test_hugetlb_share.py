"""Level-2 tables that address spaces share: when, until when, and how much a change of one unmaps."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.address_space import AddressSpace
from host_mm.arch.x86.pgtable import PFN_MASK, pmd_pfn
from host_mm.fork import exit_process, fork_process
from host_mm.hugetlb_share import adjust_range_if_pmd_sharing_possible, hugetlb_unshare_all_pmds
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.mmap import MAP_NORESERVE, MAP_PRIVATE, PROT_READ, do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.pgtable_generic import pmd_offset
from host_mm.process import Process
from host_mm.profile import LINUX_5_10
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.hugetlb_machine import BASE, GIB, HUGE, PUNCH_HOLE, Machine, Witness, fallocate, truncate
from tests.host_mm.machine import run

PAGES = GIB // HUGE
OTHER = BASE + 4 * GIB


def table(m: Machine, process: Process, address: int) -> int:
    """The level-2 table of the address, 0 if it has none."""
    return pmd_offset(process.mm, address) & PFN_MASK


def two(gib: int = 1, **kw: Any) -> tuple[Machine, Process, Process, AddressSpace]:
    """Two processes that map so many GiB of one file, at different multiples of 1 GiB."""
    m = Machine(**kw)
    p, q = m.process(), m.process()
    file = m.file(gib * PAGES)
    m.shared(p, file, gib * PAGES)
    m.shared(q, file, gib * PAGES, OTHER)
    return m, p, q, file


def test_two_whole_gib_of_one_file_use_one_table_and_count_its_pages_once() -> None:
    m, p, q, _ = two()
    m.write(p, BASE + 3 * HUGE, b"x")
    assert table(m, q, OTHER) == 0
    assert m.read(q, OTHER + 3 * HUGE) == b"x"
    shared = table(m, p, BASE)
    assert table(m, q, OTHER) == shared != 0
    assert m.host.pages.private[shared >> 12] == 1
    assert m.host.pages.large_mapcount[pmd_pfn(m.entry(p, BASE + 3 * HUGE))] == 1
    m.write(q, OTHER + 4 * HUGE, b"y")
    before = m.host.vmstat["pgfault"]
    assert m.read(p, BASE + 4 * HUGE) == b"y"
    assert m.host.vmstat["pgfault"] == before, "what one brought in the other finds mapped"
    m.close()


@pytest.mark.parametrize("how", ["smaller", "askew", "read-only", "private", "other-place-in-the-file"])
def test_a_mapping_that_does_not_fit_has_a_table_of_its_own(how: str) -> None:
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(2 * PAGES)
    m.shared(p, file, PAGES)
    kw: dict[str, Any] = {}
    pages, at = PAGES, OTHER
    if how == "smaller":
        pages = PAGES - 1
    elif how == "askew":
        at = OTHER + HUGE
    elif how == "read-only":
        kw["prot"] = PROT_READ
    elif how == "private":
        kw = {"kind": MAP_PRIVATE, "flags": MAP_NORESERVE}
    else:
        kw["first"] = PAGES
    m.shared(q, file, pages, at, **kw)
    m.write(p, BASE + HUGE, b"x")
    m.read(q, at + HUGE)
    assert table(m, q, at) not in (0, table(m, p, BASE))
    m.close()


def test_a_mapping_that_starts_askew_shares_the_whole_gib_inside_it() -> None:
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(2 * PAGES)
    m.shared(p, file, 2 * PAGES, BASE)
    m.shared(q, file, PAGES + 4, OTHER + GIB - 4 * HUGE, first=PAGES - 4)
    m.write(p, BASE + GIB + HUGE, b"x")
    assert m.read(q, OTHER + GIB + HUGE) == b"x"
    assert table(m, q, OTHER + GIB) == table(m, p, BASE + GIB)
    m.read(q, OTHER + GIB - HUGE)
    assert table(m, q, OTHER + GIB - HUGE) != table(m, p, BASE + GIB - HUGE)
    m.close()


def test_fork_copies_nothing_and_the_child_shares_the_table_on_its_first_fault() -> None:
    m, p, _, _ = two()
    m.write(p, BASE, b"x")
    witness = Witness(m.host, p.mm)
    child = m.do(lambda: fork_process(p))
    assert witness.take()[1] == []
    assert m.read(child, BASE) == b"x"
    assert table(m, child, BASE) == table(m, p, BASE)
    assert m.host.pages.private[table(m, p, BASE) >> 12] == 1
    m.do(lambda: exit_process(child))
    assert m.host.pages.private[table(m, p, BASE) >> 12] == 0
    m.close()


def test_dropping_one_page_unhooks_the_whole_table_in_a_bracket_of_a_whole_gib() -> None:
    m, p, q, _ = two()
    for page in range(3):
        m.write(p, BASE + page * HUGE, b"x")
    m.read(q, OTHER)
    witness = Witness(m.host, p.mm)
    m.do(lambda: do_madvise(p.mm, BASE + HUGE, HUGE, MADV_DONTNEED))
    log, ranges = witness.take()
    assert log == ["start", "clear", "clear", "clear", "flush", "end"]
    assert [r[:3] for r in ranges] == [("clear", BASE, BASE + GIB)]
    assert table(m, p, BASE) == 0
    assert m.read(p, BASE + HUGE) == b"x", "the page is the file's and the other's"
    m.close()


def test_the_last_user_of_a_table_drops_just_the_page_but_the_bracket_is_as_wide() -> None:
    m, p, q, _ = two()
    m.write(p, BASE + HUGE, b"x")
    m.read(q, OTHER)
    m.do(lambda: exit_process(q))
    witness = Witness(m.host, p.mm)
    m.do(lambda: do_madvise(p.mm, BASE + HUGE, HUGE, MADV_DONTNEED))
    log, ranges = witness.take()
    assert log == ["start", "clear", "end", "flush"]
    assert [r[:3] for r in ranges] == [("clear", BASE, BASE + GIB)]
    m.close()


def test_linux_5_10_widens_the_inner_bracket_only() -> None:
    m, p, q, _ = two(profile=LINUX_5_10)
    m.write(p, BASE + HUGE, b"x")
    m.read(q, OTHER)
    witness = Witness(m.host, p.mm)
    m.do(lambda: do_madvise(p.mm, BASE + HUGE, HUGE, MADV_DONTNEED))
    assert [r[:3] for r in witness.take()[1]] == [
        ("clear", BASE + HUGE, BASE + 2 * HUGE), ("unmap", BASE, BASE + GIB),
    ]
    m.close()


def test_mprotect_unshares_before_it_protects() -> None:
    m, p, q, _ = two()
    m.write(p, BASE, b"x")
    m.read(q, OTHER)
    witness = Witness(m.host, q.mm)
    m.do(lambda: do_mprotect(q.mm, OTHER, GIB, PROT_READ))
    log, ranges = witness.take()
    assert log == ["start", "clear", "flush", "end"]
    assert [r[:3] for r in ranges] == [("protection-vma", OTHER, OTHER + GIB)]
    m.write(p, BASE, b"y")
    assert m.read(q, OTHER) == b"y"
    with pytest.raises(KernelError):
        copy_to_user(q, OTHER, b"z")
    m.close()


def test_a_vma_that_is_cut_unshares_the_gib_around_the_cut_first() -> None:
    m, p, q, _ = two(2)
    m.write(p, BASE + HUGE, b"x")
    m.write(p, BASE + GIB, b"y")
    m.read(q, OTHER + HUGE)
    m.read(q, OTHER + GIB)
    witness = Witness(m.host, q.mm)
    m.do(lambda: do_munmap(q.mm, OTHER, HUGE))
    log, ranges = witness.take()
    assert log[:4] == ["start", "clear", "flush", "end"]
    assert [r[:3] for r in ranges] == [("clear", OTHER, OTHER + GIB), ("unmap", OTHER, OTHER + HUGE)]
    assert table(m, q, OTHER + GIB) == table(m, p, BASE + GIB), "the other GiB is not touched"
    assert m.read(q, OTHER + HUGE) == b"x"
    assert table(m, q, OTHER + HUGE) != table(m, p, BASE)
    m.close()


def test_a_hole_takes_the_page_from_all_who_share_its_table() -> None:
    m, p, q, file = two()
    m.write(p, BASE + HUGE, b"x")
    m.read(q, OTHER + HUGE)
    mine, theirs = Witness(m.host, p.mm), Witness(m.host, q.mm)
    m.do(lambda: fallocate(file, PUNCH_HOLE, HUGE, HUGE))
    assert [r[:3] for r in mine.take()[1]] == [("clear", BASE, BASE + GIB)]
    assert [r[:3] for r in theirs.take()[1]] == [("clear", OTHER, OTHER + GIB)]
    assert m.pool == (8, 0, 0)
    assert m.read(p, BASE + HUGE) == m.read(q, OTHER + HUGE) == b"\0"
    m.close()


def test_unsharing_everything_is_a_bracket_over_the_whole_gib_of_the_mapping() -> None:
    m, p, q, _ = two(2)
    m.write(p, BASE, b"x")
    m.read(q, OTHER)
    witness = Witness(m.host, q.mm)
    m.do(lambda: hugetlb_unshare_all_pmds(m.vma(q, OTHER)))
    log, ranges = witness.take()
    assert log == ["start", "clear", "flush", "end"]
    assert [r[:3] for r in ranges] == [("clear", OTHER, OTHER + 2 * GIB)]
    assert table(m, q, OTHER) == 0
    m.close()


def test_the_range_is_widened_outward_to_the_gib_that_lie_in_the_vma() -> None:
    m = Machine()
    p = m.process()
    file = m.file(3 * PAGES)
    start = BASE + GIB // 2
    m.shared(p, file, 2 * PAGES, start)
    vma = m.vma(p, start)
    whole = BASE + GIB
    widen = adjust_range_if_pmd_sharing_possible
    assert widen(vma, start, start + HUGE) == (start, start + HUGE)
    assert widen(vma, start, whole + HUGE) == (start, whole + GIB)
    assert widen(vma, whole + HUGE, whole + 2 * HUGE) == (whole, whole + GIB)
    assert widen(vma, whole + HUGE, vma.end) == (whole, vma.end)
    assert widen(vma, whole + GIB, vma.end) == (whole + GIB, vma.end)
    m.close()


def _stale(switch: frozenset[str]) -> None:
    """One process unhooks its table, the other frees a page that it mapped; then the first reads."""
    m, p, q, file = two(breaks=switch)
    m.write(p, BASE + 5 * HUGE, b"x")
    m.read(q, OTHER + 5 * HUGE)
    copy_from_user(p, BASE + 5 * HUGE, 1)
    m.host.sched.run_task("drop", lambda: do_madvise(p.mm, BASE, HUGE, MADV_DONTNEED))
    m.host.sched.run_task("hole", lambda: fallocate(file, PUNCH_HOLE, 5 * HUGE, HUGE))


def test_flushing_what_was_asked_for_only_leaves_translations_to_a_page_that_is_freed() -> None:
    _stale(frozenset())
    with pytest.raises(BrokenTruth, match="freed-frame-translated"):
        _stale(frozenset({"hugetlb-narrow-unshare"}))


@pytest.mark.parametrize("seed", range(16))
def test_unsharing_beside_faults_leaves_every_byte_and_count_right(seed: int) -> None:
    m, p, q, file = two(seed=seed)
    m.write(p, BASE, b"a")

    def touch(who: Process, at: int, value: bytes) -> None:
        for page in range(3):
            copy_to_user(who, at + page * HUGE + value[0], value)
            assert copy_from_user(who, at, 1) in (b"a", b"\0")

    def unshare() -> None:
        for _ in range(3):
            q.mm.mmap_lock.lock()
            vma = q.mm.vma_lookup(OTHER)
            assert vma is not None
            hugetlb_unshare_all_pmds(vma)
            q.mm.mmap_lock.unlock()

    run(
        m.host, lambda: touch(p, BASE, b"p"), lambda: touch(q, OTHER, b"q"), unshare,
        lambda: do_madvise(p.mm, BASE + HUGE, HUGE, MADV_DONTNEED),
        lambda: fallocate(file, PUNCH_HOLE, 2 * HUGE, HUGE),
    )
    for page in range(2):
        assert m.read(p, BASE + page * HUGE + ord("p"), 2) == b"pq"
    assert m.read(q, OTHER + 2 * HUGE, 4096) == m.read(p, BASE + 2 * HUGE, 4096)
    m.close()


@pytest.mark.parametrize("seed", range(8))
def test_a_process_that_ends_beside_faults_of_another_leaves_it_the_table(seed: int) -> None:
    m, p, q, file = two(seed=seed)
    m.write(p, BASE, b"a")
    m.read(q, OTHER)

    def touch() -> None:
        for page in range(4):
            copy_to_user(p, BASE + page * HUGE, b"b")

    run(m.host, touch, lambda: exit_process(q), lambda: truncate(file, GIB))
    assert m.read(p, BASE + 3 * HUGE) == b"b"
    m.close()

"""Faults on huge pages: first touch, copies, the last page, and who is killed for it."""

from __future__ import annotations

from errno import EFAULT, ENOMEM

import pytest

from host_mm.arch.x86.pgtable import pmd_pfn, pte_dirty, pte_write
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE, get_user_page_fast_only, get_user_pages_unlocked
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.errors import KernelError
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.mm_types import VM_LOCKED
from host_mm.mmap import MAP_LOCKED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, do_mmap, do_munmap
from host_mm.page import put_page
from host_mm.profile import LINUX_5_10
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.hugetlb_machine import BASE, HUGE, PRIVATE, Machine, Witness
from tests.host_mm.machine import RW, run


def test_a_read_maps_a_page_of_zeros_read_only_and_a_write_makes_that_entry_writable_untold() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 2)
    witness = Witness(m.host, p.mm)
    assert m.read(p, BASE + 0x3000, 8) == bytes(8)
    assert m.pool == (7, 1, 0)
    entry = m.entry(p, BASE)
    assert not pte_write(entry)
    m.write(p, BASE + 0x3000, b"x")
    assert pmd_pfn(m.entry(p, BASE)) == pmd_pfn(entry)
    assert pte_write(m.entry(p, BASE))
    assert witness.take() == (["set", "set"], [])
    m.close()


def test_a_first_write_is_one_fault() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 1)
    before = m.host.vmstat["pgfault"]
    m.write(p, BASE + HUGE - 1, b"x")
    assert m.host.vmstat["pgfault"] == before + 1
    entry = m.entry(p, BASE)
    assert pte_write(entry)
    assert pte_dirty(entry)
    assert m.read(p, BASE + HUGE - 2, 2) == b"\0x"
    m.close()


def test_cow_copies_before_its_bracket_and_clears_and_flushes_inside_it() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 2)
    m.write(p, BASE, b"old")
    child = m.do(lambda: fork_process(p))
    witness = Witness(m.host, p.mm)
    m.write(p, BASE + 1, b"N")
    log, ranges = witness.take()
    assert log == ["start", "clear", "flush", "set", "end"]
    assert [r[:3] for r in ranges] == [("clear", BASE, BASE + HUGE)]
    assert m.read(p, BASE, 3) == b"oNd"
    assert m.read(child, BASE, 3) == b"old"
    m.do(lambda: exit_process(child))
    assert m.pool == (7, 1, 0)
    m.close()


def test_the_last_who_maps_a_page_gets_it_for_himself_untold() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    pfn = pmd_pfn(m.entry(p, BASE))
    child = m.do(lambda: fork_process(p))
    assert not pte_write(m.entry(p, BASE))
    m.do(lambda: exit_process(child))
    witness = Witness(m.host, p.mm)
    m.write(p, BASE, b"y")
    assert witness.take() == (["set"], [])
    assert pmd_pfn(m.entry(p, BASE)) == pfn
    m.close()


def test_an_owner_who_has_no_page_to_copy_to_takes_it_from_his_child() -> None:
    m = Machine(1)
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    child = m.do(lambda: fork_process(p))
    assert m.read(child, BASE) == b"x"
    pfn = pmd_pfn(m.entry(p, BASE))
    witness = Witness(m.host, child.mm)
    m.write(p, BASE, b"y")
    log, ranges = witness.take()
    assert log == ["start", "clear", "end", "flush"]
    assert [r[:3] for r in ranges] == [("clear", BASE, BASE + HUGE)]
    assert pmd_pfn(m.entry(p, BASE)) == pfn
    with pytest.raises(KernelError) as caught:
        copy_from_user(child, BASE, 1)
    assert caught.value.errno == EFAULT
    m.close()


def test_a_child_without_a_page_to_copy_to_is_refused_and_the_parent_keeps_his() -> None:
    m = Machine(1)
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    child = m.do(lambda: fork_process(p))
    with pytest.raises(KernelError):
        copy_to_user(child, BASE, b"y")
    assert m.read(child, BASE) == m.read(p, BASE) == b"x"
    assert m.pool == (0, 0, 0)
    m.close()


def test_without_a_reservation_a_fault_fails_when_the_pool_is_empty_and_succeeds_when_it_is_not() -> None:
    m = Machine(2)
    p = m.process()
    m.private(p, 3, flags=MAP_NORESERVE)
    m.write(p, BASE, b"a")
    m.write(p, BASE + HUGE, b"b")
    with pytest.raises(KernelError):
        copy_to_user(p, BASE + 2 * HUGE, b"c")
    assert get_user_pages_unlocked(p.mm, BASE + 2 * HUGE, 0) == -EFAULT
    m.do(lambda: do_munmap(p.mm, BASE, HUGE))
    m.write(p, BASE + 2 * HUGE, b"c")
    m.close()


def test_mmap_refuses_what_cannot_be_reserved() -> None:
    m = Machine(2)
    p = m.process()
    with pytest.raises(KernelError) as caught:
        m.private(p, 3)
    assert caught.value.errno == ENOMEM
    assert not p.mm.vmas
    assert m.pool == (2, 0, 0)
    m.private(p, 2)
    with pytest.raises(KernelError):
        m.private(p, 1, BASE + 4 * HUGE)
    m.close()


def test_a_fault_beyond_the_end_of_the_file_is_refused() -> None:
    m = Machine()
    p = m.process()
    file = m.file(1)
    m.shared(p, file, 2, prot=PROT_READ)
    assert m.read(p, BASE) == b"\0"
    with pytest.raises(KernelError):
        copy_from_user(p, BASE + HUGE, 1)
    m.close()


def test_shared_pages_are_the_files_and_are_written_without_a_bracket() -> None:
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(2)
    m.shared(p, file, 2)
    m.shared(q, file, 2, BASE + 6 * HUGE)
    witness = Witness(m.host, p.mm)
    m.write(p, BASE + HUGE, b"mine")
    assert m.read(q, BASE + 7 * HUGE, 4) == b"mine"
    m.write(q, BASE + 7 * HUGE, b"your")
    assert m.read(p, BASE + HUGE, 4) == b"your"
    assert witness.take() == (["set"], [])
    assert m.host.pages.large_mapcount[pmd_pfn(m.entry(p, BASE + HUGE))] == 2
    m.close()


def test_a_private_mapping_of_a_file_copies_its_pages_in_the_same_fault() -> None:
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(1)
    m.shared(p, file, 1)
    m.write(p, BASE, b"file")
    m.shared(q, file, 1, kind=MAP_PRIVATE, flags=0)
    witness = Witness(m.host, q.mm)
    m.write(q, BASE, b"c")
    log, _ = witness.take()
    assert log == ["set", "start", "clear", "flush", "set", "end"]
    assert (m.read(q, BASE, 4), m.read(p, BASE, 4)) == (b"cile", b"file")
    m.write(p, BASE + 1, b"I")
    assert m.read(q, BASE, 4) == b"cile"
    m.close()


def test_gup_finds_every_small_page_of_a_huge_one_and_holds_the_head() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 1)
    pages = m.host.pages
    pfn = m.host.sched.run_task("gup", lambda: get_user_pages_unlocked(p.mm, BASE + 0x5123, FOLL_WRITE))
    head = pmd_pfn(m.entry(p, BASE))
    assert pfn == head + 5
    assert pages.refcount[head] == 2
    fast = get_user_page_fast_only(p.mm, BASE + 0x7000, FOLL_WRITE)
    assert fast == head + 7
    for held in (pfn, fast):
        put_page(m.host, held)
    m.close()


def test_a_pinned_page_stays_the_parents_through_fork_and_cow() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    pfn = m.host.sched.run_task("pin", lambda: pin_user_page(p.mm, BASE + 0x2000, FOLL_WRITE | FOLL_LONGTERM))
    child = m.do(lambda: fork_process(p))
    assert pte_write(m.entry(p, BASE))
    assert pmd_pfn(m.entry(p, BASE)) == pfn - 2
    m.write(p, BASE, b"y")
    assert m.read(child, BASE) == b"x"
    unpin_user_page(m.host, pfn, dirty=True)
    m.close()


def test_a_read_only_pin_of_a_shared_private_page_first_makes_it_its_own() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    child = m.do(lambda: fork_process(p))
    old = pmd_pfn(m.entry(p, BASE))
    pfn = m.host.sched.run_task("pin", lambda: pin_user_page(p.mm, BASE, FOLL_LONGTERM))
    assert pfn != old
    assert m.read(p, BASE) == m.read(child, BASE) == b"x"
    unpin_user_page(m.host, pfn)
    m.close()


def test_a_pinned_page_that_is_unmapped_keeps_its_promise_until_it_is_freed() -> None:
    m = Machine(2)
    p = m.process()
    m.private(p, 2)
    m.write(p, BASE, b"x")
    pfn = m.host.sched.run_task("pin", lambda: pin_user_page(p.mm, BASE, FOLL_WRITE))
    m.do(lambda: do_madvise(p.mm, BASE, HUGE, MADV_DONTNEED))
    assert m.pool == (1, 1, 0)
    unpin_user_page(m.host, pfn)
    assert m.pool == (2, 2, 0)
    m.close()


def test_linux_5_10_tells_the_sharers_of_the_tables_inside_the_cow_bracket_and_at_its_end() -> None:
    m = Machine(profile=LINUX_5_10)
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    m.do(lambda: fork_process(p))
    witness = Witness(m.host, p.mm)
    seen: list[tuple[str, int, int]] = []
    witness.invalidate_range = lambda mm, start, end: seen.append((witness.log[-1], start, end))  # type: ignore
    m.write(p, BASE, b"y")
    assert seen[0] == ("flush", BASE, BASE + HUGE)
    assert len(seen) == 2
    m.close()


@pytest.mark.parametrize("seed", range(12))
def test_two_who_want_the_last_page_for_one_place_share_it(seed: int) -> None:
    m = Machine(1, seed=seed)
    p, q = m.process(), m.process()
    file = m.file(1)
    m.shared(p, file, 1)
    m.shared(q, file, 1)
    run(m.host, lambda: copy_to_user(p, BASE, b"p"), lambda: copy_to_user(q, BASE + 1, b"q"))
    assert m.read(p, BASE, 2) == b"pq"
    m.close()


@pytest.mark.parametrize("seed", range(12))
def test_copies_beside_a_fork_lose_no_byte(seed: int) -> None:
    m = Machine(8, seed=seed)
    p = m.process()
    m.private(p, 2)
    m.write(p, BASE, b"a")
    m.write(p, BASE + HUGE, b"b")
    children: list[object] = []

    def writer() -> None:
        for n in range(4):
            copy_to_user(p, BASE + n % 2 * HUGE + 8 + n, bytes([n + 1]))

    def forker() -> None:
        child = fork_process(p)
        assert copy_from_user(child, BASE, 1) == b"a"
        exit_process(child)
        children.append(child)

    run(m.host, writer, forker, writer)
    assert m.read(p, BASE + 8, 4) == bytes([1, 0, 3, 0])
    assert m.read(p, BASE + HUGE + 8, 4) == bytes([0, 2, 0, 4])
    m.close()


def test_a_map_of_less_than_a_huge_page_is_rounded_up() -> None:
    m = Machine()
    p = m.process()
    at = m.do(lambda: do_mmap(p.mm, 0, 4096, RW, PRIVATE & ~0x10))
    assert at % HUGE == 0
    assert m.vma(p, at).end == at + HUGE
    m.close()


def test_a_mapping_asked_to_be_locked_is_faulted_in_and_has_no_lock_to_be_in_the_way() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 2, flags=MAP_LOCKED)
    assert m.pool == (6, 0, 0)
    assert not m.vma(p).flags & VM_LOCKED
    m.do(lambda: do_madvise(p.mm, BASE, HUGE, MADV_DONTNEED))
    assert m.pool == (7, 1, 0)
    m.close()


def test_overcommit_lets_the_pool_grow_while_a_mapping_lives() -> None:
    m = Machine(1)
    m.host.hstate.nr_overcommit = 2
    p = m.process()
    m.private(p, 3)
    assert m.pool == (3, 3, 2)
    for page in range(3):
        m.write(p, BASE + page * HUGE, b"x")
    m.do(lambda: do_munmap(p.mm, BASE, 3 * HUGE))
    assert m.pool == (1, 0, 0)
    m.close()

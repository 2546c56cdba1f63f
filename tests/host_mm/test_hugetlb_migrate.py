"""Migration of huge pages: order, who may stop it, shared tables, and where the pool's pages are then."""

from __future__ import annotations

from errno import EACCES, EBUSY, EINVAL, EIO, ENOENT
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import pmd_pfn, pte_write
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE, get_user_pages_unlocked
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.hugetlb_pool import set_max_huge_pages
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.mempolicy import (
    MPOL_BIND,
    MPOL_MF_MOVE,
    MPOL_MF_STRICT,
    MPOL_PREFERRED,
    do_mbind,
    do_migrate_pages,
)
from host_mm.migrate import move_pages
from host_mm.mm_types import MmStruct
from host_mm.mmap import do_munmap
from host_mm.page import put_page
from host_mm.process import Process
from host_mm.profile import LINUX_5_10
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.hugetlb_machine import BASE, GIB, HUGE, PUNCH_HOLE, Machine, Witness, fallocate
from tests.host_mm.machine import run

OTHER = BASE + 4 * GIB


def node(m: Machine, process: Process, address: int = BASE) -> int:
    return m.host.allocator.nid_of(pmd_pfn(m.entry(process, address)))


def ready(**kw: Any) -> tuple[Machine, Process, int]:
    """A process with one written huge page, and the node that it is not on."""
    m = Machine(4, **kw)
    p = m.process()
    m.private(p, 2)
    m.write(p, BASE + 0x3000, b"x")
    return m, p, 1 - node(m, p)


@pytest.mark.parametrize("profile", [None, LINUX_5_10])
def test_a_page_is_unmapped_in_a_bracket_then_copied_then_mapped_again_untold(profile: Any) -> None:
    m, p, there = ready(**({"profile": profile} if profile else {}))
    witness = Witness(m.host, p.mm)
    assert m.do(lambda: move_pages(p, [BASE], [there])) == [there]
    log, ranges = witness.take()
    assert log == ["start", "clear", "flush", "swap-entry", "end", "set", "free"]
    assert [r[:3] for r in ranges] == [("clear", BASE, BASE + HUGE)]
    assert node(m, p) == there
    assert m.read(p, BASE + 0x3000) == b"x"
    assert pte_write(m.entry(p, BASE))
    assert m.pool == (3, 1, 0)
    m.close()


def test_a_page_from_the_buddy_takes_the_place_of_one_that_leaves_the_pool() -> None:
    m, p, there = ready()
    m.do(lambda: set_max_huge_pages(m.host, 0))
    h = m.host.hstate
    before = h.nr
    assert m.do(lambda: move_pages(p, [BASE], [there])) == [there]
    assert h.nr == before
    m.close()


def test_any_address_in_the_page_moves_it_and_an_empty_one_moves_nothing() -> None:
    m, p, there = ready()
    assert m.do(lambda: move_pages(p, [BASE + 0x7000], [there])) == [there]
    assert m.do(lambda: move_pages(p, [BASE], [there])) == [there]
    assert m.do(lambda: move_pages(p, [BASE + HUGE], [there])) == [-ENOENT]
    m.close()


def test_a_page_that_others_map_moves_for_who_may_move_all() -> None:
    m, p, there = ready()
    child = m.do(lambda: fork_process(p))
    assert m.do(lambda: move_pages(p, [BASE], [there])) == [-EACCES]
    assert m.do(lambda: move_pages(p, [BASE], [there], move_all=True)) == [there]
    assert m.entry(p, BASE) == m.entry(child, BASE)
    assert not pte_write(m.entry(p, BASE))
    m.write(p, BASE + 0x3000, b"y")
    assert m.read(child, BASE + 0x3000) == b"x"
    m.close()


def test_a_page_that_is_held_or_pinned_stays() -> None:
    m, p, there = ready()
    pfn = m.host.sched.run_task("gup", lambda: get_user_pages_unlocked(p.mm, BASE, FOLL_WRITE))
    assert m.host.sched.run_task("move", lambda: move_pages(p, [BASE], [there])) == [-EBUSY]
    put_page(m.host, pfn)
    pinned = m.host.sched.run_task("pin", lambda: pin_user_page(p.mm, BASE, FOLL_WRITE))
    assert m.do(lambda: move_pages(p, [BASE], [there])) == [-EBUSY]
    assert pte_write(m.entry(p, BASE))
    unpin_user_page(m.host, pinned)
    assert m.do(lambda: move_pages(p, [BASE], [there])) == [there]
    m.close()


def test_moving_a_page_under_somebody_who_writes_to_it_is_seen() -> None:
    m, p, there = ready(breaks=frozenset({"migrate-ignore-refs"}))
    pfn = m.host.sched.run_task("gup", lambda: get_user_pages_unlocked(p.mm, BASE, FOLL_WRITE))
    m.host.held[pfn] += 1
    with pytest.raises(BrokenTruth, match="held-frame-moved"):
        m.host.sched.run_task("move", lambda: move_pages(p, [BASE], [there]))


def test_a_page_of_a_file_moves_in_the_file_and_in_every_mapping() -> None:
    m = Machine(4)
    p, q = m.process(), m.process()
    file = m.file(1)
    m.shared(p, file, 1)
    m.shared(q, file, 1)
    m.write(p, BASE, b"x")
    m.read(q, BASE)
    there = 1 - node(m, p)
    witness = Witness(m.host, q.mm)
    assert m.do(lambda: move_pages(p, [BASE], [there], move_all=True)) == [there]
    assert witness.take()[0] == ["start", "clear", "flush", "swap-entry", "end", "set", "free"]
    assert file.i_pages[0] == pmd_pfn(m.entry(p, BASE)) == pmd_pfn(m.entry(q, BASE))
    m.write(q, BASE, b"y")
    assert m.read(p, BASE) == b"y"
    m.close()


def test_where_a_table_is_shared_it_is_unhooked_and_the_last_user_is_unmapped() -> None:
    m = Machine(4)
    p, q = m.process(), m.process()
    file = m.file(GIB // HUGE)
    m.shared(p, file, GIB // HUGE)
    m.shared(q, file, GIB // HUGE, OTHER)
    m.write(p, BASE + HUGE, b"x")
    m.read(q, OTHER + HUGE)
    there = 1 - node(m, p, BASE + HUGE)
    mine, theirs = Witness(m.host, p.mm), Witness(m.host, q.mm)
    assert m.do(lambda: move_pages(p, [BASE + HUGE], [there], move_all=True)) == [there]
    assert mine.take()[1][0][:3] == ("clear", BASE, BASE + GIB)
    log, ranges = theirs.take()
    assert ranges[0][:3] == ("clear", OTHER, OTHER + GIB)
    assert log[:3] == ["start", "clear", "flush"]
    assert m.read(p, BASE + HUGE) == m.read(q, OTHER + HUGE) == b"x"
    assert node(m, q, OTHER + HUGE) == there
    m.close()


def test_mbind_moves_huge_pages_and_faults_the_next_ones_in_where_it_says() -> None:
    m, p, there = ready()
    m.do(lambda: do_mbind(p, BASE, 2 * HUGE, MPOL_BIND, there, MPOL_MF_MOVE))
    assert node(m, p) == there
    m.write(p, BASE + HUGE, b"y")
    assert node(m, p, BASE + HUGE) == there
    assert m.read(p, BASE + 0x3000) == b"x"
    m.close()


def test_strict_mbind_says_so_if_a_page_stays_and_a_shared_one_stays_uncounted() -> None:
    m, p, there = ready()
    with pytest.raises(KernelError) as caught:
        m.do(lambda: do_mbind(p, BASE, HUGE, MPOL_BIND, there, MPOL_MF_STRICT))
    assert caught.value.errno == EIO
    m.do(lambda: fork_process(p))
    m.do(lambda: do_mbind(p, BASE, HUGE, MPOL_PREFERRED, there, MPOL_MF_MOVE | MPOL_MF_STRICT))
    assert node(m, p) != there
    m.do(lambda: do_migrate_pages(p, 1 - there, there, move_all=True))
    assert node(m, p) == there
    m.close()


def test_mbind_of_a_part_of_a_huge_page_is_einval_and_leaves_nothing_isolated() -> None:
    m, p, there = ready()
    with pytest.raises(KernelError) as caught:
        m.do(lambda: do_mbind(p, BASE, 0x1000, MPOL_BIND, there, MPOL_MF_MOVE))
    assert caught.value.errno == EINVAL
    assert m.do(lambda: move_pages(p, [BASE], [there])) == [there]
    m.close()


@pytest.mark.parametrize("seed", range(16))
def test_writes_forks_and_holes_beside_a_migration_lose_no_byte(seed: int) -> None:
    m = Machine(6, seed=seed)
    p, q = m.process(), m.process()
    file = m.file(2)
    m.shared(p, file, 2)
    m.shared(q, file, 2, OTHER)
    m.private(p, 1, OTHER)
    m.write(p, BASE, b"f")
    m.write(p, OTHER, b"a")

    def migrate() -> None:
        for nid in (1, 0, 1):
            move_pages(p, [BASE, OTHER], [nid, nid], move_all=True)

    def write() -> None:
        for n in range(4):
            copy_to_user(p, OTHER + 8 + n, b"w")
            copy_to_user(q, OTHER + 8 + n, b"s")

    def fork() -> None:
        child = fork_process(p)
        assert copy_from_user(child, OTHER, 1) == b"a"
        assert copy_from_user(child, BASE, 1) == b"f"
        exit_process(child)

    run(
        m.host, migrate, write, fork,
        lambda: fallocate(file, PUNCH_HOLE, HUGE, HUGE),
    )
    assert m.read(p, OTHER + 8, 4) == b"wwww"
    assert m.read(p, BASE + 8, 4) == b"ssss"
    m.close()


@pytest.mark.parametrize("seed", range(8))
def test_a_mapping_that_goes_beside_its_migration_leaves_no_entry_and_no_page(seed: int) -> None:
    m = Machine(4, seed=seed)
    p = m.process()
    m.private(p, 2)
    m.write(p, BASE, b"x")

    def gone(mm: MmStruct) -> None:
        do_munmap(mm, BASE, 2 * HUGE)

    run(m.host, lambda: move_pages(p, [BASE], [1]), lambda: gone(p.mm), lambda: move_pages(p, [BASE], [0]))
    assert m.pool == (4, 0, 0)
    m.close()

"""Huge pages in fork and mremap."""

from __future__ import annotations

from errno import EINVAL
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import pmd_pfn, pte_write
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.errors import KernelError
from host_mm.mmap import MAP_PRIVATE
from host_mm.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from tests.host_mm.hugetlb_machine import BASE, GIB, HUGE, Machine, Witness

AWAY = BASE + 8 * GIB
MOVE = MREMAP_MAYMOVE | MREMAP_FIXED


def test_fork_brackets_the_whole_private_mapping_as_clear_and_flushes_after_it() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 4)
    m.write(p, BASE, b"x")
    m.write(p, BASE + 2 * HUGE, b"y")
    witness = Witness(m.host, p.mm)
    child = m.do(lambda: fork_process(p))
    log, ranges = witness.take()
    assert log == ["start", "protect", "protect", "end", "flush"]
    assert [r[:3] for r in ranges] == [("clear", BASE, BASE + 4 * HUGE)]
    assert m.entry(p, BASE) == m.entry(child, BASE)
    assert not pte_write(m.entry(child, BASE))
    assert m.host.pages.large_mapcount[pmd_pfn(m.entry(p, BASE))] == 2
    m.close()


def test_fork_of_a_mapping_without_private_pages_copies_and_tells_nothing() -> None:
    m = Machine()
    p = m.process()
    file = m.file(2)
    m.shared(p, file, 2)
    m.write(p, BASE, b"x")
    m.private(p, 1, AWAY)
    witness = Witness(m.host, p.mm)
    child = m.do(lambda: fork_process(p))
    assert witness.take() == (["flush"], [])
    assert not m.entry(child, BASE)
    assert m.read(child, BASE) == b"x"
    m.close()


def test_fork_needs_no_huge_page_but_for_pinned_ones_and_fails_when_there_is_none() -> None:
    m = Machine(1)
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    child = m.do(lambda: fork_process(p))
    m.do(lambda: exit_process(child))
    pfn = m.host.sched.run_task("pin", lambda: pin_user_page(p.mm, BASE, FOLL_WRITE))
    with pytest.raises(KernelError):
        m.do(lambda: fork_process(p))
    assert m.read(p, BASE) == b"x"
    assert len(m.host.processes) == 1
    unpin_user_page(m.host, pfn)
    m.close()


def test_a_child_gets_its_own_copy_of_a_pinned_page_of_a_file_mapped_privately() -> None:
    m = Machine()
    p = m.process()
    file = m.file(1)
    m.shared(p, file, 1, kind=MAP_PRIVATE, flags=0)
    m.write(p, BASE, b"x")
    pfn = m.host.sched.run_task("pin", lambda: pin_user_page(p.mm, BASE + 0x1000, FOLL_WRITE))
    child = m.do(lambda: fork_process(p))
    assert pmd_pfn(m.entry(child, BASE)) != pmd_pfn(m.entry(p, BASE)) == pfn - 1
    assert m.read(child, BASE) == b"x"
    unpin_user_page(m.host, pfn)
    m.close()


def test_a_move_is_a_clear_bracket_over_the_old_range_and_flushes_inside_it() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 2)
    m.write(p, BASE + HUGE, b"x")
    pfn = pmd_pfn(m.entry(p, BASE + HUGE))
    witness = Witness(m.host, p.mm)
    assert m.do(lambda: do_mremap(p.mm, BASE, 2 * HUGE, 2 * HUGE, MOVE, AWAY)) == AWAY
    log, ranges = witness.take()
    assert log[:5] == ["start", "clear", "set", "flush", "end"]
    assert [r[:3] for r in ranges] == [("clear", BASE, BASE + 2 * HUGE), ("unmap", BASE, BASE + 2 * HUGE)]
    assert pmd_pfn(m.entry(p, AWAY + HUGE)) == pfn
    assert m.read(p, AWAY + HUGE) == b"x"
    assert m.pool == (7, 1, 0)
    m.write(p, AWAY, b"y")
    assert m.pool == (6, 0, 0)
    m.close()


def test_a_move_of_a_mapping_with_a_shared_table_leaves_it_to_the_others() -> None:
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(GIB // HUGE)
    m.shared(p, file, GIB // HUGE)
    m.shared(q, file, GIB // HUGE)
    m.write(p, BASE + HUGE, b"x")
    m.read(q, BASE + HUGE)
    witness = Witness(m.host, p.mm)
    m.do(lambda: do_mremap(p.mm, BASE, GIB, GIB, MOVE, AWAY))
    log, ranges = witness.take()
    assert log[:4] == ["start", "clear", "flush", "end"]
    assert ranges[0][:3] == ("clear", BASE, BASE + GIB)
    assert not m.entry(p, AWAY + HUGE)
    assert m.read(p, AWAY + HUGE) == b"x"
    m.close()


def test_a_move_of_a_table_that_nobody_shares_moves_its_entries_to_a_table_of_its_own() -> None:
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(GIB // HUGE)
    m.shared(p, file, GIB // HUGE)
    m.write(p, BASE + HUGE, b"x")
    pfn = pmd_pfn(m.entry(p, BASE + HUGE))
    m.do(lambda: do_mremap(p.mm, BASE, GIB, GIB, MOVE, AWAY))
    assert pmd_pfn(m.entry(p, AWAY + HUGE)) == pfn
    m.shared(q, file, GIB // HUGE)
    assert m.read(q, BASE + HUGE) == b"x"
    assert m.host.pages.large_mapcount[pfn] == 1, "from then on the table is shared"
    m.close()


def test_shrinking_frees_the_end_and_its_promises() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 3)
    m.write(p, BASE + 2 * HUGE, b"x")
    assert m.do(lambda: do_mremap(p.mm, BASE, 3 * HUGE, HUGE + 0x1000)) == BASE
    assert m.vma(p).end == BASE + 2 * HUGE
    assert m.pool == (8, 2, 0)
    m.close()


@pytest.mark.parametrize("args", [
    (BASE, HUGE, 2 * HUGE, MREMAP_MAYMOVE, 0),
    (BASE + 0x1000, HUGE, HUGE, MOVE, AWAY),
    (BASE, HUGE, HUGE, MOVE, AWAY + 0x1000),
    (BASE, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, AWAY),
])
def test_growing_and_unaligned_moves_are_einval(args: Any) -> None:
    m = Machine()
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    with pytest.raises(KernelError) as caught:
        m.do(lambda: do_mremap(p.mm, *args))
    assert caught.value.errno == EINVAL
    assert m.read(p, BASE) == b"x"
    m.close()


def test_a_move_to_anywhere_is_aligned_to_huge_pages() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 2)
    m.private(p, 1, AWAY)
    m.write(p, AWAY, b"x")
    at = m.do(lambda: do_mremap(p.mm, AWAY, HUGE, HUGE, MOVE, BASE))
    assert at == BASE
    assert m.read(p, BASE) == b"x"
    m.close()

"""Where huge pages may be: long-term pins, isolated blocks, memory that goes offline."""

from __future__ import annotations

from errno import EBUSY, ENOMEM, EOPNOTSUPP

import pytest

from host_mm.arch.x86.pgtable import pmd_pfn
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.hugetlb_pool import set_max_huge_pages
from host_mm.kernel.errors import KernelError
from host_mm.memory_failure import MF_COUNT_INCREASED, memory_failure, soft_offline_page
from host_mm.memory_hotplug import offline_pages, online_pages
from host_mm.mmzone import ZONE_MOVABLE, ZONE_NORMAL
from host_mm.page import get_page
from host_mm.page_isolation import (
    PB_ISOLATE_MODE_OTHER,
    start_isolate_page_range,
    undo_isolate_page_range,
)
from host_mm.process import Process
from tests.host_mm.hugetlb_machine import BASE, HUGE, Machine

LONG = FOLL_WRITE | FOLL_LONGTERM
BLOCK = 512


def zone(m: Machine, pfn: int) -> int:
    return m.host.allocator.zone_of(pfn).idx


def movable() -> tuple[Machine, Process]:
    m = Machine(4, ram=64 << 20, params={"mm.movablecore": "32M"})
    p = m.process()
    m.private(p, 2)
    m.write(p, BASE + 0x3000, b"x")
    assert zone(m, pmd_pfn(m.entry(p, BASE))) == ZONE_MOVABLE
    return m, p


def test_a_long_pin_moves_the_page_out_of_zone_movable_first() -> None:
    m, p = movable()
    pfn = m.do(lambda: pin_user_page(p.mm, BASE + 0x3000, LONG))
    assert zone(m, pfn) == ZONE_NORMAL
    assert pfn == pmd_pfn(m.entry(p, BASE)) + 3
    assert m.read(p, BASE + 0x3000) == b"x"
    assert m.pool == (3, 1, 0)
    unpin_user_page(m.host, pfn)
    m.close()


def test_a_page_that_somebody_holds_there_cannot_be_pinned_for_long() -> None:
    m, p = movable()
    short = m.do(lambda: pin_user_page(p.mm, BASE, FOLL_WRITE))
    assert m.do(lambda: pin_user_page(p.mm, BASE, LONG)) == -ENOMEM
    assert zone(m, short) == ZONE_MOVABLE
    unpin_user_page(m.host, short)
    m.close()


def test_a_page_that_the_pin_faults_in_is_none_of_zone_movable() -> None:
    m, p = movable()
    m.do(lambda: set_max_huge_pages(m.host, 28))
    kinds = {zone(m, pfn) for free in m.host.hstate.freelists for pfn in free}
    assert kinds == {ZONE_MOVABLE, ZONE_NORMAL}
    moved = m.host.vmstat["pgmigrate_success"]
    pfn = m.do(lambda: pin_user_page(p.mm, BASE + HUGE, LONG))
    assert zone(m, pfn) == ZONE_NORMAL
    assert m.host.vmstat["pgmigrate_success"] == moved
    unpin_user_page(m.host, pfn)
    m.close()


def test_a_free_page_of_an_isolated_block_is_not_handed_out() -> None:
    m = Machine(2)
    p = m.process()
    m.private(p, 1)
    home = p.home_node
    first = next(reversed(m.host.hstate.freelists[home]))
    assert start_isolate_page_range(m.host, first, first + BLOCK, PB_ISOLATE_MODE_OTHER) == 0
    m.write(p, BASE, b"x")
    assert pmd_pfn(m.entry(p, BASE)) != first
    undo_isolate_page_range(m.host, first, first + BLOCK)
    m.close()


def test_memory_goes_offline_under_huge_pages_which_move_or_go_back_to_the_buddy() -> None:
    m = Machine(4)
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE + 0x3000, b"x")
    h = m.host.hstate
    used = pmd_pfn(m.entry(p, BASE))
    free = next(iter(h.freelists[1 - m.host.allocator.nid_of(used)]))
    m.do(lambda: offline_pages(m.host, free, BLOCK))
    assert (h.nr, h.free, h.max_huge_pages) == (3, 2, 3)
    m.do(lambda: offline_pages(m.host, used, BLOCK))
    assert pmd_pfn(m.entry(p, BASE)) != used
    assert m.read(p, BASE + 0x3000) == b"x"
    m.do(lambda: online_pages(m.host, free, BLOCK))
    m.do(lambda: online_pages(m.host, used, BLOCK))
    m.close()


def test_a_pinned_or_promised_huge_page_keeps_its_memory_online() -> None:
    m = Machine(2)
    p = m.process()
    m.private(p, 2)
    m.write(p, BASE, b"x")
    pfn = m.do(lambda: pin_user_page(p.mm, BASE, FOLL_WRITE))
    promised = next(pfn for free in m.host.hstate.freelists for pfn in free)
    for block in (pfn, promised):
        with pytest.raises(KernelError) as caught:
            m.do(lambda block=block: offline_pages(m.host, block, BLOCK))
        assert caught.value.errno == EBUSY
    assert m.pool == (1, 1, 0)
    unpin_user_page(m.host, pfn)
    m.close()


@pytest.mark.parametrize("frame", [0, 3])
def test_the_failure_of_a_huge_page_is_not_modelled_and_changes_nothing(frame: int) -> None:
    m = Machine(2)
    p = m.process()
    m.private(p, 1)
    m.write(p, BASE, b"x")
    head = pmd_pfn(m.entry(p, BASE))
    free = next(pfn for pages in m.host.hstate.freelists for pfn in pages) + frame
    for fails in (memory_failure, soft_offline_page):
        for pfn in (head + frame, free):
            assert m.do(lambda fails=fails, pfn=pfn: fails(m.host, pfn)) == -EOPNOTSUPP
        get_page(m.host, head)
        assert m.do(lambda fails=fails: fails(m.host, head + frame, MF_COUNT_INCREASED)) == -EOPNOTSUPP
    m.close()

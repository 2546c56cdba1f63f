"""hmm_range_fault says what the tables say, and faults only what it is asked for (host_mm/hmm.py)."""

from __future__ import annotations

from errno import EBUSY, EFAULT, EPERM

import pytest

from host_mm.hmm import (
    HMM_PFN_DMA_MAPPED,
    HMM_PFN_ERROR,
    HMM_PFN_FLAGS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HmmRange,
    hmm_pfn_to_map_order,
    hmm_range_fault,
)
from host_mm.interval_notifier import (
    MmuIntervalNotifier,
    mmu_interval_notifier_insert,
    mmu_interval_read_begin,
    mmu_interval_set_seq,
)
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.mm_types import VM_PFNMAP
from host_mm.mmap import PROT_READ, do_mmap
from host_mm.mmu_notifier import MmuNotifierRange
from host_mm.mprotect import do_mprotect
from host_mm.process import Process
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, make_host

VALID, WRITE, ERROR = HMM_PFN_VALID, HMM_PFN_WRITE, HMM_PFN_ERROR
BOTH = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE


class Watcher(MmuIntervalNotifier):
    def invalidate(self, range_: MmuNotifierRange, cur_seq: int) -> bool:
        mmu_interval_set_seq(self, cur_seq)
        return True


class Area:
    """Eight pages, the first written, the second read, with a watcher."""

    def __init__(self) -> None:
        self.host = make_host()
        self.process: Process = self.host.create_process("p")
        self.base = do_mmap(self.process.mm, 0, 8 * PAGE, RW, ANON)
        copy_to_user(self.process, self.base, b"x")
        copy_from_user(self.process, self.base + PAGE, 1)
        self.sub = Watcher()
        assert mmu_interval_notifier_insert(self.sub, self.process.mm, self.base, 64 * PAGE) == 0

    def range(self, first: int, pages: int, flags: int = 0) -> HmmRange:
        start = self.base + first * PAGE
        range_ = HmmRange(self.sub, start, start + pages * PAGE, default_flags=flags)
        range_.notifier_seq = mmu_interval_read_begin(self.sub)
        return range_

    def ask(self, first: int, pages: int, flags: int = 0) -> list[int]:
        """The flags of each page; asked again when a COW of the fault's own came in between."""
        range_ = self.range(first, pages, flags)
        ret = hmm_range_fault(range_)
        if ret == -EBUSY:
            range_.notifier_seq = mmu_interval_read_begin(self.sub)
            ret = hmm_range_fault(range_)
        assert ret == 0
        return [word & HMM_PFN_FLAGS for word in range_.hmm_pfns]


def test_a_snapshot_faults_nothing() -> None:
    area = Area()
    before = area.host.vmstat["pgfault"]
    assert area.ask(0, 4) == [VALID | WRITE, VALID, 0, 0]
    assert area.host.vmstat["pgfault"] == before


def test_asking_for_a_read_faults_the_empty_ones_and_for_a_write_the_read_only_ones() -> None:
    area = Area()
    assert area.ask(0, 4, HMM_PFN_REQ_FAULT) == [VALID | WRITE, VALID, VALID, VALID]
    assert area.ask(0, 4, BOTH) == [VALID | WRITE] * 4


def test_single_pages_may_be_asked_for() -> None:
    area = Area()
    range_ = area.range(2, 3)
    range_.pfn_flags_mask = BOTH
    range_.hmm_pfns[1] = BOTH
    range_.hmm_pfns[2] = HMM_PFN_DMA_MAPPED
    assert hmm_range_fault(range_) == 0
    # Linux faults all that follows in the same table with what one page of it needs.
    assert [word & HMM_PFN_FLAGS for word in range_.hmm_pfns] == [
        0, VALID | WRITE, VALID | WRITE | HMM_PFN_DMA_MAPPED,
    ]


def test_the_frame_is_the_one_that_the_tables_have() -> None:
    area = Area()
    range_ = area.range(0, 1)
    assert hmm_range_fault(range_) == 0
    pfn = range_.hmm_pfns[0] & ~HMM_PFN_FLAGS
    assert area.host.ram.read(pfn << 12, 1) == b"x"
    assert hmm_pfn_to_map_order(range_.hmm_pfns[0]) == 0


def test_where_nothing_is_mapped_a_snapshot_says_error_and_a_fault_efault() -> None:
    area = Area()
    assert area.ask(7, 3)[1:] == [ERROR, ERROR]
    assert hmm_range_fault(area.range(7, 3, HMM_PFN_REQ_FAULT)) == -EFAULT
    area.process.mm.vmas[0].flags |= VM_PFNMAP
    assert area.ask(0, 1) == [ERROR]
    assert hmm_range_fault(area.range(0, 1, HMM_PFN_REQ_FAULT)) == -EFAULT
    area.process.mm.vmas[0].flags &= ~VM_PFNMAP


def test_a_write_where_only_reading_is_allowed_is_eperm() -> None:
    area = Area()
    do_mprotect(area.process.mm, area.base, 8 * PAGE, PROT_READ)
    assert area.ask(0, 2, HMM_PFN_REQ_FAULT) == [VALID, VALID]
    assert hmm_range_fault(area.range(0, 2, BOTH)) == -EPERM


def test_the_walk_crosses_vmas_with_other_rights() -> None:
    area = Area()
    do_mprotect(area.process.mm, area.base + 2 * PAGE, 2 * PAGE, 0)
    assert area.ask(0, 6) == [VALID | WRITE, VALID, ERROR, ERROR, 0, 0]
    assert hmm_range_fault(area.range(0, 6, HMM_PFN_REQ_FAULT)) == -EFAULT


def test_a_range_invalidated_since_read_begin_is_ebusy() -> None:
    area = Area()
    range_ = area.range(0, 2, HMM_PFN_REQ_FAULT)
    do_madvise(area.process.mm, area.base, PAGE, MADV_DONTNEED)
    assert hmm_range_fault(range_) == -EBUSY


@pytest.mark.parametrize("first", [0, 1])
def test_a_fault_that_opens_a_bracket_of_its_own_is_ebusy_too(first: int) -> None:
    """A write over the zero page is a COW, whose bracket overlaps the very range that is being filled."""
    area = Area()
    assert hmm_range_fault(area.range(first, 2, BOTH)) == -EBUSY
    assert area.ask(first, 2, BOTH) == [VALID | WRITE] * 2

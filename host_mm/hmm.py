"""hmm_range_fault: what the CPU's tables say of a range, faulted in as asked, for a device's tables.

Source of truth: mm/hmm.c, include/linux/hmm.h; Linux 6.18.

A word a page, in and out:

     63     62     61     60          52..48  47        0
    +------+------+------+----------+-+------+-----------+
    | VALID| WRITE| ERROR| in = out | | order|   frame   |
    +------+------+------+----------+-+------+-----------+
      in: REQ_FAULT and REQ_WRITE are VALID and WRITE; order: log2 of the pages that one CPU entry maps

The tables are read without their locks, so that what is found may be old already: the caller publishes
it under a lock of its own, and only if mmu_interval_read_retry says no.

Not modelled: huge swap and migration entries (faulted like empty ones), peer-to-peer DMA addresses.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, EPERM
from typing import TYPE_CHECKING, Any

from host_mm.arch.x86.pgtable import (
    _PAGE_PSE,
    PMD_SIZE,
    pte_pfn,
    pte_present,
    pte_protnone,
    pte_write,
    walk_lockless,
)
from host_mm.arch.x86.swapops import (
    SWP_PFN_MASK,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_migration_entry,
    is_swap_pte,
    is_writable_device_private_entry,
    non_swap_entry,
    pte_none_mostly,
    pte_to_swp_entry,
    swp_offset,
)
from host_mm.interval_notifier import MmuIntervalNotifier, mmu_interval_check_retry
from host_mm.memory import handle_mm_fault
from host_mm.memory_folio import vm_normal_page
from host_mm.memremap import page_pgmap
from host_mm.mm_types import (
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_WRITE,
    VM_FAULT_ERROR,
    VM_IO,
    VM_PFNMAP,
    VM_READ,
    VM_WRITE,
)
from host_mm.pgtable_generic import pmd_offset
from host_mm.swapin import migration_entry_wait

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea

__all__ = [
    "HMM_PFN_DMA_MAPPED", "HMM_PFN_ERROR", "HMM_PFN_FLAGS", "HMM_PFN_REQ_FAULT", "HMM_PFN_REQ_WRITE",
    "HMM_PFN_VALID", "HMM_PFN_WRITE", "HMM_RANGE_DEFAULT_TIMEOUT", "HmmRange", "hmm_pfn_to_map_order",
    "hmm_range_fault",
]

HMM_PFN_VALID = 1 << 63
HMM_PFN_WRITE = 1 << 62
HMM_PFN_ERROR = 1 << 61
HMM_PFN_DMA_MAPPED = 1 << 60
HMM_PFN_ORDER_SHIFT = 53
HMM_PFN_FLAGS = ((1 << 64) - 1) & ~((1 << HMM_PFN_ORDER_SHIFT) - 1)
HMM_PFN_REQ_FAULT = HMM_PFN_VALID
HMM_PFN_REQ_WRITE = HMM_PFN_WRITE
_INOUT = HMM_PFN_DMA_MAPPED
HMM_RANGE_DEFAULT_TIMEOUT = 1_000_000_000
"""ns after which a driver gives up on a range that is invalidated again and again."""

_NEED_FAULT = 1
_NEED_WRITE_FAULT = 2


class HmmRange:
    """struct hmm_range: [start, end) of the notifier's mm; `hmm_pfns` has a word for each page.

    `notifier_seq` is mmu_interval_read_begin's answer. `dev_private_owner`: whose device-private pages are
    reported as they are instead of being faulted back.
    """

    __slots__ = (
        "default_flags", "dev_private_owner", "end", "hmm_pfns", "notifier", "notifier_seq", "pfn_flags_mask",
        "start",
    )

    def __init__(
        self, notifier: MmuIntervalNotifier, start: int, end: int, *, default_flags: int = 0,
        dev_private_owner: Any = None,
    ) -> None:
        self.notifier = notifier
        self.notifier_seq = 0
        self.start = start
        self.end = end
        self.hmm_pfns = [0] * ((end - start) >> 12)
        self.default_flags = default_flags
        self.pfn_flags_mask = 0
        self.dev_private_owner = dev_private_owner


def hmm_pfn_to_map_order(hmm_pfn: int) -> int:
    """log2 of the pages that the CPU's entry behind this word maps."""
    return hmm_pfn >> HMM_PFN_ORDER_SHIFT & 0x1F


def hmm_range_fault(range_: HmmRange) -> int:
    """Fill `range_.hmm_pfns`, faulting in what the flags ask for; 0 or a negative errno.

    -EBUSY: a bracket came in between, begin again. -EFAULT: no mapping, or one for which there are no
    pages. -EPERM: writing asked where the mapping is read-only. mmap_lock is held for reading.
    """
    walk = _HmmWalk(range_)
    while True:
        if mmu_interval_check_retry(range_.notifier, range_.notifier_seq):
            return -EBUSY
        ret = walk.run()
        if ret != -EBUSY:
            return ret


class _HmmWalk:
    """struct hmm_vma_walk: words below `last` have their output, the others still their input."""

    def __init__(self, range_: HmmRange) -> None:
        mm = range_.notifier.mm
        assert mm is not None
        self.range = range_
        self.mm = mm
        self.host = mm.host
        self.last = range_.start

    def run(self) -> int:
        """walk_page_range from `last` on; -EBUSY after a fault."""
        address, end = self.last, self.range.end
        while address < end:
            vma = self.mm.find_vma(address)
            if vma is None or vma.start >= end:
                return self._no_pages(address, end)
            if vma.start > address:
                ret, following = self._no_pages(address, vma.start), vma.start
            else:
                following = min(end, vma.end)
                usable = not vma.flags & (VM_IO | VM_PFNMAP) and vma.flags & VM_READ
                ret = self._vma(vma, address, following) if usable else self._no_pages(address, following)
            if ret:
                return ret
            address = following
        return 0

    def _no_pages(self, address: int, end: int) -> int:
        """No VMA, or one that cannot be mirrored."""
        if self._range_need_fault(address, end, 0):
            return -EFAULT
        self._fill(address, end, HMM_PFN_ERROR)
        return 0

    def _vma(self, vma: VmArea, address: int, end: int) -> int:
        while address < end:
            entry, level = walk_lockless(self.host.ram, self.mm.pgd, address)
            if level == 1:
                ret, following = self._pte(vma, address, min(end, _boundary(address, PMD_SIZE)), entry)
            else:
                following = min(end, _boundary(address, 4096 << 9 * (level - 1)))
                ret = self._upper(vma, address, following, entry, level)
            if ret:
                return ret
            address = following
        return 0

    def _upper(self, vma: VmArea, address: int, end: int, entry: int, level: int) -> int:
        """A huge leaf, or nothing at this level."""
        flags = _cpu_flags(entry) if entry & _PAGE_PSE else 0
        if flags:
            flags |= 9 * (level - 1) << HMM_PFN_ORDER_SHIFT
        required = self._range_need_fault(address, end, flags)
        if required:
            return self._fault(vma, address, end, required)
        if not flags:
            self._fill(address, end, 0)
            return 0
        mask = (1 << 9 * (level - 1)) - 1
        pfn = (pte_pfn(entry) & ~mask) + (address >> 12 & mask)
        for at in range(address, end, 4096):
            self._store(at, flags | pfn)
            pfn += 1
        return 0

    def _pte(self, vma: VmArea, address: int, end: int, entry: int) -> tuple[int, int]:
        """hmm_vma_handle_pte: (0 or errno, next address). A fault takes in all of [address, end)."""
        asked = self.range.hmm_pfns[(address - self.range.start) >> 12]
        if is_swap_pte(entry) and not pte_none_mostly(entry):
            return self._nonpresent(vma, address, end, entry, asked), address + 4096
        flags = _cpu_flags(entry)
        required = self._need_fault(asked, flags)
        if required:
            return self._fault(vma, address, end, required), address + 4096
        mapped = not pte_none_mostly(entry)
        word = flags | pte_pfn(entry) if mapped else 0
        if mapped and vm_normal_page(self.host, entry) < 0 and pte_pfn(entry) != self.host.zero_pfn:
            if self._need_fault(asked, 0):
                return -EFAULT, address
            word = HMM_PFN_ERROR
        self._store(address, word)
        return 0, address + 4096

    def _nonpresent(self, vma: VmArea, address: int, end: int, entry: int, asked: int) -> int:
        swp = pte_to_swp_entry(entry)
        if is_device_private_entry(swp):
            pfn = swp_offset(swp) & SWP_PFN_MASK
            owner = self.range.dev_private_owner
            if owner is not None and page_pgmap(self.host, pfn).owner is owner:
                write = HMM_PFN_WRITE if is_writable_device_private_entry(swp) else 0
                self._store(address, pfn | HMM_PFN_VALID | write)
                return 0
        required = self._need_fault(asked, 0)
        if not required:
            self._store(address, 0)
            return 0
        if is_migration_entry(swp):
            self.last = address
            migration_entry_wait(self.mm, pmd_offset(self.mm, address), address)
            return -EBUSY
        device = is_device_private_entry(swp) or is_device_exclusive_entry(swp)
        faultable = device or not non_swap_entry(swp)
        return self._fault(vma, address, end, required) if faultable else -EFAULT

    def _fault(self, vma: VmArea, address: int, end: int, required: int) -> int:
        """hmm_vma_fault: every page from here on, then the walk begins again."""
        self.last = address
        flags = FAULT_FLAG_REMOTE
        if required & _NEED_WRITE_FAULT:
            if not vma.flags & VM_WRITE:
                return -EPERM
            flags |= FAULT_FLAG_WRITE
        for at in range(address, end, 4096):
            if handle_mm_fault(vma, at, flags) & VM_FAULT_ERROR:
                return -EFAULT
        return -EBUSY

    def _need_fault(self, asked: int, cpu_flags: int) -> int:
        range_ = self.range
        asked = asked & range_.pfn_flags_mask | range_.default_flags
        if not asked & HMM_PFN_REQ_FAULT:
            return 0
        if asked & HMM_PFN_REQ_WRITE and not cpu_flags & HMM_PFN_WRITE:
            return _NEED_FAULT | _NEED_WRITE_FAULT
        return 0 if cpu_flags & HMM_PFN_VALID else _NEED_FAULT

    def _range_need_fault(self, address: int, end: int, cpu_flags: int) -> int:
        range_ = self.range
        if not (range_.default_flags | range_.pfn_flags_mask) & HMM_PFN_REQ_FAULT:
            return 0
        first, last = (address - range_.start) >> 12, (end - range_.start) >> 12
        required = 0
        for asked in range_.hmm_pfns[first:last]:
            required |= self._need_fault(asked, cpu_flags)
        return required

    def _store(self, address: int, word: int) -> None:
        pfns = self.range.hmm_pfns
        index = (address - self.range.start) >> 12
        pfns[index] = pfns[index] & _INOUT | word

    def _fill(self, address: int, end: int, word: int) -> None:
        for at in range(address, end, 4096):
            self._store(at, word)


def _cpu_flags(entry: int) -> int:
    if not pte_present(entry) or pte_protnone(entry):
        return 0
    return HMM_PFN_VALID | HMM_PFN_WRITE if pte_write(entry) else HMM_PFN_VALID


def _boundary(address: int, size: int) -> int:
    return (address & -size) + size

"""Reservations of huge pages: who was promised one, and who used the promise.

Source of truth: mm/hugetlb.c (region_chg, region_add, region_abort, region_del, region_count,
__vma_reservation_common, restore_reserve_on_error, alloc_hugetlb_folio, hugetlb_reserve_pages,
hugetlb_unreserve_pages, resv_map_alloc, hugetlb_dup_vma_private, clear_vma_resv_huge_pages); Linux 6.18.

A shared mapping uses the file's map: a page in it was promised, whether or not it exists. A private mapping
has a map of its own, which its VMA's pieces share, and whose meaning is the opposite: all of the mapping
was promised, and a page in the map has used its promise. The child of a fork was promised nothing.

`vma.private_data` of a huge-page VMA is (map or None, HPAGE_RESV_* bits) if it is private, so that a copy of
the VMA has both, and a HugetlbVmaLock or None if it is shared.

Not modelled: the cache of region descriptors (their allocation cannot fail here), cgroup charges.
"""

from __future__ import annotations

from errno import EINVAL, ENOSPC
from typing import TYPE_CHECKING

from host_mm.hugetlb import HPG_restore_reserve, dequeue_hugetlb_folio_vma, huge_node
from host_mm.hugetlb_pool import alloc_surplus_hugetlb_folio, hugetlb_acct_memory
from host_mm.kernel.locks import RwSem, Spinlock
from host_mm.mm_types import VM_MAYSHARE, VM_NORESERVE

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = [
    "HPAGE_RESV_OWNER",
    "HPAGE_RESV_UNMAPPED",
    "LONG_MAX",
    "HugetlbInode",
    "HugetlbVmaLock",
    "ResvMap",
    "alloc_hugetlb_folio",
    "clear_vma_resv_huge_pages",
    "hugetlb_dup_vma_private",
    "hugetlb_reserve_pages",
    "hugetlb_unreserve_pages",
    "hugetlb_vma_lock_alloc",
    "hugetlb_vma_lock_free",
    "is_vma_resv_set",
    "restore_reserve_on_error",
    "resv_map_put",
    "set_vma_resv_flags",
    "vma_add_reservation",
    "vma_end_reservation",
    "vma_hugecache_offset",
    "vma_needs_reservation",
    "vma_resv_map",
]

HPAGE_RESV_OWNER = 1 << 0
HPAGE_RESV_UNMAPPED = 1 << 1
LONG_MAX = (1 << 63) - 1

_NEEDS, _COMMIT, _END, _ADD, _DEL = range(5)


class HugetlbVmaLock:
    """struct hugetlb_vma_lock: keeps a shared VMA's tables in place; `vma` is None once the VMA is gone."""

    __slots__ = ("rw_sema", "vma")

    def __init__(self, host: HostMm, vma: VmArea) -> None:
        self.rw_sema = RwSem(host.sched, "hugetlb_vma_lock")
        self.vma: VmArea | None = vma


class HugetlbInode:
    """What a hugetlbfs file has beside its address space: a number for the fault mutexes, the map."""

    __slots__ = ("ino", "resv_map")

    def __init__(self, ino: int, resv_map: ResvMap) -> None:
        self.ino = ino
        self.resv_map = resv_map


class ResvMap:
    """struct resv_map: sorted, disjoint regions [from, to) of huge-page indices.

    `adds_in_progress` counts changes that were announced (chg) and neither made (add) nor given up.
    """

    __slots__ = ("adds_in_progress", "lock", "refs", "regions", "rw_sema")

    def __init__(self, host: HostMm) -> None:
        self.refs = 1
        self.lock = Spinlock(host.sched, "resv_map_lock")
        self.rw_sema = RwSem(host.sched, "resv_map_rw_sema")
        self.regions: list[tuple[int, int]] = []
        self.adds_in_progress = 0

    def _missing(self, start: int, end: int) -> int:
        return end - start - self._covered(start, end)

    def _covered(self, start: int, end: int) -> int:
        return sum(max(0, min(to, end) - max(at, start)) for at, to in self.regions)

    def chg(self, start: int, end: int) -> int:
        """How many pages of the range are not in the map; announces that they may be added."""
        self.lock.lock()
        missing = self._missing(start, end)
        self.adds_in_progress += 1
        self.lock.unlock()
        return missing

    def add(self, start: int, end: int) -> int:
        """Put the range into the map; how many pages of it were new."""
        self.lock.lock()
        missing = self._missing(start, end)
        merged: list[tuple[int, int]] = []
        for at, to in sorted([*self.regions, (start, end)]):
            if merged and at <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], to))
            else:
                merged.append((at, to))
        self.regions = merged
        self.adds_in_progress -= 1
        self.lock.unlock()
        return missing

    def abort(self) -> None:
        """An announced change is given up."""
        self.lock.lock()
        self.adds_in_progress -= 1
        self.lock.unlock()

    def delete(self, start: int, end: int) -> int:
        """Take the range out of the map; how many pages of it were in there."""
        self.lock.lock()
        covered = self._covered(start, end)
        pieces = [
            piece for at, to in self.regions for piece in ((at, min(to, start)), (max(at, end), to))
        ]
        self.regions = [piece for piece in pieces if piece[0] < piece[1]]
        self.lock.unlock()
        return covered

    def count(self, start: int, end: int) -> int:
        """How many pages of the range are in the map."""
        self.lock.lock()
        covered = self._covered(start, end)
        self.lock.unlock()
        return covered


def resv_map_put(resv: ResvMap) -> None:
    """kref_put: one user less."""
    resv.refs -= 1


# -- the VMA's word -------------------------------------------------------------------------------
def vma_hugecache_offset(vma: VmArea, address: int) -> int:
    """The index of the huge page at `address`, in huge pages."""
    return ((address - vma.start) >> 21) + (vma.pgoff >> 9)


def vma_resv_map(vma: VmArea) -> ResvMap | None:
    """The map that says what the VMA was promised."""
    if vma.flags & VM_MAYSHARE:
        inode: HugetlbInode = vma.file.private_data
        return inode.resv_map
    resv: ResvMap | None = vma.private_data[0] if vma.private_data is not None else None
    return resv


def is_vma_resv_set(vma: VmArea, flag: int) -> bool:
    """Whether a private VMA has this HPAGE_RESV_* bit."""
    if vma.flags & VM_MAYSHARE:
        return False
    return vma.private_data is not None and bool(vma.private_data[1] & flag)


def set_vma_resv_flags(vma: VmArea, flags: int) -> None:
    """Give a private VMA HPAGE_RESV_* bits."""
    resv, old = vma.private_data or (None, 0)
    vma.private_data = (resv, old | flags)


def hugetlb_dup_vma_private(vma: VmArea) -> None:
    """A fork's copy has no reservations and no lock of its own yet."""
    if vma.flags & VM_MAYSHARE:
        lock = vma.private_data
        if lock is not None and lock.vma is not vma:
            vma.private_data = None
    else:
        vma.private_data = None


def clear_vma_resv_huge_pages(vma: VmArea) -> None:
    """mremap gave the reservation to the VMA's copy."""
    resv = vma_resv_map(vma)
    if resv is not None and is_vma_resv_set(vma, HPAGE_RESV_OWNER):
        resv_map_put(resv)
    hugetlb_dup_vma_private(vma)


def hugetlb_vma_lock_alloc(vma: VmArea) -> None:
    """Only VMAs that can share tables have a lock of this kind."""
    if vma.flags & VM_MAYSHARE and vma.private_data is None:
        vma.private_data = HugetlbVmaLock(vma.mm.host, vma)


def hugetlb_vma_lock_free(vma: VmArea, *, locked: bool = False) -> None:
    """The VMA goes, its lock with it (`locked`: for writing by the caller); who waits for it finds that."""
    lock = vma.private_data
    if vma.flags & VM_MAYSHARE and lock is not None:
        if not locked:
            lock.rw_sema.lock()
        lock.vma = None
        vma.private_data = None
        lock.rw_sema.unlock()


# -- one page -------------------------------------------------------------------------------------
def _reservation(vma: VmArea, address: int, mode: int) -> int:
    """__vma_reservation_common: 0 if the page was promised, 1 if not."""
    resv = vma_resv_map(vma)
    if resv is None:
        return 1
    shared = bool(vma.flags & VM_MAYSHARE)
    index = vma_hugecache_offset(vma, address)
    if mode == _NEEDS:
        ret = resv.chg(index, index + 1)
    elif mode == _END:
        resv.abort()
        ret = 0
    elif mode == _COMMIT or (mode == _ADD) == shared:
        ret = resv.add(index, index + 1)
    else:
        resv.abort()
        ret = resv.delete(index, index + 1)
    if shared or mode == _DEL:
        return ret
    # A private map holds the promises that were used up.
    return 0 if ret else 1


def vma_needs_reservation(vma: VmArea, address: int) -> int:
    """1 if a page there was not promised, 0 if it was; to be followed by an end, a commit, an add..."""
    return _reservation(vma, address, _NEEDS)


def vma_end_reservation(vma: VmArea, address: int) -> None:
    """Nothing changes after vma_needs_reservation."""
    _reservation(vma, address, _END)


def vma_add_reservation(vma: VmArea, address: int) -> None:
    """The promise holds again."""
    _reservation(vma, address, _ADD)


def restore_reserve_on_error(vma: VmArea, address: int, pfn: int) -> None:
    """The page that alloc_hugetlb_folio gave is not used: make the map say what it said before."""
    private = vma.file.host.pages.private
    needed = vma_needs_reservation(vma, address)
    if private[pfn] & HPG_restore_reserve:
        if needed:
            vma_add_reservation(vma, address)
        else:
            vma_end_reservation(vma, address)
    elif needed:
        vma_end_reservation(vma, address)
    else:
        _reservation(vma, address, _DEL)


def alloc_hugetlb_folio(
    vma: VmArea, address: int, *, cow_from_owner: bool = False, nid: int | None = None
) -> int:
    """A huge page for `address` with one reference, or -ENOSPC; a promised one if there is a promise.

    `cow_from_owner`: the owner copies a page for which the promise was used already. `nid`: from where
    first, if not from where the VMA's policy says.
    """
    host = vma.file.host
    nid = huge_node(vma) if nid is None else nid
    h = host.hstate
    needed = cow_from_owner or bool(vma_needs_reservation(vma, address))
    h.lock.lock()
    pfn = dequeue_hugetlb_folio_vma(host, nid, reserved=not needed)
    if pfn < 0:
        h.lock.unlock()
        pfn = alloc_surplus_hugetlb_folio(host, nid)
        if pfn < 0:
            if not cow_from_owner:
                vma_end_reservation(vma, address)
            return -ENOSPC
        h.lock.lock()
        h.active[pfn] = None
        host.pages.refcount[pfn] = 1
    if not needed:
        host.pages.private[pfn] |= HPG_restore_reserve
        h.resv -= 1
    h.lock.unlock()
    if not cow_from_owner and not _reservation(vma, address, _COMMIT) and needed:
        # Meanwhile somebody reserved this page, and it is here now.
        hugetlb_acct_memory(host, -1)
    return pfn


# -- ranges of a file -----------------------------------------------------------------------------
def hugetlb_reserve_pages(
    mapping: AddressSpace, start: int, end: int, vma: VmArea | None, vm_flags: int
) -> int:
    """Promise the huge pages [start, end) of the file to a mapping of it; 0 or -EINVAL.

    A private mapping is promised every page; a shared one (or no `vma`) those that the file lacks.
    """
    host = mapping.host
    if vma is not None:
        hugetlb_vma_lock_alloc(vma)
    if vm_flags & VM_NORESERVE:
        return 0
    if vma is not None and not vma.flags & VM_MAYSHARE:
        vma.private_data = (ResvMap(host), HPAGE_RESV_OWNER)
        if hugetlb_acct_memory(host, end - start):
            vma.private_data = None
            return -EINVAL
        return 0
    resv: ResvMap = mapping.private_data.resv_map
    wanted = resv.chg(start, end)
    if hugetlb_acct_memory(host, wanted):
        resv.abort()
        if vma is not None:
            hugetlb_vma_lock_free(vma)
        return -EINVAL
    added = resv.add(start, end)
    if wanted > added:
        hugetlb_acct_memory(host, added - wanted)
    return 0


def hugetlb_unreserve_pages(mapping: AddressSpace, start: int, end: int, freed: int) -> None:
    """The file's promises of [start, end) end; `freed` of those pages existed and are gone."""
    resv: ResvMap = mapping.private_data.resv_map
    gone = resv.delete(start, end)
    hugetlb_acct_memory(mapping.host, freed - gone)

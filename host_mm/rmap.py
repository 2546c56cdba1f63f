"""Reverse mapping: from a page to the entries that may map it.

Source of truth: mm/rmap.c (rmap_walk_anon, rmap_walk_file, folio_referenced_one, folio_add_new_anon_rmap,
folio_remove_rmap_pte), include/linux/rmap.h (folio_try_dup_anon_rmap_pte, folio_try_share_anon_rmap_pte);
Linux 6.18. Unmapping and migration entries are in rmap_unmap.py, the walk of a KSM page in ksm_types.py,
the walk of one VMA in page_vma_mapped.py, the counts of large folios in rmap_large.py; which anon_vmas a
VMA has, in rmap_anon_vma.py.

A file's page is found through the VMAs in its address space's i_mmap.

Not modelled: the interval trees' O(log n) descent (chains and i_mmap are scanned).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.address_space import vmas_of_pages
from host_mm.arch.x86.pgtable import PMD_SIZE
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.kernel.errors import BrokenTruth
from host_mm.ksm_types import rmap_walk_ksm
from host_mm.mm_types import (
    MMF_HAS_PINNED,
    MMF_UNSTABLE,
    VM_LOCKED,
    VM_RAND_READ,
    VM_SEQ_READ,
    AnonVma,
)
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_head,
    PG_idle,
    PG_ksm,
    PG_swapbacked,
    PG_young,
    folio_mapcount,
    folio_maybe_dma_pinned,
    folio_maybe_mapped_shared,
    folio_nr_pages,
)
from host_mm.page_vma_mapped import PageVmaMappedWalk, vma_address
from host_mm.pgtable_generic import ptep_test_and_clear_young
from host_mm.pgtable_huge import pmdp_test_and_clear_young
from host_mm.rmap_large import (
    folio_add_anon_rmap_ptes,
    folio_add_large_rmap_ptes,
    folio_remove_large_rmap_pte,
    mapped_stat,
    set_new_large_rmap,
)

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.memcontrol import MemCgroup
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "folio_add_anon_rmap_pte", "folio_add_file_rmap_pte", "folio_add_new_anon_rmap",
    "folio_dup_file_rmap_pte", "folio_get_anon_vma", "folio_move_anon_rmap", "folio_referenced",
    "folio_remove_rmap_pte", "folio_try_dup_anon_rmap_pte", "folio_try_share_anon_rmap_pte",
    "page_vma_mapped_walk", "rmap_walk",
]


# -- counting entries ---------------------------------------------------------------------------
def folio_add_new_anon_rmap(
    host: HostMm, pfn: int, vma: VmArea, address: int, *, exclusive: bool = True
) -> None:
    """First mapping of a folio nobody else knows; a large one is mapped as a whole."""
    pages = host.pages
    anon_vma = vma.anon_vma
    if anon_vma is None:
        raise BrokenTruth(
            "anon-vma", f"an anonymous page at {address:#x} without an anon_vma", host.stream.here()
        )
    # A page that is not exclusive may be found through any VMA of the tree: it hangs on the root.
    pages.mapping[pfn] = anon_vma if exclusive else anon_vma.root
    pages.index[pfn] = vma.page_index(address)
    owned = exclusive and host.profile.anon_exclusive
    pages.flags[pfn] |= PG_anon | PG_swapbacked | (PG_anon_exclusive if owned else 0)
    if pages.flags[pfn] & PG_head:
        set_new_large_rmap(host, pfn, vma)
        return
    pages.mapcount[pfn] = 1
    host.vmstat["nr_anon_pages"] += 1


def folio_add_anon_rmap_pte(host: HostMm, pfn: int, vma: VmArea, address: int, *, exclusive: bool) -> None:
    """One more entry maps a known anonymous page (swap-in, migration restore)."""
    pages = host.pages
    if pages.tail[pfn] or pages.flags[pfn] & PG_head:
        # Whether the VMA maps all of a large folio is for reclaim to find out: it is not mlocked here.
        folio_add_anon_rmap_ptes(host, pfn - pages.tail[pfn], pfn, 1, vma, exclusive=exclusive)
        return
    if not pages.mapcount[pfn]:
        host.vmstat["nr_anon_pages"] += 1
    pages.mapcount[pfn] += 1
    if exclusive and host.profile.anon_exclusive:
        pages.flags[pfn] |= PG_anon_exclusive
    host.lru.mlock.mlock_vma_folio(pfn, vma)


def folio_remove_rmap_pte(host: HostMm, pfn: int, vma: VmArea) -> None:
    """One entry less maps the page; it was `vma`'s."""
    pages = host.pages
    if pages.tail[pfn] or pages.flags[pfn] & PG_head:
        folio_remove_large_rmap_pte(host, pfn - pages.tail[pfn], pfn, vma)
        return
    count = pages.mapcount[pfn] - 1
    if count < 0:
        raise BrokenTruth(
            "page-mapcount", f"pfn {pfn:#x} loses an entry it does not have", host.stream.here()
        )
    pages.mapcount[pfn] = count
    if not count:
        host.vmstat[mapped_stat(pages.flags[pfn])] -= 1
    if vma.flags & VM_LOCKED:
        host.lru.mlock.munlock_folio(pfn)


def folio_move_anon_rmap(host: HostMm, pfn: int, vma: VmArea) -> None:
    """The page now belongs to this VMA's process alone; the folio lock is held."""
    host.pages.mapping[pfn] = vma.anon_vma


def folio_try_dup_anon_rmap_pte(host: HostMm, pfn: int, dst_vma: VmArea, src_vma: VmArea) -> bool:
    """Fork shares the page with the child; false if it may be pinned and must be copied."""
    pages = host.pages
    if pages.flags[pfn] & PG_anon_exclusive or not host.profile.anon_exclusive:
        if src_vma.mm.flags & MMF_HAS_PINNED and folio_maybe_dma_pinned(pages, pfn):
            return False
        pages.flags[pfn] &= ~PG_anon_exclusive
    if pages.tail[pfn] or pages.flags[pfn] & PG_head:
        folio_add_large_rmap_ptes(host, pfn - pages.tail[pfn], pfn, 1, dst_vma.mm)
    else:
        pages.mapcount[pfn] += 1
    return True


def folio_try_share_anon_rmap_pte(host: HostMm, pfn: int) -> bool:
    """Give up exclusivity before the page leaves its entry; false if it may be pinned.

    The entry was cleared before: fast GUP re-reads it after it took its reference.
    """
    pages = host.pages
    if folio_maybe_dma_pinned(pages, pfn):
        return False
    pages.flags[pfn] &= ~PG_anon_exclusive
    return True


def folio_add_file_rmap_pte(host: HostMm, pfn: int, vma: VmArea) -> None:
    """One more entry maps a page of a file."""
    folio_dup_file_rmap_pte(host, pfn, vma)
    if not (host.pages.tail[pfn] or host.pages.flags[pfn] & PG_head):
        host.lru.mlock.mlock_vma_folio(pfn, vma)


def folio_dup_file_rmap_pte(host: HostMm, pfn: int, dst_vma: VmArea) -> None:
    """Fork gives the child an entry of a page of a file."""
    pages = host.pages
    if pages.tail[pfn] or pages.flags[pfn] & PG_head:
        folio_add_large_rmap_ptes(host, pfn - pages.tail[pfn], pfn, 1, dst_vma.mm)
        return
    if not pages.mapcount[pfn]:
        host.vmstat[mapped_stat(pages.flags[pfn])] += 1
    pages.mapcount[pfn] += 1


# -- walking ------------------------------------------------------------------------------------
def folio_get_anon_vma(host: HostMm, pfn: int) -> AnonVma | None:
    """The anon_vma of a mapped anonymous page; a KSM page has none."""
    pages = host.pages
    if pages.flags[pfn] & (PG_anon | PG_ksm) != PG_anon or folio_mapcount(pages, pfn) <= 0:
        return None
    return pages.mapping.get(pfn)


def page_vma_mapped_walk(host: HostMm, pfn: int, vma: VmArea, address: int) -> int:
    """The entry of `vma` at `address` that maps small folio `pfn`, its table locked; 0: none, not locked."""
    walk = PageVmaMappedWalk(host, pfn, vma, address)
    return walk.pte if walk.next() else 0


def rmap_walk(
    host: HostMm, pfn: int, rmap_one: Callable[[VmArea, int], bool], *,
    anon_vma: AnonVma | None = None, locked: bool = False, try_lock: bool = False,
    done: Callable[[], bool] | None = None,
) -> bool:
    """Call `rmap_one(vma, address)` where the page may be mapped, until it says false.

    Takes the anon_vma's lock for reading unless `locked`. False: `try_lock` and it was contended.
    """
    flags = host.pages.flags[pfn]
    if flags & PG_ksm:
        return rmap_walk_ksm(host, pfn, rmap_one, try_lock=try_lock, done=done)
    given = anon_vma
    if not flags & PG_anon and anon_vma is None:
        return _rmap_walk_file(host, pfn, rmap_one, locked=locked, try_lock=try_lock, done=done)
    if anon_vma is None:
        anon_vma = folio_get_anon_vma(host, pfn)
        if anon_vma is None:
            return True
    rwsem = anon_vma.root.rwsem
    if not locked:
        if try_lock:
            if not rwsem.read_trylock():
                return False
        else:
            rwsem.read_lock()
        if given is None and host.pages.mapping.get(pfn) is not anon_vma:
            # UFFDIO_MOVE gave the page to another VMA while the lock was waited for.
            rwsem.read_unlock()
            return rmap_walk(host, pfn, rmap_one, try_lock=try_lock, done=done)
    index = host.pages.index[pfn]
    nr_pages = folio_nr_pages(host.pages, pfn)
    hits: list[tuple[int, VmArea, int]] = []
    for avc in anon_vma.chains.values():
        address = vma_address(avc.vma, index, nr_pages)
        if address >= 0:
            hits.append((avc.vma.pgoff, avc.vma, address))
    if len(hits) > 1:
        hits.sort(key=lambda hit: hit[0])
    sched = host.sched
    for _, vma, address in hits:
        if sched.preempt:
            sched.point("cond_resched")
        if not rmap_one(vma, address) or (done is not None and done()):
            break
    if not locked:
        rwsem.read_unlock()
    return True


def _rmap_walk_file(
    host: HostMm, head: int, rmap_one: Callable[[VmArea, int], bool], *, locked: bool, try_lock: bool,
    done: Callable[[], bool] | None,
) -> bool:
    """rmap_walk of a locked folio of the page cache, over its file's mappings."""
    mapping: AddressSpace | None = host.pages.mapping.get(head)
    if mapping is None:
        return True
    if not locked and not mapping.i_mmap_rwsem.read_trylock():
        if try_lock:
            return False
        mapping.i_mmap_rwsem.read_lock()
    index = host.pages.index[head]
    sched = host.sched
    for vma in vmas_of_pages(mapping, index, index + folio_nr_pages(host.pages, head) - 1):
        if sched.preempt:
            sched.point("cond_resched")
        # The first page of the folio that this VMA has.
        address = vma.start + (max(index, vma.pgoff) - vma.pgoff << 12)
        if not rmap_one(vma, address) or (done is not None and done()):
            break
    if not locked:
        mapping.i_mmap_rwsem.read_unlock()
    return True


class _Referenced:
    __slots__ = ("host", "mapcount", "memcg", "pfn", "referenced", "vm_flags")

    def __init__(self, host: HostMm, pfn: int, memcg: MemCgroup | None) -> None:
        self.host = host
        self.memcg = memcg
        self.pfn = pfn
        self.mapcount = folio_mapcount(host.pages, pfn)
        self.referenced = 0
        self.vm_flags = 0

    def one(self, vma: VmArea, address: int) -> bool:
        """folio_referenced_one, where invalid_folio_referenced_vma does not forbid it."""
        host, pfn, mm = self.host, self.pfn, vma.mm
        if vma.flags & (VM_SEQ_READ | VM_RAND_READ):
            return True
        if self.memcg is not None and mm.process.memcg is not self.memcg:
            # Reclaim for one group does not ask other groups.
            return True
        pages = host.pages
        walk = PageVmaMappedWalk(host, pfn, vma, address)
        referenced = entries = 0
        while walk.next():
            if vma.flags & VM_LOCKED:
                entries += 1
                self.mapcount -= 1
                # Only a folio that the VMA maps as a whole, seen under one lock, is locked.
                if walk.pte and (entries != walk.nr_pages or walk.crossed):
                    continue
                # Restore the mlock that got missed.
                host.lru.mlock.mlock_vma_folio(pfn, vma)
                walk.done()
                self.vm_flags |= VM_LOCKED
                return False
            exiting = mm.mm_users == 0 or mm.flags & MMF_UNSTABLE
            swapbacked = pages.flags[pfn] & (PG_anon | PG_swapbacked) == PG_anon | PG_swapbacked
            if exiting and swapbacked and not folio_maybe_mapped_shared(pages, pfn):
                walk.done()
                self.referenced = -1
                return False
            if host.lru_gen_enabled and walk.pte:
                young = int(host.gens.look_around(pfn, vma, walk.address, walk.pte))
            elif walk.pte:
                young = _ptep_clear_flush_young_notify(mm, walk.address, walk.pte)
            else:
                young = _pmdp_clear_flush_young_notify(mm, walk.address, walk.pmd)
            referenced += bool(young)
            self.mapcount -= 1
        if referenced:
            pages.flags[pfn] &= ~PG_idle
        if pages.flags[pfn] & PG_young:
            pages.flags[pfn] &= ~PG_young
            referenced += 1
        if referenced:
            self.referenced += 1
            self.vm_flags |= vma.flags & ~VM_LOCKED
        return self.mapcount != 0


def _ptep_clear_flush_young_notify(mm: MmStruct, address: int, pte: int) -> int:
    young = int(ptep_test_and_clear_young(mm, address, pte))
    return young | mmu_notifier.mmu_notifier_clear_flush_young(mm, address, address + 4096)


def _pmdp_clear_flush_young_notify(mm: MmStruct, address: int, pmd: int) -> int:
    young = int(pmdp_test_and_clear_young(mm, address, pmd))
    return young | mmu_notifier.mmu_notifier_clear_flush_young(mm, address, address + PMD_SIZE)


def folio_referenced(
    host: HostMm, pfn: int, *, is_locked: bool = False, memcg: MemCgroup | None = None
) -> tuple[int, int]:
    """How many mappings, of `memcg` if given, used the page since last asked, and their VM flags.

    What is counted is cleared. -1: the lock was contended, or only an exiting process maps the page. A
    KSM page or a file's is walked under its folio lock, which is the caller's (`is_locked`) or tried; who
    has it now is using the page.
    """
    walk = _Referenced(host, pfn, memcg)
    if not walk.mapcount or pfn not in host.pages.mapping:
        return 0, 0
    we_lock = not is_locked and (bool(host.pages.flags[pfn] & PG_ksm) or not host.pages.flags[pfn] & PG_anon)
    if we_lock and not folio_trylock(host, pfn):
        return 1, 0
    walked = rmap_walk(host, pfn, walk.one, try_lock=True)
    if we_lock:
        folio_unlock(host, pfn)
    return walk.referenced if walked else -1, walk.vm_flags

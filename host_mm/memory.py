"""Page faults: from handle_mm_fault to a present entry.

Source of truth: mm/memory.c (handle_mm_fault, handle_pte_fault, do_anonymous_page, do_wp_page,
wp_can_reuse_anon_folio, wp_page_reuse, wp_page_copy), mm/internal.h: vmf_anon_prepare;
Linux 6.18. Swap faults are in swapin.py, zapping in memory_zap.py, fork's copy in memory_copy.py.

A read of an empty entry maps the zero page; a write takes a page of its own, which is exclusive and
stays so until fork shares it. A write to a shared page copies it: the copy is made before the bracket
opens, and under the page-table lock the old entry is cleared and flushed before the new one is set.

Faults on files are in memory_file.py, on huge pages in huge_memory.py.

Hinting faults of NUMA balancing are in numa_balancing.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_SOFT_DIRTY,
    _PAGE_SPECIAL,
    _PAGE_UFFD_WP,
    PTE_MARKER_GUARD,
    PTE_MARKER_POISONED,
    PTE_MARKER_UFFD_WP,
    is_pte_marker,
    is_swap_pmd,
    mk_pte,
    pmd_trans_huge,
    pte_marker_get,
    pte_mkdirty,
    pte_mkuffd_wp,
    pte_mkwrite,
    pte_mkyoung,
    pte_pfn,
    pte_present,
    pte_protnone,
    pte_write,
)
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.huge_memory import handle_huge_pmd
from host_mm.hugetlb_fault import hugetlb_fault
from host_mm.kernel.costs import COST_COPY_PAGE, COST_FAULT
from host_mm.ksm_types import ksm_might_unmap_zero_page
from host_mm.mm_types import (
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    MM_ANONPAGES,
    MMF_UNSTABLE,
    VM_ACCESS_FLAGS,
    VM_FAULT_HWPOISON,
    VM_FAULT_MAJOR,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
    VM_HUGETLB,
    VM_MAYSHARE,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
    VmFault,
)
from host_mm.page import (
    PG_anon,
    PG_anon_exclusive,
    PG_ksm,
    PG_lru,
    PG_swapcache,
    PG_uptodate,
    folio_mapcount,
    folio_maybe_mapped_shared,
    folio_test_large,
    get_page,
    mm_counter,
    page_folio,
    put_page,
)
from host_mm.page_alloc import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_ZERO
from host_mm.pgtable_generic import (
    pmd_alloc,
    pte_alloc,
    pte_clear,
    pte_lockptr,
    pte_offset_map,
    pte_offset_map_lock,
    ptep_clear_flush,
    ptep_get,
    ptep_set_access_flags,
    set_pte,
)
from host_mm.pgtable_huge import pmdp_get
from host_mm.rmap import (
    anon_vma_prepare,
    folio_add_new_anon_rmap,
    folio_move_anon_rmap,
    folio_remove_rmap_pte,
)
from host_mm.swap_state import folio_free_swap, free_swap_cache
from host_mm.userfaultfd_k import handle_userfault, userfaultfd_pte_wp, userfaultfd_wp_async
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea

__all__ = [
    "TRACEPOINTS", "do_wp_page", "folio_alloc", "folio_prealloc", "handle_mm_fault", "is_zero_pfn",
    "map_locked", "maybe_mkwrite", "vm_normal_page", "vmf_orig_pte_uffd_wp", "wp_page_reuse",
]

_RET = (
    (VM_FAULT_OOM, "oom"), (VM_FAULT_SIGBUS, "sigbus"), (VM_FAULT_SIGSEGV, "sigsegv"),
    (VM_FAULT_RETRY, "retry"), (VM_FAULT_MAJOR, "major"),
)


def _describe(ret: int) -> str:
    return "|".join(name for bit, name in _RET if ret & bit) or "ok"


HOST_FAULT = Tracepoint(
    "refault", "host_fault", ("pid", "address", "access"),
    lambda pid, address, access: f"pid {pid} address {address:#x} {access}",
    scope=True, doc="The host resolves a fault on its own page tables, for a user access or for GUP.",
)
HOST_FAULT_DONE = Tracepoint(
    "refault", "host_fault_done", ("pid", "address", "kind", "result"),
    lambda pid, address, kind, result: f"pid {pid} address {address:#x} {kind} {result}",
    doc="What that fault did: zero-page, anon, cow, reuse, swap-in, numa, numa-migrate, userfault, marker, "
        "spurious.",
)
TRACEPOINTS = (HOST_FAULT, HOST_FAULT_DONE)


def is_zero_pfn(host: HostMm, pfn: int) -> bool:
    """Whether the frame is the zero page."""
    return pfn == host.zero_pfn


def vm_normal_page(host: HostMm, pte: int) -> int:
    """The frame of a present entry if a struct page counts its mappings, else -1 (zero page, PFNMAP)."""
    if pte & _PAGE_SPECIAL:
        return -1
    pfn = pte_pfn(pte)
    return -1 if pfn == host.zero_pfn else pfn


def maybe_mkwrite(pte: int, vma: VmArea) -> int:
    """Writable if the VMA is (a forced COW in a read-only VMA stays read-only)."""
    return pte_mkwrite(pte) if vma.flags & VM_WRITE else pte


def folio_prealloc(host: HostMm, vma: VmArea, *, zero: bool) -> int:
    """A page for this VMA by its memory policy, charged to its process's memory cgroup, or -1."""
    pfn = folio_alloc(host, vma, zero=zero)
    if pfn >= 0 and vma.mm.process.memcg is not None and host.memcg.charge(pfn, vma.mm):
        put_page(host, pfn)
        return -1
    return pfn


def folio_alloc(host: HostMm, vma: VmArea, *, zero: bool) -> int:
    """A page for this VMA by its memory policy that is not charged yet, or -1."""
    nid = vma.policy.preferred_node() if vma.policy is not None else host.numa_node_id(vma.mm.process)
    pfn = host.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_COMP | (GFP_ZERO if zero else 0), 0, nid)
    if pfn >= 0:
        host.pages.flags[pfn] |= PG_uptodate
    return pfn


# -- entry ----------------------------------------------------------------------------------------
def handle_mm_fault(vma: VmArea, address: int, flags: int) -> int:
    """Resolve one fault under mmap_lock; VM_FAULT_* bits. VM_FAULT_RETRY may have dropped the lock.

    The VMA's rights were checked by the caller, but for an instruction fetch of a VMA without VM_EXEC
    and other misuse, which is VM_FAULT_SIGSEGV.
    """
    mm = vma.mm
    host = mm.host
    host.sched.advance(COST_FAULT)
    ctx = host.stream.ctx
    saved = ctx.cause
    if (t := host.trace.host_fault) is not None:
        access = "unshare" if flags & FAULT_FLAG_UNSHARE else "read"
        access = "write" if flags & FAULT_FLAG_WRITE else access
        ctx.cause = t(mm.process.pid, address & ~0xFFF, access)
    recency = host.lru_gen_enabled and not vma.flags & (VM_SEQ_READ | VM_RAND_READ)
    if recency:
        host.gens.in_fault.add(host.sched.current)
    try:
        if vma.flags & VM_HUGETLB:
            kind, ret = hugetlb_fault(vma, address, flags)
        else:
            kind, ret = _handle_pte_fault(VmFault(vma, address, flags))
        if not ret & VM_FAULT_RETRY:
            host.vmstat["pgfault"] += 1
        if (t := host.trace.host_fault_done) is not None:
            t(mm.process.pid, address & ~0xFFF, kind, _describe(ret))
        return ret
    finally:
        if recency:
            host.gens.in_fault.discard(host.sched.current)
        ctx.cause = saved


def _handle_pte_fault(vmf: VmFault) -> tuple[str, int]:
    mm = vmf.mm
    vmf.pmd = pmd_alloc(mm, vmf.address)
    if not vmf.pmd:
        return "table", VM_FAULT_OOM
    huge = handle_huge_pmd(vmf)
    if huge is not None:
        return huge
    if pmd_trans_huge(pmdp_get(mm, vmf.pmd)) or is_swap_pmd(pmdp_get(mm, vmf.pmd)):
        # Somebody put a huge page there meanwhile: try again.
        return "spurious", 0
    vmf.pte = pte_offset_map(mm, vmf.pmd, vmf.address)
    if vmf.pte:
        vmf.orig_pte = ptep_get(mm, vmf.pte)
    if not vmf.pte or not vmf.orig_pte:
        vmf.orig_pte = 0
        return _do_pte_missing(vmf)
    entry = vmf.orig_pte
    if is_pte_marker(entry):
        return _handle_pte_marker(vmf)
    if not pte_present(entry):
        return "swap-in", mm.host.do_swap_page(vmf)
    if pte_protnone(entry) and vmf.vma.flags & VM_ACCESS_FLAGS:
        return mm.host.do_numa_page(vmf)
    return _handle_present(vmf, entry)


def _do_pte_missing(vmf: VmFault) -> tuple[str, int]:
    if vmf.vma.ops is not None:
        return "file", vmf.mm.host.do_fault(vmf)
    return _do_anonymous_page(vmf)


def _handle_pte_marker(vmf: VmFault) -> tuple[str, int]:
    """A page that is not there, with something to say about it."""
    marker = pte_marker_get(vmf.orig_pte)
    if marker & PTE_MARKER_POISONED:
        return "marker", VM_FAULT_HWPOISON
    if marker & PTE_MARKER_GUARD:
        return "marker", VM_FAULT_SIGSEGV
    if vmf.vma.flags & VM_UFFD_WP:
        return _do_pte_missing(vmf)
    # A range that is not registered any more.
    if map_locked(vmf):
        pte_clear(vmf.mm, vmf.address, vmf.pte)
        assert vmf.ptl is not None
        vmf.ptl.unlock()
    return "marker", 0


def vmf_orig_pte_uffd_wp(vmf: VmFault) -> bool:
    """Whether the page that comes now was write-protected before it was there."""
    return bool(vmf.vma.flags & VM_UFFD_WP) and bool(pte_marker_get(vmf.orig_pte) & PTE_MARKER_UFFD_WP)


def _handle_present(vmf: VmFault, entry: int) -> tuple[str, int]:
    mm = vmf.mm
    if mm.host.sched.preempt:
        mm.host.sched.point("pte")
    vmf.ptl = pte_lockptr(mm, vmf.pte)
    vmf.ptl.lock()
    if ptep_get(mm, vmf.pte) != entry:
        vmf.ptl.unlock()
        return "spurious", 0
    if vmf.flags & (FAULT_FLAG_WRITE | FAULT_FLAG_UNSHARE):
        if not pte_write(entry):
            return do_wp_page(vmf)
        if vmf.flags & FAULT_FLAG_WRITE:
            entry = pte_mkdirty(entry)
    # For a read nothing is stored: on x86 the CPU sets the accessed bit.
    write = bool(vmf.flags & FAULT_FLAG_WRITE)
    changed = ptep_set_access_flags(mm, vmf.address, vmf.pte, pte_mkyoung(entry), write)
    vmf.ptl.unlock()
    return ("access-flags" if changed and write else "spurious"), 0


# -- anonymous pages ------------------------------------------------------------------------------
def map_locked(vmf: VmFault) -> bool:
    """Lock the entry; false if it is not the one the fault started from, and then nothing is locked."""
    pte = pte_offset_map_lock(vmf.mm, vmf.pmd, vmf.address)
    if not pte:
        return False
    vmf.pte = pte
    vmf.ptl = pte_lockptr(vmf.mm, pte)
    if ptep_get(vmf.mm, pte) == vmf.orig_pte:
        return True
    vmf.ptl.unlock()
    return False


def _do_anonymous_page(vmf: VmFault) -> tuple[str, int]:
    vma, mm = vmf.vma, vmf.mm
    host = mm.host
    if vma.flags & VM_SHARED:
        return "anon", VM_FAULT_SIGBUS
    if not pte_alloc(mm, vmf.pmd):
        return "anon", VM_FAULT_OOM
    if not vmf.flags & FAULT_FLAG_WRITE:
        if not map_locked(vmf):
            return "spurious", 0
        assert vmf.ptl is not None
        ret = VM_FAULT_SIGBUS if mm.flags & MMF_UNSTABLE else 0
        if not ret and vma.flags & VM_UFFD_MISSING:
            vmf.ptl.unlock()
            return "userfault", handle_userfault(vmf, VM_UFFD_MISSING)
        if not ret:
            entry = mk_pte(host.zero_pfn, vma.page_prot) | _PAGE_SPECIAL
            set_pte(mm, vmf.address, vmf.pte, pte_mkuffd_wp(entry) if vmf_orig_pte_uffd_wp(vmf) else entry)
        vmf.ptl.unlock()
        return "zero-page", ret
    anon_vma_prepare(vma)
    pfn = folio_prealloc(host, vma, zero=True)
    if pfn < 0:
        return "anon", VM_FAULT_OOM
    entry = pte_mkyoung(mk_pte(pfn, vma.page_prot))
    if vma.flags & VM_WRITE:
        entry = pte_mkwrite(pte_mkdirty(entry))
    if not map_locked(vmf):
        put_page(host, pfn)
        return "spurious", 0
    assert vmf.ptl is not None
    if mm.flags & MMF_UNSTABLE:
        vmf.ptl.unlock()
        put_page(host, pfn)
        return "anon", VM_FAULT_SIGBUS
    if vma.flags & VM_UFFD_MISSING:
        vmf.ptl.unlock()
        put_page(host, pfn)
        return "userfault", handle_userfault(vmf, VM_UFFD_MISSING)
    if vmf_orig_pte_uffd_wp(vmf):
        entry = pte_mkuffd_wp(entry)
    mm.rss[MM_ANONPAGES] += 1
    folio_add_new_anon_rmap(host, pfn, vma, vmf.address)
    host.lru.folio_add_lru_vma(pfn, vma)
    set_pte(mm, vmf.address, vmf.pte, entry)
    vmf.ptl.unlock()
    return "anon", 0


# -- write faults on mapped pages -----------------------------------------------------------------
def do_wp_page(vmf: VmFault) -> tuple[str, int]:
    """A write (or unshare) on a read-only entry, its table locked; the lock is dropped on return."""
    vma, host = vmf.vma, vmf.mm.host
    assert vmf.ptl is not None
    if vma.flags & VM_UFFD_WP and not vmf.flags & FAULT_FLAG_UNSHARE and _userfaultfd_wp(vmf):
        vmf.ptl.unlock()
        return "userfault", handle_userfault(vmf, VM_UFFD_WP)
    pfn = vm_normal_page(host, vmf.orig_pte)
    vmf.page = pfn
    if vma.flags & (VM_SHARED | VM_MAYSHARE):
        return "shared", host.wp_page_shared(vmf)
    anon = pfn >= 0 and host.pages.flags[page_folio(host.pages, pfn)] & PG_anon
    if anon and _may_reuse(host, vma, pfn):
        if vmf.flags & FAULT_FLAG_UNSHARE:
            vmf.ptl.unlock()
            return "reuse", 0
        wp_page_reuse(vmf)
        return "reuse", 0
    if pfn >= 0:
        get_page(host, pfn)
        if host.pages.flags[pfn] & PG_ksm:
            host.vmstat["cow_ksm"] += 1
    vmf.ptl.unlock()
    return "cow", _wp_page_copy(vmf)


def _userfaultfd_wp(vmf: VmFault) -> bool:
    """Whether the write is userfaultfd's business. In asynchronous mode it just lifts the protection."""
    mm = vmf.mm
    entry = ptep_get(mm, vmf.pte)
    if userfaultfd_pte_wp(vmf.vma, entry):
        if not userfaultfd_wp_async(vmf.vma):
            return True
        vmf.orig_pte = entry & ~_PAGE_UFFD_WP
        set_pte(mm, vmf.address, vmf.pte, vmf.orig_pte)
    if _tlb.mm_tlb_flush_pending(mm):
        # The protection's flush may still be to come, and the copy would miss what is written till then.
        _tlb.flush_tlb_page(mm, vmf.address)
    return False


def _may_reuse(host: HostMm, vma: VmArea, pfn: int) -> bool:
    flags = host.pages.flags
    if not host.profile.anon_exclusive:
        return _nobody_else_refers(host, pfn)
    if flags[pfn] & PG_anon_exclusive:
        return True
    if _wp_can_reuse_anon_folio(host, vma, pfn):
        flags[pfn] |= PG_anon_exclusive
        return True
    return False


def _nobody_else_refers(host: HostMm, pfn: int) -> bool:
    """Linux 5.10's do_wp_page: any reference beside the entry's, even the swap cache's, means a copy."""
    pages = host.pages
    if pages.flags[pfn] & PG_ksm or pages.refcount[pfn] != 1 or not folio_trylock(host, pfn):
        return False
    alone = not pages.flags[pfn] & PG_ksm and pages.mapcount[pfn] == 1 and pages.refcount[pfn] == 1
    folio_unlock(host, pfn)
    return alone


def _wp_can_reuse_anon_folio(host: HostMm, vma: VmArea, pfn: int) -> bool:
    """Whether this entry holds the only reference, the swap cache's and an LRU batch's apart."""
    pages = host.pages
    folio = page_folio(pages, pfn)
    if folio_test_large(pages, folio):
        # All references are entries of this address space. A last one is copied, to have the rest freed.
        mapcount = folio_mapcount(pages, folio)
        return 1 < mapcount == pages.refcount[folio] and not folio_maybe_mapped_shared(pages, folio)
    if pages.flags[pfn] & PG_ksm or pages.refcount[pfn] > 3:
        return False
    if not pages.flags[pfn] & PG_lru:
        host.lru.lru_add_drain()
    if pages.refcount[pfn] > 1 + bool(pages.flags[pfn] & PG_swapcache):
        return False
    if not folio_trylock(host, pfn):
        return False
    if pages.flags[pfn] & PG_swapcache:
        folio_free_swap(host, pfn)
    alone = not pages.flags[pfn] & PG_ksm and pages.refcount[pfn] == 1
    if alone:
        folio_move_anon_rmap(host, pfn, vma)
    folio_unlock(host, pfn)
    return alone


def wp_page_reuse(vmf: VmFault) -> None:
    """Make the entry writable: no flush on x86, no bracket."""
    entry = maybe_mkwrite(pte_mkdirty(pte_mkyoung(vmf.orig_pte)), vmf.vma)
    ptep_set_access_flags(vmf.mm, vmf.address, vmf.pte, entry, True)
    assert vmf.ptl is not None
    vmf.ptl.unlock()
    vmf.mm.host.vmstat["pgreuse"] += 1


def _wp_page_copy(vmf: VmFault) -> int:
    vma, mm, old = vmf.vma, vmf.mm, vmf.page
    host = mm.host
    anon_vma_prepare(vma)
    zero = is_zero_pfn(host, pte_pfn(vmf.orig_pte))
    new = folio_prealloc(host, vma, zero=zero)
    if new < 0:
        if old >= 0:
            put_page(host, old)
        return VM_FAULT_OOM
    if not zero:
        host.ram.copy_page(new, pte_pfn(vmf.orig_pte))
        host.sched.advance(COST_COPY_PAGE)
    range_ = mmu_notifier.mmu_notifier_range_init(
        mmu_notifier.MMU_NOTIFY_CLEAR, mm, vmf.address, vmf.address + 4096, order=mmu_notifier.ORDER_UNDER_PTL
    )
    mmu_notifier.mmu_notifier_invalidate_range_start(range_)
    if host.sched.preempt:
        host.sched.point("pte")
    copied = _install_copy(vmf, new)
    mmu_notifier.mmu_notifier_invalidate_range_only_end(range_)
    if not copied:
        put_page(host, new)
    elif old >= 0:
        # The reference that the old entry held, given up with it.
        put_page(host, old)
    if old >= 0:
        if copied and host.profile.cow_frees_swap_cache:
            free_swap_cache(host, old)
        put_page(host, old)
    return 0


def _install_copy(vmf: VmFault, new: int) -> bool:
    """The half of wp_page_copy under the page-table lock: recheck, clear, flush, set."""
    vma, mm, old = vmf.vma, vmf.mm, vmf.page
    host = mm.host
    vmf.pte = pte_offset_map_lock(mm, vmf.pmd, vmf.address)
    if not vmf.pte:
        return False
    vmf.ptl = pte_lockptr(mm, vmf.pte)
    if ptep_get(mm, vmf.pte) != vmf.orig_pte and "no-fault-recheck" not in host.breaks:
        vmf.ptl.unlock()
        return False
    if old < 0:
        ksm_might_unmap_zero_page(mm, vmf.orig_pte)
        mm.rss[MM_ANONPAGES] += 1
    elif not host.pages.flags[page_folio(host.pages, old)] & PG_anon:
        mm.rss[mm_counter(host.pages, page_folio(host.pages, old))] -= 1
        mm.rss[MM_ANONPAGES] += 1
    entry = pte_mkyoung(mk_pte(new, vma.page_prot))
    if vmf.flags & FAULT_FLAG_UNSHARE:
        entry |= vmf.orig_pte & (_PAGE_SOFT_DIRTY | _PAGE_UFFD_WP)
    else:
        entry = maybe_mkwrite(pte_mkdirty(entry), vma)
    late_flush = "cow-flush-after-unlock" in host.breaks
    if not late_flush:
        ptep_clear_flush(mm, vmf.address, vmf.pte)
    mmu_notifier.mmu_notifier_invalidate_range(mm, vmf.address, vmf.address + 4096)
    folio_add_new_anon_rmap(host, new, vma, vmf.address)
    host.lru.folio_add_lru_vma(new, vma)
    mmu_notifier.mmu_notifier_change_pte(mm, vmf.address, entry)
    set_pte(mm, vmf.address, vmf.pte, entry)
    if old >= 0:
        # Only now: whoever saw one mapping less could reuse a page that this entry still reached.
        folio_remove_rmap_pte(host, old, vma)
    host.vmstat["cow_break"] += 1
    vmf.ptl.unlock()
    if late_flush:
        _tlb.flush_tlb_page(mm, vmf.address)
    return True


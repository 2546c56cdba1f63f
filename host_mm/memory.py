"""Page faults: from handle_mm_fault to a present entry.

Source of truth: mm/memory.c (handle_mm_fault, handle_pte_fault, do_anonymous_page), mm/internal.h:
vmf_anon_prepare; Linux 6.18. Writes to what is mapped read-only are in memory_wp.py, swap faults in
swapin.py, zapping in memory_zap.py, fork's copy in memory_copy.py.

A read of an empty entry maps the zero page; a write takes a page of its own, which is exclusive and
stays so until fork shares it.

Faults on files are in memory_file.py, on huge pages in huge_memory.py.

Hinting faults of NUMA balancing are in numa_balancing.py.

Not modelled: anonymous folios between one page and a huge page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_SPECIAL,
    is_swap_pmd,
    mk_pte,
    pmd_trans_huge,
    pte_mkdirty,
    pte_mkuffd_wp,
    pte_mkwrite,
    pte_mkyoung,
    pte_present,
    pte_protnone,
    pte_write,
)
from host_mm.arch.x86.swapops import (
    PTE_MARKER_GUARD,
    PTE_MARKER_POISONED,
    PTE_MARKER_UFFD_WP,
    is_pte_marker,
    pte_marker_get,
)
from host_mm.huge_memory import handle_huge_pmd
from host_mm.hugetlb_fault import hugetlb_fault
from host_mm.kernel.costs import COST_FAULT
from host_mm.memory_folio import folio_prealloc
from host_mm.memory_wp import do_wp_page
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
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
    VmFault,
)
from host_mm.page import (
    put_page,
)
from host_mm.pgtable_generic import (
    pmd_alloc,
    pte_alloc,
    pte_clear,
    pte_lockptr,
    pte_offset_map,
    pte_offset_map_lock,
    ptep_get,
    ptep_set_access_flags,
    set_pte,
)
from host_mm.pgtable_huge import pmdp_get
from host_mm.rmap import folio_add_new_anon_rmap
from host_mm.rmap_anon_vma import anon_vma_prepare
from host_mm.userfaultfd_k import handle_userfault
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea

__all__ = ["TRACEPOINTS", "handle_mm_fault", "map_locked", "vmf_orig_pte_uffd_wp"]

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

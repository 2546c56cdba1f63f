"""From a guest frame to a host frame: KVM's use of get_user_pages.

Source of truth: virt/kvm/kvm_main.c (Linux 6.18): __kvm_faultin_pfn, kvm_follow_pfn, hva_to_pfn,
hva_to_pfn_fast, hva_to_pfn_slow, hva_to_pfn_remapped, kvm_release_page_*; include/linux/kvm_host.h:
kvm_release_faultin_page.

Not modelled: pinning, the memory type of MMIO frames.
"""

from __future__ import annotations

from errno import EAGAIN, EINTR
from typing import TYPE_CHECKING

from host_mm.gup import (
    FOLL_HONOR_NUMA_FAULT,
    FOLL_HWPOISON,
    FOLL_NOWAIT,
    FOLL_WRITE,
    get_user_page_fast_only,
    get_user_pages_unlocked,
)
from host_mm.kernel.errors import EHWPOISON
from host_mm.memory_pfnmap import fixup_user_fault, follow_pfnmap_end, follow_pfnmap_start
from host_mm.mm_types import VM_IO, VM_PFNMAP, VM_READ, VM_WRITE
from host_mm.page import PG_reserved, get_page, put_page, set_page_dirty
from kvm_model.memslots import KVM_MEM_READONLY, KVM_MEMSLOT_INVALID, KvmMemorySlot
from kvm_model.mmu.mmu_internal import (
    KVM_PFN_ERR_FAULT,
    KVM_PFN_ERR_HWPOISON,
    KVM_PFN_ERR_NEEDS_IO,
    KVM_PFN_ERR_RO_FAULT,
    KVM_PFN_ERR_SIGPENDING,
    KVM_PFN_NOSLOT,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea
    from kvm_model.kvm_main import Kvm

__all__ = [
    "TRACEPOINTS", "KvmFollowPfn", "hva_to_pfn", "kvm_faultin_pfn", "kvm_release_faultin_page",
    "kvm_release_page_clean", "kvm_release_page_dirty",
]

_ERRORS = {
    KVM_PFN_ERR_FAULT: "fault", KVM_PFN_ERR_HWPOISON: "hwpoison", KVM_PFN_ERR_RO_FAULT: "read-only",
    KVM_PFN_ERR_SIGPENDING: "signal", KVM_PFN_ERR_NEEDS_IO: "needs-io", KVM_PFN_NOSLOT: "no-slot",
}

GUP_ANSWER = Tracepoint(
    "refault", "gup_answer", ("gfn", "hva", "write", "answer", "pfn", "writable"),
    lambda gfn, hva, write, answer, pfn, writable:
        f"gfn {gfn:x} hva {hva:#x} {'write' if write else 'read'}: {answer}"
        + (f" pfn {pfn:x}{' writable' if writable else ''}" if pfn >= 0 else ""),
    doc="What get_user_pages answered KVM; pfn is -1 where it gave none.",
)
TRACEPOINTS = (GUP_ANSWER,)


class KvmFollowPfn:
    """struct kvm_follow_pfn. `try_writable`: a read may come back writable; `refcounted_page` -1: none."""

    __slots__ = ("flags", "gfn", "how", "hva", "map_writable", "refcounted_page", "slot", "try_writable")

    def __init__(self, slot: KvmMemorySlot | None, gfn: int, flags: int, *, hva: int = 0) -> None:
        self.slot = slot
        self.gfn = gfn
        self.flags = flags
        self.hva = hva
        self.try_writable = True
        self.map_writable = False
        self.refcounted_page = -1
        self.how = ""

    def resolve(self, pfn: int, writable: bool, how: str) -> int:
        """kvm_resolve_pfn."""
        if self.try_writable:
            self.map_writable = writable
        self.refcounted_page = pfn
        self.how = how
        return pfn


    def resolve_remapped(self, pfn: int, writable: bool) -> int:
        """kvm_resolve_pfn of a frame without a struct page: nothing to release later."""
        self.resolve(pfn, writable, "remapped")
        self.refcounted_page = -1
        return pfn


def _hva_to_pfn_slow(kvm: Kvm, kfp: KvmFollowPfn) -> int:
    mm = kvm.mm
    flags = FOLL_HWPOISON | FOLL_HONOR_NUMA_FAULT | kfp.flags
    pfn = get_user_pages_unlocked(mm, kfp.hva, flags)
    if pfn < 0:
        return pfn
    writable = flags & FOLL_WRITE != 0
    if not writable and kfp.try_writable:
        wpfn = get_user_page_fast_only(mm, kfp.hva, FOLL_WRITE)
        if wpfn >= 0:
            put_page(kvm.host, pfn)
            pfn = wpfn
            writable = True
    return kfp.resolve(pfn, writable, "slow")


def hva_to_pfn(kvm: Kvm, kfp: KvmFollowPfn) -> int:
    """The frame behind `kfp.hva`, with a reference, or a KVM_PFN_ERR_*. May sleep unless FOLL_NOWAIT."""
    if kfp.flags & FOLL_WRITE or kfp.try_writable:
        pfn = get_user_page_fast_only(kvm.mm, kfp.hva, FOLL_WRITE)
        if pfn >= 0:
            return kfp.resolve(pfn, True, "fast")
    pfn = _hva_to_pfn_slow(kvm, kfp)
    if pfn >= 0:
        return pfn
    nowait = kfp.flags & FOLL_NOWAIT != 0
    if pfn == -EINTR or (pfn == -EAGAIN and not nowait):
        return KVM_PFN_ERR_SIGPENDING
    if pfn == -EHWPOISON:
        return KVM_PFN_ERR_HWPOISON
    mm = kvm.mm
    mm.mmap_lock.read_lock()
    vma = mm.vma_lookup(kfp.hva)
    if vma is not None and vma.flags & (VM_IO | VM_PFNMAP):
        pfn = _hva_to_pfn_remapped(kvm, vma, kfp)
    else:
        need = VM_READ | VM_WRITE if kfp.flags & FOLL_WRITE else VM_READ
        ok = vma is not None and vma.flags & need == need
        pfn = KVM_PFN_ERR_NEEDS_IO if nowait and ok else KVM_PFN_ERR_FAULT
    mm.mmap_lock.read_unlock()
    return pfn


def _hva_to_pfn_remapped(kvm: Kvm, vma: VmArea, kfp: KvmFollowPfn) -> int:
    """A mapping of raw frames: what its entry says, faulted in once if need be. No reference is taken.

    Only the notifier tells when the frame is taken back, and the retry check that it was not yet.
    """
    write = kfp.flags & FOLL_WRITE != 0
    args = follow_pfnmap_start(vma, kfp.hva)
    if args is None:
        if fixup_user_fault(vma.mm, kfp.hva, write=write):
            return KVM_PFN_ERR_FAULT
        args = follow_pfnmap_start(vma, kfp.hva)
        if args is None:
            return KVM_PFN_ERR_FAULT
    if write and not args.writable:
        pfn = KVM_PFN_ERR_RO_FAULT
    else:
        pfn = kfp.resolve_remapped(args.pfn, args.writable)
        if "pfnmap-take-ref" in kvm.breaks:
            get_page(kvm.host, pfn)
            kfp.refcounted_page = pfn
    follow_pfnmap_end(args)
    return pfn


def _kvm_follow_pfn(kvm: Kvm, kfp: KvmFollowPfn) -> int:
    slot = kfp.slot
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
        return KVM_PFN_NOSLOT
    if slot.flags & KVM_MEM_READONLY:
        if kfp.flags & FOLL_WRITE:
            return KVM_PFN_ERR_RO_FAULT
        kfp.try_writable = False
    kfp.hva = slot.gfn_to_hva(kfp.gfn)
    return hva_to_pfn(kvm, kfp)


def kvm_faultin_pfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int, foll: int) -> tuple[int, bool, int]:
    """__kvm_faultin_pfn: (pfn or KVM_PFN_ERR_*, map_writable, pfn whose reference is held or -1)."""
    kfp = KvmFollowPfn(slot, gfn, foll)
    pfn = _kvm_follow_pfn(kvm, kfp)
    if (t := kvm.trace.gup_answer) is not None:
        got = pfn not in _ERRORS
        answer = kfp.how if got else _ERRORS[pfn]
        t(gfn, kfp.hva, foll & FOLL_WRITE != 0, answer, pfn if got else -1, kfp.map_writable)
    return pfn, kfp.map_writable, kfp.refcounted_page


def kvm_release_page_clean(kvm: Kvm, pfn: int) -> None:
    """Drop the reference to a page that was read: it was accessed."""
    if not kvm.host.pages.flags[pfn] & PG_reserved:
        kvm.host.mark_page_accessed(pfn)
    put_page(kvm.host, pfn)


def kvm_release_page_dirty(kvm: Kvm, pfn: int) -> None:
    """Drop the reference to a page that may be written from now on: it is dirty."""
    if "drop-ad" not in kvm.breaks and not kvm.host.pages.flags[pfn] & PG_reserved:
        set_page_dirty(kvm.host, pfn)
    kvm_release_page_clean(kvm, pfn)


def kvm_release_faultin_page(kvm: Kvm, pfn: int, *, unused: bool, dirty: bool) -> None:
    """Drop a fault's reference, still under mmu_lock unless `unused`.

    This is the only time KVM marks the page: from here on only notifiers keep the mapping right.
    """
    if pfn < 0:
        return
    if unused:
        put_page(kvm.host, pfn)
    elif dirty:
        kvm_release_page_dirty(kvm, pfn)
    else:
        kvm_release_page_clean(kvm, pfn)

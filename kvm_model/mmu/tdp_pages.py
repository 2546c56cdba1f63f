"""Table pages and roots of the TDP MMU: made, walked, referenced, given back.

Source of truth: arch/x86/kvm/mmu/tdp_mmu.c (Linux 6.18): tdp_mmu_init_sp, tdp_mmu_init_child_sp,
tdp_mmu_free_sp, kvm_tdp_mmu_alloc_root, kvm_tdp_mmu_put_root, for_each_tdp_mmu_root(_yield_safe);
mmu/spte.h: root_to_sp; mmu/mmutrace.h.

Not modelled: mirror (TDX) roots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.page import put_page
from kvm_model.mmu.mmu_internal import (
    MMU_PAGE_FIELDS,
    ROLE_INVALID,
    KvmMmuPage,
    fmt_mmu_page,
    page_args,
    role_smm,
)
from kvm_model.mmu.spte import (
    SHADOW_NONPRESENT_VALUE,
)
from kvm_model.mmu.tdp_iter import TdpIter
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "TRACEPOINTS", "for_each_tdp_mmu_root", "for_each_tdp_mmu_root_yield_safe", "init_spt", "invalidate_root",
    "kvm_tdp_mmu_alloc_root", "kvm_tdp_mmu_put_root", "root_to_sp", "tdp_mmu_free_sp",
    "tdp_mmu_init_child_sp",
]

_EMPTY_TABLE = SHADOW_NONPRESENT_VALUE.to_bytes(8, "little") * 512

KVM_MMU_GET_PAGE = Tracepoint(
    "kvmmmu", "kvm_mmu_get_page", (*MMU_PAGE_FIELDS, "created"),
    lambda gen, gfn, role, root_count, unsync, created:
        f"{fmt_mmu_page(gen, gfn, role, root_count, unsync)} {'new' if created else 'existing'}",
)
KVM_MMU_PREPARE_ZAP_PAGE = Tracepoint("kvmmmu", "kvm_mmu_prepare_zap_page", MMU_PAGE_FIELDS, fmt_mmu_page)
TRACEPOINTS = (KVM_MMU_GET_PAGE, KVM_MMU_PREPARE_ZAP_PAGE)


def init_spt(kvm: Kvm, pfn: int) -> None:
    """Fill a table page with the non-present value."""
    kvm.ram.b[pfn << 12 : (pfn + 1) << 12] = _EMPTY_TABLE


def tdp_mmu_free_sp(kvm: Kvm, sp: KvmMmuPage) -> None:
    """Give the table page back to the host."""
    kvm.sps.pop(sp.spt, None)
    put_page(kvm.host, sp.spt)


def _tdp_mmu_init_sp(kvm: Kvm, spt: int, ptep: int, gfn: int, role: int) -> KvmMmuPage:
    sp = KvmMmuPage(spt, ptep, gfn, role)
    kvm.sps[spt] = sp
    if (t := kvm.trace.kvm_mmu_get_page) is not None:
        t(*page_args(sp), True)
    return sp


def tdp_mmu_init_child_sp(kvm: Kvm, spt: int, it: TdpIter) -> KvmMmuPage:
    """A table page that is to hang below the iterator's SPTE."""
    return _tdp_mmu_init_sp(kvm, spt, it.sptep, it.gfn, kvm.sps[it.sptep >> 9].role - 1)


def root_to_sp(kvm: Kvm, root_hpa: int) -> KvmMmuPage:
    """The page of a root."""
    return kvm.sps[root_hpa >> 12]


def kvm_tdp_mmu_put_root(kvm: Kvm, root: KvmMmuPage) -> None:
    """Drop a reference; the last one, of an invalid root, frees it."""
    root.root_count -= 1
    if root.root_count:
        return
    if not root.invalid:
        raise BrokenTruth("root-refcount", f"the last reference to a valid root was dropped: {root!r}")
    with kvm.tdp_mmu_pages_lock:
        kvm.tdp_mmu_roots.remove(root)
    kvm.rcu.call_rcu(lambda: tdp_mmu_free_sp(kvm, root))


def for_each_tdp_mmu_root(kvm: Kvm, as_id: int, *, invalid: bool = False) -> Iterator[KvmMmuPage]:
    """The roots of an address space, -1: of all, under mmu_lock for write or RCU: valid ones, or all."""
    for root in tuple(kvm.tdp_mmu_roots):
        if (invalid or not root.invalid) and as_id in (-1, role_smm(root.role)):
            yield root


def for_each_tdp_mmu_root_yield_safe(
    kvm: Kvm, as_id: int = -1, *, invalid: bool = False
) -> Iterator[KvmMmuPage]:
    """The same, each referenced while the body runs, so that it may drop mmu_lock."""
    roots = kvm.tdp_mmu_roots
    position = 0
    while position < len(roots):
        root = roots[position]
        other = as_id not in (-1, role_smm(root.role))
        if (root.invalid and not invalid) or not root.root_count or other:
            position += 1
            continue
        root.root_count += 1
        yield root
        position = roots.index(root) + 1
        last = root.root_count == 1
        kvm_tdp_mmu_put_root(kvm, root)
        position -= last


def kvm_tdp_mmu_alloc_root(vcpu: Vcpu) -> int:
    """Take a reference to the valid root of the vCPU's role, made if there is none; its address."""
    kvm = vcpu.kvm
    role = vcpu.mmu.root_role
    kvm.mmu_lock.read_lock()
    try:
        with kvm.tdp_mmu_pages_lock:
            for root in kvm.tdp_mmu_roots:
                if root.role == role:
                    root.root_count += 1
                    return root.spt << 12
            root = _tdp_mmu_init_sp(kvm, vcpu.mmu_shadow_page_cache.pop(), -1, 0, role)
            # One reference is the vCPU's, the other the MMU's own until the root is invalidated.
            root.root_count = 2
            kvm.tdp_mmu_roots.insert(0, root)
            return root.spt << 12
    finally:
        kvm.mmu_lock.read_unlock()


def invalidate_root(root: KvmMmuPage) -> None:
    """Mark a root invalid; its zap is due."""
    if not root.invalid:
        root.scheduled_to_zap = True
        root.role |= ROLE_INVALID

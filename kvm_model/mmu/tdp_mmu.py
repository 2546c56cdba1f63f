"""The TDP MMU: SPTE stores, and the mapping of one fault.

Source of truth: arch/x86/kvm/mmu/tdp_mmu.c (Linux 6.18): handle_changed_spte, handle_removed_pt,
tdp_mmu_set_spte(_atomic), kvm_tdp_mmu_map, tdp_mmu_map_handle_target_level, tdp_mmu_link_sp,
tdp_mmu_split_huge_page; mmu/mmutrace.h.

Every store to an SPTE goes through `kvm_tdp_mmu_write_spte`, `try_cmpxchg64`, `xchg64` or
`fetch_and64` here, and every change is told to handle_changed_spte or `spte_changed`, which trace it
and note it for the truths. What a zap removed is remembered in `kvm.killed_by`.

A lock's holder is on another CPU than the rest: `sched.race` stands between an SPTE's read and its
atomic update. Table pages and roots are in tdp_pages.py, zapping is in tdp_zap.py,
dirty logging in tdp_log.py, aging in tdp_age.py.

Not modelled: mirror (TDX) roots, CONFIG_KVM_PROVE_MMU.
"""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from kvm_model.guest_access import kvm_vcpu_memslots
from kvm_model.memslots import (
    kvm_gfn_is_write_tracked,
    kvm_slot_dirty_track_enabled,
    mark_page_dirty_in_slot,
)
from kvm_model.mmu.marks import transfer_marks
from kvm_model.mmu.mmu_internal import (
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    KvmMmuPage,
    KvmPageFault,
    page_args,
    role_smm,
)
from kvm_model.mmu.spte import (
    ACC_ALL,
    FROZEN_SPTE,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
    SPTE_MMU_PRESENT_MASK,
    get_mmio_spte_generation,
    is_last_spte,
    is_shadow_present_pte,
    kvm_pages_per_hpage,
    spte_to_pfn,
)
from kvm_model.mmu.tdp_iter import TdpIter, spte_to_child_pt
from kvm_model.mmu.tdp_pages import root_to_sp, tdp_mmu_free_sp, tdp_mmu_init_child_sp
from kvm_model.requests import kvm_flush_remote_tlbs_gfn
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:

    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "TRACEPOINTS", "disallowed_hugepage_adjust", "fetch_and64", "handle_changed_spte", "is_access_allowed",
    "kvm_tdp_mmu_map", "kvm_tdp_mmu_write_spte", "spte_changed", "tdp_mmu_iter_set_spte",
    "tdp_mmu_set_spte_atomic", "tdp_mmu_split_huge_page", "trace_kvm_mmu_set_spte", "trace_set_spte",
    "try_cmpxchg64", "xchg64",
]

_MASK64 = (1 << 64) - 1
_PAGE_STAT = {1: "pages_4k", 2: "pages_2m", 3: "pages_1g"}

KVM_TDP_MMU_SPTE_CHANGED = Tracepoint(
    "kvmmmu", "kvm_tdp_mmu_spte_changed", ("gfn", "old_spte", "new_spte", "level", "as_id"),
    lambda gfn, old_spte, new_spte, level, as_id:
        f"as id {as_id} gfn {gfn:x} level {level} old_spte {old_spte:x} new_spte {new_spte:x}",
)
KVM_MMU_SET_SPTE = Tracepoint(
    "kvmmmu", "kvm_mmu_set_spte", ("gfn", "spte", "sptep", "level", "r", "x", "u"),
    lambda gfn, spte, sptep, level, r, x, u:
        f"gfn {gfn:x} spte {spte:x} ({'r' if r else '-'}{'w' if spte & 2 else '-'}{'x' if x else '-'}"
        f"{'' if u == -1 else 'u' if u else '-'}) level {level} at {sptep:x}",
)
KVM_MMU_SPTE_REQUESTED = Tracepoint(
    "kvmmmu", "kvm_mmu_spte_requested", ("gfn", "pfn", "level"),
    lambda gfn, pfn, level: f"gfn {gfn:x} pfn {pfn:x} level {level}",
)
MARK_MMIO_SPTE = Tracepoint(
    "kvmmmu", "mark_mmio_spte", ("sptep", "gfn", "access", "gen"),
    lambda sptep, gfn, access, gen: f"sptep:{sptep:016x} gfn {gfn:x} access {access:x} gen {gen:x}",
)
KVM_MMU_SPLIT_HUGE_PAGE = Tracepoint(
    "kvmmmu", "kvm_mmu_split_huge_page", ("gfn", "spte", "level", "errno"),
    lambda gfn, spte, level, errno: f"gfn {gfn:x} spte {spte:x} level {level} errno {errno}",
)
SPTE_ZAP = Tracepoint(
    "refault", "spte_zap", ("gfn", "level", "old_spte", "why"),
    lambda gfn, level, old_spte, why: f"gfn {gfn:x} level {level} old_spte {old_spte:x} {why}",
    scope=True, doc="A leaf SPTE went away; the next fault on the gfn names this event in killed_by.",
)
SPTE_INSTALL = Tracepoint(
    "refault", "spte_install", ("gfn", "level", "pfn", "spte", "prefetch"),
    lambda gfn, level, pfn, spte, prefetch:
        f"gfn {gfn:x} level {level} pfn {pfn:x} spte {spte:x}{' prefetch' if prefetch else ''}",
    doc="A fault installed a leaf SPTE; killed_by is the zap that it repairs.",
)

TRACEPOINTS = (
    KVM_TDP_MMU_SPTE_CHANGED, KVM_MMU_SET_SPTE, KVM_MMU_SPTE_REQUESTED, MARK_MMIO_SPTE,
    KVM_MMU_SPLIT_HUGE_PAGE, SPTE_ZAP, SPTE_INSTALL,
)


# -- stores -------------------------------------------------------------------------------------


def try_cmpxchg64(kvm: Kvm, sptep: int, old: int, new: int) -> bool:
    """Store `new` if the SPTE still is `old`."""
    if kvm.sched.preempt:
        kvm.sched.race("cmpxchg")
    u64 = kvm.ram.u64
    if u64[sptep] != old and "plain-store" not in kvm.breaks:
        return False
    u64[sptep] = new
    return True


def xchg64(kvm: Kvm, sptep: int, new: int) -> int:
    """Store `new` and return what stood there."""
    if kvm.sched.preempt:
        kvm.sched.race("xchg")
    u64 = kvm.ram.u64
    old = u64[sptep]
    u64[sptep] = new
    return old


def fetch_and64(kvm: Kvm, sptep: int, old: int, mask: int) -> int:
    """tdp_mmu_clear_spte_bits_atomic: clear the bits of `mask`; returns what stood there.

    `old` is what the caller read before, which is all that the broken plain store looks at.
    """
    if kvm.sched.preempt:
        kvm.sched.race("fetch-and")
    u64 = kvm.ram.u64
    if "plain-store" not in kvm.breaks:
        old = u64[sptep]
    u64[sptep] = old & ~mask & _MASK64
    return old


def kvm_tdp_mmu_write_spte(kvm: Kvm, sptep: int, old: int, new: int, level: int) -> int:
    """Store `new` under mmu_lock for write; returns what stood there, which may have more bits than `old`."""
    present_leaf = old & SPTE_MMU_PRESENT_MASK and (level == 1 or old & PT_PAGE_SIZE_MASK)
    if present_leaf and kvm.spte.spte_needs_atomic_update(old) and "plain-store" not in kvm.breaks:
        return xchg64(kvm, sptep, new)
    kvm.ram.u64[sptep] = new
    return old


def spte_changed(
    kvm: Kvm, sptep: int, gfn: int, level: int, old: int, new: int, as_id: int = 0, *, aged: bool = False
) -> None:
    """Trace and note a change of rights or of A/D bits that needs no bookkeeping; `aged`: it is aging's."""
    if kvm.profile.marks_page_at_drop:
        transfer_marks(kvm, level, old, new, accessed=not aged)
    if (t := kvm.trace.kvm_tdp_mmu_spte_changed) is not None:
        t(gfn, old, new, level, as_id)
    if kvm.truths is not None:
        kvm.truths.note_spte(sptep, gfn, level, old, new)


def handle_changed_spte(
    kvm: Kvm, sptep: int, as_id: int, gfn: int, old: int, new: int, level: int, shared: bool, why: str
) -> None:
    """Bookkeeping of an SPTE's change: trace, statistics, the subtree it no longer points to."""
    was_present = old & SPTE_MMU_PRESENT_MASK != 0
    is_present = new & SPTE_MMU_PRESENT_MASK != 0
    was_leaf = was_present and is_last_spte(old, level)
    is_leaf = is_present and is_last_spte(new, level)
    if was_leaf and is_leaf and spte_to_pfn(old) != spte_to_pfn(new):
        raise BrokenTruth(
            "spte-pfn-in-place",
            f"gfn {gfn:#x} level {level}: present leaf {old:#x} replaced by {new:#x} of another frame",
            kvm.stream.ctx.cause,
        )
    if old == new:
        return
    spte_changed(kvm, sptep, gfn, level, old, new, as_id)
    if not was_present and not is_present:
        return
    if was_leaf != is_leaf and level in _PAGE_STAT:
        kvm.stat[_PAGE_STAT[level]] += 1 if is_leaf else -1
    if kvm.instrumented and not is_leaf:
        kvm.instrumented.discard(sptep)
    if was_leaf and not is_present and (t := kvm.trace.spte_zap) is not None:
        kvm.killed_by.zapped(gfn, level, t(gfn, level, old, why))
    if was_present and not was_leaf and (is_leaf or not is_present):
        _handle_removed_pt(kvm, spte_to_child_pt(old, level), shared, why)


def _handle_removed_pt(kvm: Kvm, pt: int, shared: bool, why: str) -> None:
    sp = kvm.sps[pt >> 9]
    level = sp.level
    if (t := kvm.trace.kvm_mmu_prepare_zap_page) is not None:
        t(*page_args(sp))
    if sp.nx_huge_page_disallowed:
        with kvm.tdp_mmu_pages_lock:
            kvm.nx_recovery.untrack(sp)
    u64 = kvm.ram.u64
    pages = kvm_pages_per_hpage(level)
    for index in range(512):
        sptep = pt + index
        if shared:
            # Nobody else freezes entries of a detached table (that takes TDX), so one exchange does.
            old = xchg64(kvm, sptep, FROZEN_SPTE)
        else:
            old = u64[sptep]
            if not old & SPTE_MMU_PRESENT_MASK:
                continue
            old = kvm_tdp_mmu_write_spte(kvm, sptep, old, FROZEN_SPTE, level)
        gfn = sp.gfn + index * pages
        handle_changed_spte(kvm, sptep, role_smm(sp.role), gfn, old, FROZEN_SPTE, level, shared, why)
    kvm.rcu.call_rcu(lambda: tdp_mmu_free_sp(kvm, sp))


def tdp_mmu_set_spte_atomic(kvm: Kvm, it: TdpIter, new: int, why: str = "replace") -> int:
    """Change the iterator's SPTE with mmu_lock held for read. 0, or -EBUSY with old_spte read again."""
    if not try_cmpxchg64(kvm, it.sptep, it.old_spte, new):
        it.old_spte = kvm.ram.u64[it.sptep]
        return -EBUSY
    handle_changed_spte(kvm, it.sptep, it.as_id, it.gfn, it.old_spte, new, it.level, True, why)
    return 0


def tdp_mmu_iter_set_spte(kvm: Kvm, it: TdpIter, new: int, why: str = "replace") -> None:
    """Change the iterator's SPTE with mmu_lock held for write."""
    old = kvm_tdp_mmu_write_spte(kvm, it.sptep, it.old_spte, new, it.level)
    it.old_spte = old
    handle_changed_spte(kvm, it.sptep, it.as_id, it.gfn, old, new, it.level, False, why)


# -- mapping a fault ----------------------------------------------------------------------------


def is_access_allowed(kvm: Kvm, fault: KvmPageFault, spte: int) -> bool:
    """Whether a present leaf grants the fault's access."""
    if fault.exec:
        return kvm.spte.is_executable_pte(spte)
    if fault.write:
        return spte & PT_WRITABLE_MASK != 0
    return spte & 1 != 0


def _tdp_mmu_link_sp(kvm: Kvm, it: TdpIter, sp: KvmMmuPage, shared: bool, why: str) -> int:
    spte = kvm.spte.make_nonleaf_spte(sp.spt)
    if shared:
        return tdp_mmu_set_spte_atomic(kvm, it, spte, why)
    tdp_mmu_iter_set_spte(kvm, it, spte, why)
    return 0


def tdp_mmu_split_huge_page(kvm: Kvm, it: TdpIter, sp: KvmMmuPage, shared: bool) -> int:
    """Replace a huge SPTE by table `sp` filled with the same mapping. 0 or -EBUSY; no flush needed."""
    huge = it.old_spte
    level = it.level
    u64 = kvm.ram.u64
    base = sp.spt << 9
    small = kvm.spte.make_small_spte
    pages = kvm_pages_per_hpage(sp.level)
    for index in range(512):
        u64[base + index] = small(huge, sp.level, index)
    ret = _tdp_mmu_link_sp(kvm, it, sp, shared, "split")
    if not ret:
        kvm.stat[_PAGE_STAT[level - 1]] += 512
        if kvm.truths is not None:
            for index in range(512):
                spte = u64[base + index]
                kvm.truths.note_spte(base + index, sp.gfn + index * pages, sp.level, spte, spte)
    if (t := kvm.trace.kvm_mmu_split_huge_page) is not None:
        t(it.gfn, huge, level, ret)
    return ret


def _map_handle_target_level(vcpu: Vcpu, fault: KvmPageFault, it: TdpIter) -> int:
    kvm = vcpu.kvm
    masks = kvm.spte
    sp = kvm.sps[it.sptep >> 9]
    old = it.old_spte
    if (
        is_shadow_present_pte(old)
        and (fault.prefetch or is_access_allowed(kvm, fault, old))
        and is_last_spte(old, it.level)
    ):
        return RET_PF_SPURIOUS
    wrprot = False
    if fault.slot is None:
        new = masks.make_mmio_spte(it.gfn, ACC_ALL, kvm_vcpu_memslots(vcpu).generation)
    else:
        wrprot = kvm_gfn_is_write_tracked(fault.slot, it.gfn)
        new = masks.make_spte(
            sp, ACC_ALL, fault.pfn, prefetch=fault.prefetch, synchronizing=False,
            host_writable=fault.map_writable, wrprot=wrprot,
        )
        if new & PT_WRITABLE_MASK and kvm_slot_dirty_track_enabled(fault.slot):
            mark_page_dirty_in_slot(vcpu, fault.slot, it.gfn)
    ret = RET_PF_FIXED
    if new == old:
        ret = RET_PF_SPURIOUS
    elif tdp_mmu_set_spte_atomic(kvm, it, new):
        return RET_PF_RETRY
    elif is_shadow_present_pte(old) and not is_last_spte(old, it.level):
        kvm_flush_remote_tlbs_gfn(kvm, it.gfn, it.level)
    if wrprot and fault.write:
        ret = RET_PF_WRITE_PROTECTED
    if masks.is_mmio_spte(new):
        vcpu.stat["pf_mmio_spte_created"] += 1
        if (t := kvm.trace.mark_mmio_spte) is not None:
            t(it.sptep << 3, it.gfn, new & ACC_ALL, get_mmio_spte_generation(new))
        return RET_PF_EMULATE
    trace_set_spte(kvm, fault.gfn, it.gfn, it.level, it.sptep, new, fault.prefetch)
    return ret


def trace_kvm_mmu_set_spte(kvm: Kvm, gfn: int, level: int, sptep: int) -> None:
    """The kernel's own event of an SPTE that a fault made."""
    if (t := kvm.trace.kvm_mmu_set_spte) is not None:
        masks = kvm.spte
        spte = kvm.ram.u64[sptep]
        u = int(spte & masks.user != 0) if masks.user else -1
        readable = bool(masks.present or spte & 1)
        t(gfn, spte, sptep << 3, level, readable, masks.is_executable_pte(spte), u)


def trace_set_spte(
    kvm: Kvm, fault_gfn: int, gfn: int, level: int, sptep: int, new: int, prefetch: bool
) -> None:
    """A fault on `fault_gfn` made the leaf of `gfn`: the kernel's event, and which zap this repairs."""
    trace_kvm_mmu_set_spte(kvm, gfn, level, sptep)
    if (t := kvm.trace.spte_install) is not None:
        killer = kvm.killed_by.of(fault_gfn)
        seq = t(gfn, level, spte_to_pfn(new), new, prefetch, killed_by=killer)
        kvm.killed_by.installed(gfn, level, seq)


def kvm_tdp_mmu_map(vcpu: Vcpu, fault: KvmPageFault) -> int:
    """Install the tables and the leaf for a fault whose level is decided. RET_PF_*.

    The caller holds mmu_lock for read and has found the fault not stale.
    """
    kvm = vcpu.kvm
    if (t := kvm.trace.kvm_mmu_spte_requested) is not None:
        t(fault.gfn, fault.pfn | fault.gfn & kvm_pages_per_hpage(fault.goal_level) - 1, fault.goal_level)
    kvm.rcu.read_lock()
    try:
        return _map_walk(vcpu, fault)
    finally:
        kvm.rcu.read_unlock()


def _map_walk(vcpu: Vcpu, fault: KvmPageFault) -> int:
    kvm = vcpu.kvm
    it = TdpIter(kvm.ram, root_to_sp(kvm, vcpu.root_hpa), 1, fault.gfn, fault.gfn + 1)
    while it.valid:
        spte = it.old_spte
        if fault.nx_huge_page_workaround_enabled:
            disallowed_hugepage_adjust(kvm, fault, spte, it.level)
        if spte == FROZEN_SPTE:
            return RET_PF_RETRY
        if it.level == fault.goal_level:
            return _map_handle_target_level(vcpu, fault, it)
        if is_shadow_present_pte(spte) and not spte & PT_PAGE_SIZE_MASK:
            it.next()
            continue
        sp = tdp_mmu_init_child_sp(kvm, vcpu.mmu_shadow_page_cache.pop(), it)
        sp.nx_huge_page_disallowed = fault.huge_page_disallowed
        if is_shadow_present_pte(spte):
            busy = tdp_mmu_split_huge_page(kvm, it, sp, True)
        else:
            busy = _tdp_mmu_link_sp(kvm, it, sp, True, "link")
        if busy:
            tdp_mmu_free_sp(kvm, sp)
            return RET_PF_RETRY
        if fault.huge_page_disallowed and fault.req_level >= it.level:
            with kvm.tdp_mmu_pages_lock:
                if sp.nx_huge_page_disallowed:
                    kvm.nx_recovery.track(sp)
        it.next()
    return RET_PF_RETRY


def disallowed_hugepage_adjust(kvm: Kvm, fault: KvmPageFault, spte: int, cur_level: int) -> None:
    """Where a table for executable pages stands in the way of a huge leaf, map one level lower."""
    if (
        cur_level > 1 and cur_level == fault.goal_level and is_shadow_present_pte(spte)
        and not spte & PT_PAGE_SIZE_MASK and kvm.sps[spte_to_pfn(spte)].nx_huge_page_disallowed
    ):
        mask = kvm_pages_per_hpage(cur_level) - kvm_pages_per_hpage(cur_level - 1)
        fault.pfn |= fault.gfn & mask
        fault.goal_level -= 1

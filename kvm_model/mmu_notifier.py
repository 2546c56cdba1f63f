"""KVM's mmu notifier: what the host's brackets and aging do to a VM.

Source of truth: virt/kvm/kvm_main.c (Linux 6.18): kvm_handle_hva_range, kvm_mmu_notifier_*,
kvm_age_hva_range; of Linux 5.10 kvm_mmu_notifier_change_pte. What they do to SPTEs is in mmu/gfn_range.py.

range_start: count the bracket, drop pfn caches, find the memslots that overlap, and at the first one
take mmu_lock; note the range, zap, flush, unlock. range_end: the same walk, only to move the sequence and
the count. Both find the same slots because a memslot update waits for open brackets. KVM ignores the
event and its owner, never refuses, and takes no mmu_lock if no slot is hit. In 5.10 it does in any case, any
open bracket makes any fault retry, and a memslot update waits for none.

Not modelled: SEV's cache flush on reclaim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm.mmu_notifier import MmuNotifier, MmuNotifierRange, mmu_notifier_range_blockable
from kvm_model.lapic import apic_access_page_slot
from kvm_model.memslots import KvmMemorySlot, hva_to_gfn_memslot
from kvm_model.mmu.gfn_range import (
    kvm_age_gfn,
    kvm_set_spte_gfn,
    kvm_test_age_gfn,
    kvm_unmap_gfn_range,
)
from kvm_model.mmu.invalidate import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from kvm_model.mmu.mmu_roots import kvm_mmu_zap_all
from kvm_model.pfncache import gfn_to_pfn_cache_invalidate_start
from kvm_model.requests import KVM_REQ_APIC_PAGE_RELOAD, kvm_flush_remote_tlbs, kvm_make_all_cpus_request
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from kvm_model.kvm_main import Kvm

__all__ = ["TRACEPOINTS", "KvmMmuNotifier", "kvm_handle_hva_range"]

Handler = Callable[["Kvm", KvmMemorySlot, int, int, bool], bool]
OnLock = Callable[["Kvm"], None]

KVM_UNMAP_HVA_RANGE = Tracepoint(
    "kvm", "kvm_unmap_hva_range", ("start", "end"),
    lambda start, end: f"mmu notifier unmap range: {start:#016x} -- {end:#016x}",
)
KVM_AGE_HVA = Tracepoint(
    "kvm", "kvm_age_hva", ("start", "end"),
    lambda start, end: f"mmu notifier age hva: {start:#016x} -- {end:#016x}",
)
KVM_TEST_AGE_HVA = Tracepoint(
    "kvm", "kvm_test_age_hva", ("hva",), lambda hva: f"mmu notifier test age hva: {hva:#016x}"
)
TRACEPOINTS = (KVM_UNMAP_HVA_RANGE, KVM_AGE_HVA, KVM_TEST_AGE_HVA)


def kvm_handle_hva_range(
    kvm: Kvm, start: int, end: int, *, handler: Handler | None, on_lock: OnLock | None,
    flush_on_ret: bool, may_block: bool, lockless: bool,
) -> tuple[bool, bool]:
    """Run `handler` on the gfns behind [start, end) of each memslot; (answers or'ed, slot found).

    mmu_lock is taken for write at the first slot (in 5.10 in any case, and that counts as a slot found), then
    `on_lock` runs; without a handler that is all.
    """
    ret = False
    late_flush = False
    idx = kvm.srcu.read_lock()
    found = kvm.profile.lock_on_every_start
    if found and not lockless:
        kvm.mmu_lock.lock()
        if on_lock is not None:
            on_lock(kvm)
    for slots in kvm.memslots if "ignore-smm-slots" not in kvm.breaks else kvm.memslots[:1]:
        for slot in slots.in_hva_range(start, end - 1):
            hva_start = max(start, slot.userspace_addr)
            hva_end = min(end, slot.userspace_addr + (slot.npages << 12))
            gfn_start = hva_to_gfn_memslot(hva_start, slot)
            gfn_end = hva_to_gfn_memslot(hva_end + 0xFFF, slot)
            if not found:
                found = True
                if not lockless:
                    kvm.mmu_lock.lock()
                    if on_lock is not None:
                        on_lock(kvm)
            if handler is None:
                break
            ret |= handler(kvm, slot, gfn_start, gfn_end, may_block)
        if found and handler is None:
            break
    if flush_on_ret and ret:
        late_flush = "flush-after-unlock" in kvm.breaks
        if not late_flush and "no-flush" not in kvm.breaks:
            kvm_flush_remote_tlbs(kvm)
    if found and not lockless:
        if flush_on_ret and kvm.truths is not None:
            kvm.truths.note_start_unlock()
        kvm.mmu_lock.unlock()
    if late_flush:
        kvm_flush_remote_tlbs(kvm)
    kvm.srcu.read_unlock(idx)
    return ret, found


def _kvm_mmu_unmap_gfn_range(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, may_block: bool) -> bool:
    kvm_mmu_invalidate_range_add(kvm, start, end, as_id=slot.as_id)
    return kvm_unmap_gfn_range(kvm, slot, start, end, may_block=may_block)


def _kvm_age_gfn(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, may_block: bool) -> bool:
    return kvm_age_gfn(kvm, slot, start, end)


def _kvm_test_age_gfn(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, may_block: bool) -> bool:
    return kvm_test_age_gfn(kvm, slot, start, end)


class KvmMmuNotifier(MmuNotifier):
    """kvm_mmu_notifier_ops for one VM."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        if kvm.host.profile.invalidate_range:
            self.invalidate_range = self._invalidate_range

    def invalidate_range_start(self, range_: MmuNotifierRange) -> int:
        """kvm_mmu_notifier_invalidate_range_start: unmap, and keep unmapped until the end."""
        kvm = self.kvm
        if (t := kvm.trace.kvm_unmap_hva_range) is not None:
            t(range_.start, range_.end)
        if "skip-start" in kvm.breaks:
            if kvm.truths is not None:
                kvm.truths.note_skipped_start(range_)
            return 0
        with kvm.mn_invalidate_lock:
            kvm.mn_active_invalidate_count += 1
        # Before mmu_lock, and thus before mmu_invalidate_in_progress: the caches look at the count above.
        if "gpc-skip-invalidate" not in kvm.breaks:
            gfn_to_pfn_cache_invalidate_start(kvm, range_.start, range_.end)
        _, found = kvm_handle_hva_range(
            kvm, range_.start, range_.end, handler=_kvm_mmu_unmap_gfn_range, on_lock=kvm_mmu_invalidate_begin,
            flush_on_ret=True, may_block=mmu_notifier_range_blockable(range_), lockless=False,
        )
        if "apic-reload-early" in kvm.breaks and not kvm.profile.apic_reload_retries:
            self._reload_apic_page(range_.start, range_.end)
        if kvm.truths is not None:
            kvm.truths.note_start_returned(range_, found)
        return 0

    def invalidate_range_end(self, range_: MmuNotifierRange) -> None:
        """kvm_mmu_notifier_invalidate_range_end: faults may map again."""
        kvm = self.kvm
        if "skip-start" in kvm.breaks or "skip-end" in kvm.breaks:
            if kvm.truths is not None:
                kvm.truths.note_end_returned(range_, None)
            return
        if kvm.truths is not None:
            kvm.truths.note_end_called(range_)
        _, found = kvm_handle_hva_range(
            kvm, range_.start, range_.end, handler=None, on_lock=kvm_mmu_invalidate_end, flush_on_ret=False,
            may_block=mmu_notifier_range_blockable(range_), lockless=False,
        )
        with kvm.mn_invalidate_lock:
            kvm.mn_active_invalidate_count -= 1
            wake = kvm.mn_active_invalidate_count == 0
        if kvm.truths is not None:
            kvm.truths.note_end_returned(range_, found)
        if wake:
            kvm.mn_memslots_update_wait.wake_all()

    def _age(self, start: int, end: int, handler: Handler, *, flush: bool) -> int:
        return int(kvm_handle_hva_range(
            self.kvm, start, end, handler=handler, on_lock=None, flush_on_ret=flush, may_block=False,
            lockless=self.kvm.profile.lockless_aging,
        )[0])

    def clear_flush_young(self, mm: MmStruct, start: int, end: int) -> int:
        """kvm_mmu_notifier_clear_flush_young."""
        kvm = self.kvm
        if (t := kvm.trace.kvm_age_hva) is not None:
            t(start, end)
        return self._age(start, end, _kvm_age_gfn, flush=kvm.profile.flush_on_young)

    def clear_young(self, mm: MmStruct, start: int, end: int) -> int:
        """kvm_mmu_notifier_clear_young; a trace cannot tell it from clear_flush_young."""
        if (t := self.kvm.trace.kvm_age_hva) is not None:
            t(start, end)
        return self._age(start, end, _kvm_age_gfn, flush=False)

    def test_young(self, mm: MmStruct, address: int) -> int:
        """kvm_mmu_notifier_test_young."""
        if (t := self.kvm.trace.kvm_test_age_hva) is not None:
            t(address)
        return self._age(address, address + 1, _kvm_test_age_gfn, flush=False)

    def change_pte(self, mm: MmStruct, address: int, pte: int) -> None:
        """kvm_mmu_notifier_change_pte, of 5.10: nothing is left to change where a bracket is open."""

        def sequence(kvm: Kvm) -> None:
            kvm.mmu_invalidate_seq += 1

        def set_spte(kvm: Kvm, slot: KvmMemorySlot, start: int, end: int, may_block: bool) -> bool:
            return kvm_set_spte_gfn(kvm, slot, start, pte)

        kvm_handle_hva_range(
            self.kvm, address, address + 1, handler=set_spte, on_lock=sequence, flush_on_ret=True,
            may_block=False, lockless=False,
        )

    def _invalidate_range(self, mm: MmStruct, start: int, end: int) -> None:
        """kvm_arch_mmu_notifier_invalidate_range, of 5.10: the entries are clear; without mmu_lock."""
        kvm = self.kvm
        if kvm.apic_access_memslot_enabled and "apic-reload-early" not in kvm.breaks:
            idx = kvm.srcu.read_lock()
            self._reload_apic_page(start, end)
            kvm.srcu.read_unlock(idx)

    def _reload_apic_page(self, start: int, end: int) -> None:
        slot = self.kvm.slots().id_hash.get(apic_access_page_slot(self.kvm))
        if slot is not None and start <= slot.userspace_addr < end:
            kvm_make_all_cpus_request(self.kvm, KVM_REQ_APIC_PAGE_RELOAD)

    def release(self, mm: MmStruct) -> None:
        """kvm_mmu_notifier_release: the address space goes away; drop everything."""
        kvm = self.kvm
        idx = kvm.srcu.read_lock()
        if kvm.truths is not None:
            kvm.truths.note_release()
        kvm_mmu_zap_all(kvm)
        kvm.srcu.read_unlock(idx)

"""What must hold of KVM's MMU, checked while it runs, and once more by a sweep.

    no-spte-in-bracket    from the return of range_start to the call of range_end no leaf lies in the range,
                          and from invalidate_begin on none is made there (in 5.10 none anywhere)
    spte-matches-host     elsewhere each 4K of a leaf is the host's frame, no leaf is larger than the host's
                          mapping, and what KVM holds for writable the host maps writable; a leaf of memory
                          from guest_memfd is a 4K one and has the file's page
    flush-before-unlock   range_start asks for the flush of what it zapped before it drops mmu_lock
    bracket-balance       counts go up and down with brackets, the sequence moves before the count
    spte-writable-state   a leaf is in one of the four (host, mmu, W) states (five where there is change_pte)
    spte-access-track     a leaf that lost its rights to see the next access remembers them, and no other does
    spte-pfn-in-place     a present leaf never changes its frame
    spte-of-freed-frame   no leaf of any root, invalid ones included, maps a frame that is freed
    write-logged          a leaf of a logged slot that can be written unseen (W, and D where the CPU logs) is
                          in the dirty log: the bitmap, a ring, or a CPU's log that is not drained yet
    log-flushed           a call that takes away W or D for the log has asked for a flush when it returns
    write-tracked         no leaf lets a vCPU write unseen to a page whose writes somebody tracks, and no
                          translation of before
    dirty-ring            a ring never holds more than it has room for
    spte-dirty-kept       in 5.10, outside the TDP MMU, the page is dirty when a leaf that says so changes
    gpc-in-bracket        no pfn cache is valid from the return of range_start to the call of range_end
    gpc-matches-host      elsewhere a valid one has the host's frame, and the host may write it
    gpc-of-freed-frame    no valid one has a frame that is freed
    apic-page-matches     a vCPU that enters has in its VMCS the frame of the APIC's page that EPT has, if it
                          has one, and outside brackets that the host has
    vmcs-of-freed-frame   no VMCS of a vCPU that is in the guest, or enters without reloading it, has a frame
                          for the APIC's page that is freed
    no-mmio-over-slot     an MMIO SPTE never replaces a leaf that is present (5.10 does that)
    rmap-matches-sptes    without the TDP MMU every leaf is in its gfn's rmap, once, and nothing else is; the
                          same of tables and `parent_ptes` (swept only, while nobody has mmu_lock)

Gfns of the SMM address space have bit 40 set here: it shares gfns, not pages, with normal memory.

Incremental: each SPTE store and each change of a host PTE notes its place, `check` looks at the noted
places. `sweep` looks at everything; both must agree. The comparison with the host waits while a
page-table lock is held or the place is in an open bracket.

Source of truth: the rules themselves (virt/kvm/kvm_main.c, Documentation/virt/kvm/locking.rst,
arch/x86/kvm/mmu/spte.h: is_writable_pte's table); Linux 6.18.

Shadow paging's rules about guest tables are in truths_shadow.py.

Not modelled: a huge leaf made beside a bracket that covers a part of it (legal: the host must split first,
in a bracket of its own).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from host_mm.arch.x86.pgtable import _PAGE_PRESENT, _PAGE_RW, PMD_SIZE, lookup_address_in_mm, pte_pfn
from host_mm.kernel.errors import BrokenTruth
from host_mm.page import PG_dirty, PG_reserved, page_folio
from kvm_model.guest_memfd import kvm_gmem_folio
from kvm_model.mem_attributes import gfn_is_in_guest_memfd
from kvm_model.memslots import hva_to_gfn_memslot
from kvm_model.mmu.marks import is_dirty_spte
from kvm_model.mmu.mmu_internal import role_smm
from kvm_model.mmu.spte import (
    PT_WRITABLE_MASK,
    is_last_spte,
    is_shadow_present_pte,
    kvm_pages_per_hpage,
    spte_to_pfn,
)
from kvm_model.truths_apic import ApicTruths
from kvm_model.truths_gpc import CacheTruths
from kvm_model.truths_leaves import SPACE_SHIFT, LeafIndex
from kvm_model.truths_log import LogTruths
from kvm_model.truths_rmap import check_rmaps
from kvm_model.truths_shadow import ShadowTruths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from host_mm.kernel.locks import Spinlock
    from host_mm.kernel.sched import Task
    from host_mm.mm_types import MmStruct
    from host_mm.mmu_notifier import MmuNotifierRange
    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot
    from kvm_model.vcpu import Vcpu

__all__ = ["KvmTruths"]

Ranges = list[tuple[int, int]]


def _key(hva: int, slot: KvmMemorySlot) -> int:
    """The gfn behind `hva`, with its address space."""
    return hva_to_gfn_memslot(hva, slot) | slot.as_id << SPACE_SHIFT


class KvmTruths:
    """The checker of one VM. Models call `note_*` where things happen; `check` and `sweep` are for all."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self._noted: dict[int, tuple[int, int | None]] = {}
        self.leaves = LeafIndex(kvm)
        self._noted_gfns: dict[tuple[int, int], int | None] = {}
        self._in_brackets: dict[tuple[int, int], int | None] = {}
        self.caches = CacheTruths(kvm)
        self.apic = ApicTruths(kvm)
        self.log = LogTruths(kvm)
        self._held: Spinlock | None = None
        self._open: dict[int, tuple[bool, Ranges]] = {}
        self._ranges: dict[Task, Ranges] = {}
        self._flush_due: set[Task] = set()
        self._begins = 0
        self._ends = 0
        self._ending = 0
        self._seq0 = kvm.mmu_invalidate_seq
        self.shadow = None if kvm.tdp_enabled else ShadowTruths(kvm)
        kvm.host.pte_hooks.append(self._host_pte_changed)
        kvm.host.pmd_hooks.append(self._host_pmd_changed)
        kvm.host.free_hooks.append(self._frame_freed)

    def _broken(self, truth: str, what: str, seq: int | None = None) -> NoReturn:
        raise BrokenTruth(truth, what, self.kvm.stream.here() if seq is None else seq)

    # -- brackets -------------------------------------------------------------------------------

    def note_begin(self) -> None:
        """kvm_mmu_invalidate_begin raised the count."""
        self._begins += 1
        self._ranges[self.kvm.sched.current] = []

    def note_range(self, as_id: int, start: int, end: int) -> None:
        """kvm_mmu_invalidate_range_add, for a slot of that address space."""
        space = as_id << SPACE_SHIFT
        self._ranges.setdefault(self.kvm.sched.current, []).append((start | space, end | space))

    def note_flush_due(self) -> None:
        """A leaf of a valid root was zapped by a task that must flush, perhaps after others had the lock."""
        self._flush_due.add(self.kvm.sched.current)

    def note_flush(self) -> None:
        """Every vCPU has, or is about to get, a flush request."""
        self._flush_due.clear()
        self.log.flushed()

    def note_start_unlock(self) -> None:
        """range_start is about to drop mmu_lock."""
        if self.kvm.sched.current in self._flush_due:
            self._broken("flush-before-unlock", "range_start drops mmu_lock with zapped SPTEs not flushed")

    def note_tracked(self, gfn: int) -> None:
        """From here on no write to `gfn` may go unseen."""
        if self.kvm.sched.current in self._flush_due:
            self._broken("write-tracked", f"gfn {gfn:#x} is tracked, but not flushed since it was protected")

    def note_start_returned(self, range_: object, found: bool) -> None:
        """range_start is done: nothing may be mapped in the range."""
        ranges = self._ranges.pop(self.kvm.sched.current, [])
        self._open[id(range_)] = (found, ranges)
        self.caches.note_start(range_)
        for start, end in ranges:
            self._assert_unmapped(start, end)

    def note_skipped_start(self, range_: MmuNotifierRange) -> None:
        """range_start was left out: find the range as it would have."""
        ranges: Ranges = []
        for slot in self._slots_in_hva_range(range_.start, range_.end - 1):
            last = slot.userspace_addr + (slot.npages << 12)
            start = _key(max(range_.start, slot.userspace_addr), slot)
            ranges.append((start, _key(min(range_.end, last) + 0xFFF, slot)))
        self._open[id(range_)] = (False, ranges)
        for start, end in ranges:
            self._assert_unmapped(start, end)

    def note_end_called(self, range_: object) -> None:
        """range_end begins: from its mmu_lock section on the range may be mapped."""
        self.caches.note_end(range_)
        entry = self._open.get(id(range_))
        self._ending += entry is not None and entry[0]
        if entry is not None:
            self._open[id(range_)] = (entry[0], [])
            self._noted_gfns.update(self._in_brackets)
            self._in_brackets.clear()

    def note_end_returned(self, range_: object, found: bool | None) -> None:
        """range_end is done; `found` as it saw the memslots, None if it was left out."""
        entry = self._open.pop(id(range_), None)
        if entry is None:
            return
        if found is not None and found != entry[0]:
            self._broken("bracket-balance", "range_start and range_end saw different memslots")
        if entry[0]:
            self._ends += 1
            self._ending -= found is not None
        count = self.kvm.mmu_invalidate_in_progress
        due = self._begins - self._ends
        if not due - self._ending <= count <= due:
            self._broken("bracket-balance", f"mmu_invalidate_in_progress is {count}, {due} brackets are open")
        self.check()

    def _in_open_bracket(self, gfn: int, pages: int) -> bool:
        return bool(self._open) and any(
            start <= gfn and gfn + pages <= end for _, ranges in self._open.values() for start, end in ranges
        )

    def _assert_unmapped(self, start: int, end: int) -> None:
        for _, gfn, level, spte in self.leaves.all_leaves(start, end):
            if start <= gfn and gfn + kvm_pages_per_hpage(level) <= end:
                self._broken(
                    "no-spte-in-bracket",
                    f"range_start of gfns {start:#x}-{end:#x} returned, but {spte:#x} maps gfn {gfn:#x}",
                )

    # -- stores ---------------------------------------------------------------------------------

    def note_spte(self, sptep: int, gfn: int, level: int, old: int, new: int) -> None:
        """An SPTE changed."""
        kvm = self.kvm
        key = gfn | role_smm(kvm.sps[sptep >> 9].role) << SPACE_SHIFT
        if self.shadow is not None:
            self.shadow.note_spte(sptep, gfn, level, new)
        was_leaf = is_shadow_present_pte(old) and is_last_spte(old, level)
        if was_leaf and kvm.profile.marks_page_at_drop and not kvm.tdp_mmu_enabled:
            self._check_dirty_kept(gfn, old, new)
        self.leaves.note_spte(sptep, key, level, old, new)
        if not is_shadow_present_pte(new) or not is_last_spte(new, level):
            if was_leaf and kvm.spte.is_mmio_spte(new) and not kvm.profile.invalid_slot_is_noslot:
                self._broken("no-mmio-over-slot", f"gfn {gfn:#x}: {new:#x} over {old:#x}")
            return
        if sptep not in kvm.instrumented:
            self._check_state(gfn, new)
        if was_leaf and old & ~new & PT_WRITABLE_MASK:
            self.log.write_protected()
        if was_leaf and spte_to_pfn(old) != spte_to_pfn(new):
            self._broken("spte-pfn-in-place", f"gfn {gfn:#x} level {level}: {old:#x} became {new:#x}")
        pages = kvm_pages_per_hpage(level)
        start, end = kvm.mmu_invalidate_range_start, kvm.mmu_invalidate_range_end
        inside = (start <= gfn and gfn + pages <= end) or kvm.profile.retry_scope == "any"
        # The end of the dirty log puts a huge leaf where a table is without a look at the brackets' union.
        making = not is_shadow_present_pte(old) and kvm.mmu_invalidate_in_progress and inside
        if making or self._in_open_bracket(key, pages):
            self._broken("no-spte-in-bracket", f"gfn {gfn:#x} level {level}: {new:#x} stored in a bracket")
        self._noted[sptep] = key, kvm.stream.ctx.cause

    def _check_dirty_kept(self, gfn: int, old: int, new: int) -> None:
        """5.10: where a leaf was all that knew of a write, the page knows it before the leaf does not."""
        kvm = self.kvm
        kept = is_shadow_present_pte(new) and is_dirty_spte(kvm, new)
        pages = kvm.host.pages
        flags = pages.flags[page_folio(pages, spte_to_pfn(old))]
        if is_dirty_spte(kvm, old) and not kept and not flags & (PG_dirty | PG_reserved):
            self._broken("spte-dirty-kept", f"gfn {gfn:#x}: {old:#x} became {new:#x}, the page is clean")

    def _frame_freed(self, pfn: int, order: int) -> None:
        self.caches.frame_freed(pfn, order)
        self.apic.frame_freed(pfn, order)
        self.leaves.frame_freed(pfn, order)

    def note_release(self) -> None:
        """The address space goes away, and KVM_RUN with it."""
        self.apic.released = True

    def note_entry(self, vcpu: Vcpu) -> None:
        """A vCPU with an APIC enters the guest."""
        if not self._page_table_locked():
            self.apic.check_entry(vcpu)

    def _check_state(self, gfn: int, spte: int) -> None:
        kvm = self.kvm
        followed = kvm.host.profile.change_pte and not spte & (PT_WRITABLE_MASK | kvm.spte.host_writable)
        if not followed and not kvm.spte.writable_state_is_legal(spte):
            self._broken("spte-writable-state", f"gfn {gfn:#x}: {spte:#x} is in none of the four states")
        if not kvm.spte.access_track_is_legal(spte):
            self._broken("spte-access-track", f"gfn {gfn:#x}: {spte:#x} has lost what it was, or keeps it")

    def _slots_in_hva_range(self, start: int, last: int) -> Iterator[KvmMemorySlot]:
        for slots in self.kvm.memslots:
            yield from slots.in_hva_range(start, last)

    def _host_pte_changed(self, mm: MmStruct, address: int, old: int, new: int) -> None:
        kvm = self.kvm
        if mm is not kvm.mm or not kvm.alive:
            return
        for slot in self._slots_in_hva_range(address, address):
            self._noted_gfns[_key(address, slot), 1] = kvm.stream.ctx.cause

    def _host_pmd_changed(self, mm: MmStruct, address: int, old: int, new: int) -> None:
        kvm = self.kvm
        if mm is not kvm.mm or not kvm.alive:
            return
        for slot in self._slots_in_hva_range(address, address + PMD_SIZE - 1):
            first = max(address, slot.userspace_addr)
            last = min(address + PMD_SIZE, slot.userspace_addr + (slot.npages << 12))
            noted = _key(first, slot), (last - first) >> 12
            self._noted_gfns[noted] = kvm.stream.ctx.cause

    def note_gfns(self, gfn: int, pages: int) -> None:
        """What lies behind these frames changed, and no host page table says so: guest_memfd, attributes."""
        self._noted_gfns[gfn, pages] = self.kvm.stream.ctx.cause

    # -- checks ---------------------------------------------------------------------------------

    def on_point(self, kind: str) -> None:
        """For Scheduler.set_on_point: check what was noted since the last point."""
        self.check()

    def check(self) -> None:
        """Check the counters and the noted places."""
        kvm = self.kvm
        moved = kvm.mmu_invalidate_seq - self._seq0
        if moved < self._begins - kvm.mmu_invalidate_in_progress:
            self._broken("bracket-balance", "mmu_invalidate_in_progress fell before mmu_invalidate_seq rose")
        if kvm.gpc_list and not self._page_table_locked():
            self.caches.check()
        if (self._noted or self._noted_gfns) and not self._page_table_locked():
            self._check_noted()
        if self.shadow is not None:
            self.shadow.check()

    def _page_table_locked(self) -> bool:
        # Asked at every point: mostly nobody has one, or somebody still has the one found last.
        held = self._held
        if held is not None and held.owner is not None:
            return True
        self._held = None
        sched = self.kvm.sched
        for task in (sched.main, *sched.tasks):
            if "ptl" in task.held or "pmd_ptl" in task.held or "page_table_lock" in task.held:
                break
        else:
            return False
        mm = self.kvm.mm
        for lock in (mm.page_table_lock, *mm.pte_locks.values(), *self.kvm.host.pmd_locks.values()):
            if lock.owner is not None:
                self._held = lock
                return True
        return False

    def _check_noted(self) -> None:
        kvm = self.kvm
        noted, self._noted = self._noted, {}
        for sptep, (gfn, seq) in noted.items():
            sp = kvm.sps.get(sptep >> 9)
            spte = kvm.ram.u64[sptep]
            if sp is None or not is_shadow_present_pte(spte) or not is_last_spte(spte, sp.level):
                continue
            if self.leaves.is_reachable(sp):
                self._check_leaf(sptep, gfn, sp.level, spte, seq)
        gfns, self._noted_gfns = self._noted_gfns, {}
        for (gfn, pages), seq in gfns.items():
            if self._open and self._in_open_bracket(gfn, pages):
                self._in_brackets[gfn, pages] = seq
                continue
            for sptep, base, level, spte in self.leaves.all_leaves(gfn, gfn + pages):
                self._check_leaf(sptep, base, level, spte, seq)

    def _check_leaf(self, sptep: int, gfn: int, level: int, spte: int, seq: int | None) -> None:
        kvm = self.kvm
        if sptep in kvm.instrumented:
            return
        if self._open and self._in_open_bracket(gfn, kvm_pages_per_hpage(level)):
            return
        as_id, gfn = gfn >> SPACE_SHIFT, gfn & (1 << SPACE_SHIFT) - 1
        slot = kvm.memslots[as_id].gfn_to_memslot(gfn)
        if slot is None:
            self._broken("spte-matches-host", f"gfn {gfn:#x} is mapped by {spte:#x} but has no memslot", seq)
        pfn = spte_to_pfn(spte)
        if gfn_is_in_guest_memfd(kvm, slot, gfn):
            folio = kvm_gmem_folio(slot, gfn)
            if level > 1 or folio != pfn:
                what = f"gfn {gfn:#x} level {level}: {spte:#x}, guest_memfd has {folio:#x}"
                self._broken("spte-matches-host", what, seq)
            return
        entry, host_level = lookup_address_in_mm(kvm.mm, slot.gfn_to_hva(gfn))
        host_pfn = pte_pfn(entry)
        if host_level > 1:
            host_pfn += gfn & (kvm_pages_per_hpage(host_level) - 1)
        if not entry & _PAGE_PRESENT or pfn != host_pfn:
            self._broken(
                "spte-matches-host",
                f"gfn {gfn:#x} level {level}: SPTE {spte:#x} maps pfn {pfn:#x}, the host has {entry:#x}", seq,
            )
        if level > host_level:
            self._broken("spte-matches-host", f"gfn {gfn:#x}: level {level}, host level {host_level}", seq)
        if spte & PT_WRITABLE_MASK:
            self.log.check_leaf(slot, gfn, level, spte, seq)
            if slot.gfn_write_track:
                self._check_tracked(slot, gfn, level, spte, seq)
        if spte & kvm.spte.host_writable and not entry & _PAGE_RW:
            self._broken(
                "spte-matches-host", f"gfn {gfn:#x}: {spte:#x} is host-writable, the host says {entry:#x}",
                seq,
            )

    def _check_tracked(self, slot: KvmMemorySlot, gfn: int, level: int, spte: int, seq: int | None) -> None:
        if self.kvm.mmu_lock.owner is not None:
            # Counted before it is protected, both under mmu_lock.
            return
        for index in range(gfn - slot.base_gfn, gfn - slot.base_gfn + kvm_pages_per_hpage(level)):
            if index in slot.gfn_write_track:
                why = f"gfn {slot.base_gfn + index:#x} is tracked, {spte:#x} lets it be written"
                self._broken("write-tracked", why, seq)

    def sweep(self) -> int:
        """Check every leaf of every root; how many there are."""
        self.check()
        kvm = self.kvm
        locked = self._page_table_locked()
        count = 0
        for sptep, gfn, level, spte in self.leaves.scan():
            count += 1
            if sptep in kvm.instrumented:
                continue
            self._check_state(gfn, spte)
            if self._open and self._in_open_bracket(gfn, kvm_pages_per_hpage(level)):
                self._broken("no-spte-in-bracket", f"gfn {gfn:#x}: {spte:#x} in an open bracket")
            if not locked:
                self._check_leaf(sptep, gfn, level, spte, None)
        if not kvm.tdp_mmu_enabled and kvm.mmu_lock.owner is None:
            check_rmaps(kvm)
        if self.shadow is not None:
            self.shadow.sweep()
        return count

    def quiescent(self) -> None:
        """Nobody is inside a bracket: every count is zero."""
        kvm = self.kvm
        if self._open:
            self._broken("bracket-balance", f"{len(self._open)} brackets never closed")
        if kvm.mmu_invalidate_in_progress or kvm.mn_active_invalidate_count:
            self._broken(
                "bracket-balance",
                f"at rest in_progress is {kvm.mmu_invalidate_in_progress}, "
                f"mn_active_invalidate_count {kvm.mn_active_invalidate_count}",
            )

    def detach(self) -> None:
        """Stop watching the host."""
        self.kvm.host.pte_hooks.remove(self._host_pte_changed)
        self.kvm.host.pmd_hooks.remove(self._host_pmd_changed)
        self.kvm.host.free_hooks.remove(self._frame_freed)

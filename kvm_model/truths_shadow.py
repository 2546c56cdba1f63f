"""The truths of shadow paging: what KVM keeps of the guest's tables says no more than they do.

    shadow-agrees     an SPTE of a page that is not unsync, of a pointer or a leaf, is for the gfn that the
                      guest's entry says, and gives no right that the guest's tables do not give (but for
                      the supervisor while CR0.WP is clear, and to it alone; and 5.10 knows the rights on the
                      way to the last table only, and gives them to all tables: CVE-2021-38198)
    shadow-flush      after a guest flush that holds for what the flushed addresses' SPTEs say in the present
                      root, unsync or not; and for a page when it is linked, which needs no flush
    shadow-protected  no leaf lets the guest write a table whose pages are not unsync
    shadow-unsync     above an unsync page every table has the bit of the entry that leads there (swept)
    shadow-counts     indirect pages, write tracking and disallowed huge pages are counted right (swept)

An entry that the host changed, as by MADV_DONTNEED of the page that holds it, is nobody's fault: KVM is told
only of what its vCPUs write. So of each table that is not unsync there is a copy here, as the guest wrote it;
where memory says something else, no SPTE is asked. That also covers a write that is just being emulated.

A flush synchronises while others may write on. So each SPTE has a number that says when it was last held
against the guest's entry: after a flush it must be younger than the flush, or agree with the entry now.

Source of truth: the rules themselves (Intel SDM vol. 3A 5.10.4; arch/x86/kvm/mmu/mmu.c:
mmu_try_to_unsync_pages, link_shadow_page); Linux 6.18.

Not modelled: tables in read-only slots (there A and D cannot be set).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NoReturn

from host_mm.arch.x86.pgtable import _PAGE_PRESENT, lookup_address_in_mm, pte_pfn
from host_mm.kernel.errors import BrokenTruth
from kvm_model.memslots import KVM_MEM_READONLY, alloc_lpage_info
from kvm_model.mmu.mmu_internal import (
    INVALID_PAGE,
    ROLE_ACCESS_MASK,
    ROLE_CR0_WP,
    ROLE_DIRECT,
    ROLE_INVALID,
    ROLE_LEVEL_MASK,
    ROLE_PASSTHROUGH,
    ROLE_QUADRANT_MASK,
    ROLE_SMEP_ANDNOT_WP,
    KvmMmuPage,
    is_obsolete_sp,
    role_access,
    role_direct,
    role_has_4_byte_gpte,
    role_quadrant,
    role_smm,
)
from kvm_model.mmu.paging_tmpl import (
    PAGING32,
    PAGING64,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    gpte_access,
    gpte_to_gfn,
    gpte_to_gfn_lvl,
    is_present_gpte,
)
from kvm_model.mmu.shadow_spte import kvm_mmu_page_get_gfn
from kvm_model.mmu.shadow_walk import for_each_shadow_entry
from kvm_model.mmu.spte import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    PG_LEVEL_4K,
    PT_WRITABLE_MASK,
    is_last_spte,
    is_shadow_present_pte,
    kvm_pages_per_hpage,
    spte_to_pfn,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.kvm_main import Kvm
    from kvm_model.memslots import KvmMemorySlot
    from kvm_model.vcpu import Vcpu

__all__ = ["ShadowTruths"]

_AD = PT_ACCESSED_MASK | PT_DIRTY_MASK
_PSE36_MASK, _PSE36_SHIFT = 15 << 13, 7
_CHILD_ROLE_IGN = (
    ROLE_LEVEL_MASK | ROLE_ACCESS_MASK | ROLE_QUADRANT_MASK | ROLE_DIRECT | ROLE_INVALID | ROLE_PASSTHROUGH
)


class ShadowTruths:
    """The checker of one VM without EPT; KvmTruths calls `check` and `sweep`, the model calls `note_*`."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self._copies: dict[int, bytes | None] = {}
        self._noted: dict[int, int | None] = {}
        self._noted_pages: dict[int, int | None] = {}
        self._seen: dict[int, int] = {}
        self._epoch = 0
        self._got = 0

    def _broken(self, truth: str, what: str, seq: int | None = None) -> NoReturn:
        raise BrokenTruth(truth, what, self.kvm.stream.here() if seq is None else seq)

    # -- what happens ---------------------------------------------------------------------------

    def note_spte(self, sptep: int, gfn: int, level: int, new: int) -> None:
        """An SPTE was stored."""
        if not is_shadow_present_pte(new):
            return
        self._noted[sptep] = self.kvm.stream.ctx.cause
        if new & PT_WRITABLE_MASK and is_last_spte(new, level):
            for page in range(gfn, gfn + kvm_pages_per_hpage(level)):
                if page in self.kvm.mmu_page_hash:
                    self._check_protected(page, new)

    def note_compared(self, sptep: int) -> None:
        """An SPTE was made by the guest's entry, or held against it."""
        self._seen[sptep] = self._epoch

    def note_table(self, sp: KvmMmuPage) -> None:
        """A page shadows its table in step with it from now on: it is new, or was synced."""
        if sp.invalid:
            return
        self._copies[sp.spt] = self._read(sp, 0, 4096)
        self._noted_pages[sp.spt] = self.kvm.stream.ctx.cause
        truths = self.kvm.truths
        assert truths is not None
        for spte in truths.leaves.of_gfn(sp.gfn, role_smm(sp.role)):
            if spte & PT_WRITABLE_MASK:
                self._check_protected(sp.gfn, spte)

    def note_write(self, gpa: int, length: int) -> None:
        """An emulated write of the guest's, which KVM is about to look at."""
        for sp in self.kvm.mmu_page_hash.get(gpa >> 12, ()):
            copy = self._copies.get(sp.spt)
            first = gpa & 0xFFF
            data = self._read(sp, first, min(length, 4096 - first))
            if copy is not None and data is not None:
                self._copies[sp.spt] = copy[:first] + data + copy[first + len(data) :]
                self._noted_pages[sp.spt] = self.kvm.stream.ctx.cause

    def note_get(self) -> None:
        """A page is about to be looked for, to be linked."""
        self._epoch += 1
        self._got = self._epoch

    def note_link(self, child: KvmMmuPage) -> None:
        """A page is about to be linked: nothing in it or below may be stale."""
        for sp in self._below(child):
            self._check_flushed(sp, self._got, "linked")

    # -- flushes --------------------------------------------------------------------------------

    def flush_begins(self) -> int:
        """The guest flushes; a number for flush_ended."""
        self._epoch += 1
        return self._epoch

    def flush_ended(self, vcpu: Vcpu, begun: int, addr: int | None = None) -> None:
        """KVM has done what a guest's flush of `addr`, or of everything, asks of it in the present root."""
        kvm = self.kvm
        if vcpu.root_hpa == INVALID_PAGE or role_direct(vcpu.mmu.root_role):
            return
        if addr is not None:
            for _, sptep in for_each_shadow_entry(vcpu, vcpu.root_hpa, addr):
                sp = kvm.sps.get(sptep >> 9)
                if sp is not None and sp.unsync:
                    self._check_flushed_entry(sp, sptep & 511, begun, "flushed")
            return
        for top in self._tops(vcpu):
            if (top.role ^ vcpu.mmu.root_role) & ~_CHILD_ROLE_IGN:
                roles = f"{vcpu.mmu.root_role:#x} runs on {top!r} of role {top.role:#x}"
                self._broken("shadow-agrees", f"a vCPU of role {roles}")
            for sp in self._below(top):
                self._check_flushed(sp, begun, "flushed")

    def _tops(self, vcpu: Vcpu) -> Iterator[KvmMmuPage]:
        kvm = self.kvm
        root = kvm.sps.get(vcpu.root_hpa >> 12)
        if root is not None:
            yield root
        elif vcpu.root_hpa >> 12 == vcpu.mmu.pae_root:
            for entry in kvm.ram.u64[vcpu.mmu.pae_root << 9 : (vcpu.mmu.pae_root << 9) + 4].tolist():
                if entry:
                    yield kvm.sps[spte_to_pfn(entry)]

    def _below(self, top: KvmMmuPage) -> Iterator[KvmMmuPage]:
        """`top` and every page that its SPTEs lead to, once."""
        kvm = self.kvm
        found = {top.spt: top}
        todo = [top]
        while todo:
            sp = todo.pop()
            yield sp
            if sp.level == PG_LEVEL_4K:
                continue
            for spte in kvm.ram.u64[sp.spt << 9 : (sp.spt << 9) + 512].tolist():
                if is_shadow_present_pte(spte) and not is_last_spte(spte, sp.level):
                    child = kvm.sps[spte_to_pfn(spte)]
                    if child.spt not in found:
                        found[child.spt] = child
                        todo.append(child)

    def _check_flushed(self, sp: KvmMmuPage, begun: int, why: str) -> None:
        if sp.unsync and not sp.invalid:
            for index in range(512):
                self._check_flushed_entry(sp, index, begun, why)

    def _check_flushed_entry(self, sp: KvmMmuPage, index: int, begun: int, why: str) -> None:
        sptep = sp.spt << 9 | index
        spte = self.kvm.ram.u64[sptep]
        if not is_shadow_present_pte(spte) or self._seen.get(sptep, 0) >= begun:
            return
        gpte = self._gpte(sp, index)
        if gpte is not None and (wrong := self._disagrees(sp, index, spte, gpte)):
            self._broken("shadow-flush", f"{why}, and still {self._told(sp, index, spte, gpte)}: {wrong}")

    # -- the guest's tables ---------------------------------------------------------------------

    def _slot(self, sp: KvmMmuPage) -> KvmMemorySlot | None:
        return self.kvm.memslots[role_smm(sp.role)].gfn_to_memslot(sp.gfn)

    def _read(self, sp: KvmMmuPage, offset: int, length: int) -> bytes | None:
        """Bytes of the table that `sp` shadows, read as nobody sees it; None if it is not there."""
        slot = self._slot(sp)
        if slot is None or slot.flags & KVM_MEM_READONLY:
            return None
        entry, level = lookup_address_in_mm(self.kvm.mm, slot.gfn_to_hva(sp.gfn))
        if not entry & _PAGE_PRESENT:
            return None
        pfn = pte_pfn(entry)
        if level > 1:
            pfn += (slot.gfn_to_hva(sp.gfn) >> 12) & (kvm_pages_per_hpage(level) - 1)
        return bytes(self.kvm.ram.read(pfn << 12 | offset, length))

    @staticmethod
    def _at(sp: KvmMmuPage, index: int) -> tuple[int, int]:
        """(offset in the guest's table, size) of the entry that SPTE `index` shadows."""
        if not role_has_4_byte_gpte(sp.role):
            return 8 * index, 8
        if sp.level == PG_LEVEL_4K:
            return 4 * (role_quadrant(sp.role) << 9 | index), 4
        return 4 * (role_quadrant(sp.role) << 8 | index >> 1), 4

    def _gpte(self, sp: KvmMmuPage, index: int) -> int | None:
        offset, size = self._at(sp, index)
        data = self._read(sp, offset, size)
        return None if data is None else int.from_bytes(data, "little")

    def _told(self, sp: KvmMmuPage, index: int, spte: int, gpte: int) -> str:
        return f"{spte:#x}, entry {index} of {sp!r}, stands for the guest's {gpte:#x}"

    def _disagrees(self, sp: KvmMmuPage, index: int, spte: int, gpte: int) -> str:
        """What is wrong with a present SPTE for this guest entry; nothing if it is right."""
        if not is_present_gpte(gpte):
            return "that is not present"
        four = role_has_4_byte_gpte(sp.role)
        paging = PAGING32 if four else PAGING64
        huge = sp.level > PG_LEVEL_4K and gpte & PT_PAGE_SIZE_MASK != 0
        if huge and four and not is_last_spte(spte, sp.level):
            # Whether bit 7 counts is CR4.PSE's to say, of which no role of a page knows.
            huge = role_direct(self.kvm.sps[spte_to_pfn(spte)].role)
        gfn = gpte_to_gfn_lvl(paging, gpte, sp.level) if huge else gpte_to_gfn(paging, gpte)
        if huge and four:
            gfn += ((gpte & _PSE36_MASK) << _PSE36_SHIFT) + ((index & 1) << 9)
        access = role_access(sp.role) & gpte_access(gpte)
        if is_last_spte(spte, sp.level):
            if sp.level > PG_LEVEL_4K and not huge:
                return "that points to a table"
            if gfn != kvm_mmu_page_get_gfn(sp, index):
                return f"it maps gfn {kvm_mmu_page_get_gfn(sp, index):#x}, not {gfn:#x}"
            given = spte & (ACC_WRITE_MASK | ACC_USER_MASK)
            given |= ACC_EXEC_MASK if self.kvm.spte.is_executable_pte(spte) else 0
            return self._too_much(sp, given, access, gpte)
        child = self.kvm.sps[spte_to_pfn(spte)]
        if (child.role ^ sp.role) & ~_CHILD_ROLE_IGN or child.level != sp.level - 1:
            return f"it points to a page of role {child.role:#x}"
        if child.gfn != gfn or role_direct(child.role) != huge:
            return f"it points to {child!r}, not to gfn {gfn:#x}"
        if huge:
            return self._too_much(sp, role_access(child.role), access, gpte)
        below = role_access(child.role)
        return f"the page below has rights {below}, the guest gives {access}" if below & ~access else ""

    @staticmethod
    def _too_much(sp: KvmMmuPage, given: int, access: int, gpte: int) -> str:
        """Whether a mapping gives more than the guest's tables, or than CR0.WP emulation has to."""
        if given & ACC_WRITE_MASK and not (access & ACC_WRITE_MASK and gpte & PT_DIRTY_MASK):
            if access & ACC_WRITE_MASK or sp.role & ROLE_CR0_WP or given & ACC_USER_MASK:
                return "it can be written"
            if sp.role & ROLE_SMEP_ANDNOT_WP and given & ACC_EXEC_MASK:
                return "it can be executed by the supervisor"
            given &= ~ACC_WRITE_MASK
        return f"it has rights {given}, the guest gives {access}" if given & ~access else ""

    # -- checks ---------------------------------------------------------------------------------

    def _check_protected(self, gfn: int, spte: int) -> None:
        for sp in self.kvm.mmu_page_hash.get(gfn, ()):
            if not role_direct(sp.role) and not sp.unsync and not is_obsolete_sp(self.kvm, sp):
                why = f"{spte:#x} lets the guest write gfn {gfn:#x}, a table that {sp!r} shadows in step"
                self._broken("shadow-protected", why)

    def _check_entry(self, sp: KvmMmuPage, index: int, seq: int | None) -> None:
        spte = self.kvm.ram.u64[sp.spt << 9 | index]
        copy = self._copies.get(sp.spt)
        if not is_shadow_present_pte(spte) or copy is None:
            return
        gpte = self._gpte(sp, index)
        offset, size = self._at(sp, index)
        if gpte is None or (gpte ^ int.from_bytes(copy[offset : offset + size], "little")) & ~_AD:
            return
        if wrong := self._disagrees(sp, index, spte, gpte):
            self._broken("shadow-agrees", f"{self._told(sp, index, spte, gpte)}: {wrong}", seq)

    def _is_in_step(self, sp: KvmMmuPage | None) -> bool:
        return sp is not None and not (
            role_direct(sp.role) or sp.unsync or sp.tdp_mmu_page or is_obsolete_sp(self.kvm, sp)
        )

    def check(self) -> None:
        """Check what was noted; not while somebody is in the middle of it."""
        kvm = self.kvm
        if not (self._noted or self._noted_pages) or kvm.mmu_lock.owner is not None:
            return
        noted, self._noted = self._noted, {}
        pages, self._noted_pages = self._noted_pages, {}
        for sptep, seq in noted.items():
            sp = kvm.sps.get(sptep >> 9)
            if sp is not None and self._is_in_step(sp):
                self._check_entry(sp, sptep & 511, seq)
        for spt, seq in pages.items():
            sp = kvm.sps.get(spt)
            if sp is not None and self._is_in_step(sp):
                for index in range(512):
                    self._check_entry(sp, index, seq)

    def sweep(self) -> None:
        """Check all pages, the marks above unsync ones, and the counts."""
        kvm = self.kvm
        self.check()
        if kvm.mmu_lock.owner is not None:
            return
        for sp in tuple(kvm.sps.values()):
            if self._is_in_step(sp):
                for index in range(512):
                    self._check_entry(sp, index, None)
            if not sp.invalid and sp.level > PG_LEVEL_4K:
                self._check_marks(sp)
        self._check_counts()

    def _check_marks(self, sp: KvmMmuPage) -> None:
        kvm = self.kvm
        for index, spte in enumerate(kvm.ram.u64[sp.spt << 9 : (sp.spt << 9) + 512].tolist()):
            if not is_shadow_present_pte(spte) or is_last_spte(spte, sp.level):
                continue
            child = kvm.sps[spte_to_pfn(spte)]
            if (child.unsync or child.unsync_child_bitmap) and index not in sp.unsync_child_bitmap:
                why = f"entry {index} of {sp!r} leads to {child!r}, and is not marked"
                self._broken("shadow-unsync", why)

    def _check_counts(self) -> None:
        kvm = self.kvm
        shadowing = [sp for sp in kvm.sps.values() if not role_direct(sp.role) and not sp.invalid]
        if len(shadowing) != kvm.indirect_shadow_pages:
            why = f"{len(shadowing)} pages shadow tables, {kvm.indirect_shadow_pages} are counted"
            self._broken("shadow-counts", why)
        unsync = sum(sp.unsync for sp in kvm.sps.values())
        if unsync != kvm.stat["mmu_unsync"]:
            self._broken("shadow-counts", f"{unsync} pages are unsync, {kvm.stat['mmu_unsync']} are counted")
        roles = Counter((sp.gfn, sp.role) for sp in shadowing if not is_obsolete_sp(kvm, sp))
        if roles and max(roles.values()) > 1:
            self._broken("shadow-counts", f"gfn and role of two pages: {roles.most_common(1)}")
        for slots in kvm.memslots:
            for slot in slots:
                self._check_slot(slot, [sp for sp in shadowing if self._slot(sp) is slot])

    def _check_slot(self, slot: KvmMemorySlot, shadowing: list[KvmMmuPage]) -> None:
        tracked = Counter(sp.gfn - slot.base_gfn for sp in shadowing if sp.level > PG_LEVEL_4K)
        have = Counter(slot.gfn_write_track)
        kvm = self.kvm
        own_nodes = int(kvm.profile.mmu_is_page_track_node)
        others = kvm.external_write_tracking_enabled or len(kvm.track_notifier_list) > own_nodes
        if tracked - have or (have != tracked and not others):
            self._broken("shadow-counts", f"write tracking of {slot!r}: {dict(have)}, tables {dict(tracked)}")
        fresh = slot.copy()
        alloc_lpage_info(fresh)
        lowest = [sp.gfn for sp in shadowing if sp.level == PG_LEVEL_4K]
        reasons = [*lowest, *(page + slot.base_gfn for page in have.elements())]
        for level, (now, base) in enumerate(zip(slot.lpage_info, fresh.lpage_info, strict=True), 2):
            shift = 9 * (level - 1)
            want = Counter((gfn >> shift) - (slot.base_gfn >> shift) for gfn in reasons)
            for index, count in enumerate(now):
                if count & 0x7FFFFFFF != base[index] + want[index]:
                    why = f"huge page {index} of level {level} in {slot!r} has {count} reasons against it"
                    self._broken("shadow-counts", f"{why}, not {base[index] + want[index]}")

"""How the CPU turns a linear address into a physical one: the two-dimensional page walk.

Every guest paging-structure entry is itself fetched at a guest-physical address, which goes through
EPT; so does the final guest-physical address. One source for both ways of running: plain Python
over `memoryview('q')`, or compiled by Numba (compile.py) over the same bytes. Hence signed 64-bit
ints throughout, bit 63 tested as `entry < 0`, results as tuples of ints, no module state.

Source: Intel SDM vol. 3A 4.3 to 4.8 (32-bit, PAE, 4-level and 5-level paging, access rights, #PF, A and D
flags); vol. 3C 29.3.2 (EPT translation), 29.3.3.1 (misconfigurations), 29.3.3.2 (violations), 29.3.3.3
(which of several faults wins), 29.3.5 (A and D flags for EPT), 29.3.6 (page-modification logging), table
28-7 (exit qualification).

A result is (status, hpa, rights, a, b, c):

    status            hpa             rights       a               b                   c
    OK                of the access   R W X bits   gpa             guest leaf level    EPT leaf level
    PAGE_FAULT        0               0            error code      gpa of the entry    guest level
    EPT_VIOLATION     0               0            qualification   gpa                 guest level
    EPT_MISCONFIG     0               0            EPT level       gpa                 guest level
    NON_CANONICAL     0               0            0               0                   0
    OUTSIDE_RAM       the bad one     0            0               gpa                 guest level
    PML_FULL          0               0            EPT level       gpa                 guest level

The guest level is that of the table whose entry was used (4: PML4; 3 in PAE paging: a PDPTE register), and 0
for the final access (or with paging off). `rights` says what the translation permits this privilege with no
further update of A or D flags: what a TLB may cache. An EPT violation's gpa is exact for a paging-structure
entry and has the offset of the `gva` asked for otherwise.

Choices where the SDM leaves room: the A flag of a guest entry that refers to a table is set before
the next entry is read; the leaf's A and D once the access rights allow the access and before the
final EPT translation; EPT A and D flags once that gpa's translation succeeded.

CR4.PAE, CR4.LA57 and EFER.LMA choose the paging mode, and so the level of the root. `pdpte` is the PDPTE
register of `gva`'s bits 31:30 and matters in PAE paging only.

`pml` is where the VMCS's words for page-modification logging begin, as an index of `mem`; 0: off. Before
EPT flags are set the log's index is looked at: if the log is full nothing is set and the access leaves the
guest, even one that would set an accessed flag only.

Not modelled: protection keys; shadow stacks; mode-based execute control; memory types; paging-structure
caches.
"""

from __future__ import annotations

from emu.cpu.paging import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    MAXPHYADDR,
    PDE32_RESERVED,
    PFERR_FETCH,
    PFERR_PRESENT,
    PFERR_RSVD,
    PFERR_USER,
    PFERR_WRITE,
    PTE_ACCESSED,
    PTE_ADDR_MASK,
    PTE_DIRTY,
    PTE_PRESENT,
    PTE_PS,
    PTE_RW,
    PTE_USER,
    is_canonical,
    pde32_frame,
    pte_reserved,
    table_index,
)
from emu.cpu.words import Words
from kvm_model.vmx.ept import (
    EPT_ACCESSED,
    EPT_ADDR_MASK,
    EPT_DIRTY,
    EPT_LARGE,
    EPT_RWX_MASK,
    EPT_WRITABLE,
    EPTP_AD_ENABLE,
    PML_ENTRIES,
    VMCS_PML_ADDRESS,
    VMCS_PML_INDEX,
    ept_index,
    ept_misconfigured,
)
from kvm_model.vmx.exits import EPT_ACC_EXEC, EPT_ACC_READ, EPT_ACC_WRITE, EPT_GVA_TRANSLATED, EPT_GVA_VALID

__all__ = [
    "ACCESS_AC", "ACCESS_FETCH", "ACCESS_IMPLICIT", "ACCESS_READ", "ACCESS_USER", "ACCESS_WRITE",
    "EPT_MISCONFIG", "EPT_VIOLATION", "NON_CANONICAL", "OK", "OUTSIDE_RAM", "PAGE_FAULT", "PML_FULL",
    "RIGHT_R", "RIGHT_W", "RIGHT_X", "STATUS_NAMES", "Walk", "ept_set_accessed_dirty",
    "ept_translate", "guest_rights", "page_fault_code", "pml_log", "walk", "walk_guest",
    "walk_tables", "walk_tables32",
]

OK = 0
PAGE_FAULT = 1
EPT_VIOLATION = 2
EPT_MISCONFIG = 3
NON_CANONICAL = 4
OUTSIDE_RAM = 5
PML_FULL = 6

STATUS_NAMES = {
    OK: "ok",
    PAGE_FAULT: "page-fault",
    EPT_VIOLATION: "ept-violation",
    EPT_MISCONFIG: "ept-misconfig",
    NON_CANONICAL: "non-canonical",
    OUTSIDE_RAM: "outside-ram",
    PML_FULL: "pml-full",
}

ACCESS_READ = 0
ACCESS_WRITE = PFERR_WRITE
ACCESS_USER = PFERR_USER
"""Made at CPL 3 and not implicitly supervisor."""
ACCESS_FETCH = PFERR_FETCH
ACCESS_IMPLICIT = 1 << 8
"""An implicit supervisor-mode access: descriptor tables, TSS. EFLAGS.AC does not exempt it from SMAP."""
ACCESS_AC = 1 << 9
"""EFLAGS.AC is 1."""

RIGHT_R = 1
RIGHT_W = 2
RIGHT_X = 4

Walk = tuple[int, int, int, int, int, int]

_CR3_MASK = PTE_ADDR_MASK & ((1 << MAXPHYADDR) - 1)
_CR3_MASK_PAE = 0xFFFFFFE0
_FRAME32 = 0xFFFFF000
_EPTP_MASK = _CR3_MASK
_READ_WRITE = EPT_ACC_READ | EPT_ACC_WRITE


def ept_set_accessed_dirty(mem: Words, eptp: int, gpa: int, leaf_level: int, write: int) -> None:
    """Set A in every EPT entry that translates `gpa`, and D in the leaf for a write (SDM 29.3.5)."""
    table = eptp & _EPTP_MASK
    level = 4
    while level > leaf_level:
        slot = (table >> 3) + ept_index(gpa, level)
        entry = mem[slot]
        if not entry & EPT_ACCESSED:
            mem[slot] = entry | EPT_ACCESSED
        table = entry & EPT_ADDR_MASK
        level -= 1
    slot = (table >> 3) + ept_index(gpa, level)
    entry = mem[slot] | EPT_ACCESSED
    if write:
        entry |= EPT_DIRTY
    mem[slot] = entry


def pml_log(mem: Words, pml: int, gpa: int) -> None:
    """Enter the page of `gpa` into the log, which is not full; its index has 16 bits and goes down."""
    index = mem[pml + VMCS_PML_INDEX]
    mem[(mem[pml + VMCS_PML_ADDRESS] >> 3) + index] = gpa & ~0xFFF
    mem[pml + VMCS_PML_INDEX] = (index - 1) & 0xFFFF


def ept_translate(
    mem: Words, nr_frames: int, eptp: int, pml: int, gpa: int, access: int
) -> tuple[int, int, int, int]:
    """(status, hpa, rights, EPT level) of a guest-physical access; `access` in EPT_ACC_* bits.

    On EPT_VIOLATION `rights` is the AND of the entries' R, W and X, as the qualification wants it;
    on OK its W is clear where a write would still have to set D. eptp 0 means: no EPT.
    """
    if eptp == 0:
        if gpa >> 12 >= nr_frames:
            return OUTSIDE_RAM, gpa, 0, 0
        return OK, gpa, RIGHT_R | RIGHT_W | RIGHT_X, 0
    table = eptp & _EPTP_MASK
    combined = EPT_RWX_MASK | EPT_ACCESSED
    level = 4
    while True:
        if table >> 12 >= nr_frames:
            return OUTSIDE_RAM, table, 0, level
        entry = mem[(table >> 3) + ept_index(gpa, level)]
        if not entry & EPT_RWX_MASK:
            return EPT_VIOLATION, 0, 0, level
        if ept_misconfigured(entry, level):
            return EPT_MISCONFIG, 0, 0, level
        combined &= entry
        if level == 1 or entry & EPT_LARGE:
            break
        table = entry & EPT_ADDR_MASK
        level -= 1
    rights = combined & EPT_RWX_MASK
    if access & ~rights:
        return EPT_VIOLATION, 0, rights, level
    offset_mask = (1 << (12 + 9 * (level - 1))) - 1
    hpa = (entry & EPT_ADDR_MASK & ~offset_mask) | (gpa & offset_mask)
    if hpa >> 12 >= nr_frames:
        return OUTSIDE_RAM, hpa, 0, level
    if eptp & EPTP_AD_ENABLE:
        write = access & EPT_ACC_WRITE
        if not combined & EPT_ACCESSED or (write and not entry & EPT_DIRTY):
            if pml and mem[pml + VMCS_PML_INDEX] >= PML_ENTRIES:
                return PML_FULL, 0, 0, level
            ept_set_accessed_dirty(mem, eptp, gpa, level, write)
            if pml and write and not entry & EPT_DIRTY:
                pml_log(mem, pml, gpa)
        if not write and not entry & EPT_DIRTY:
            rights &= ~EPT_WRITABLE
    return OK, hpa, rights, level


def page_fault_code(access: int, cr4: int, efer: int) -> int:
    """W/R, U/S and I/D of the error code of a #PF that `access` causes (SDM 4.7)."""
    code = access & (PFERR_WRITE | PFERR_USER)
    if access & ACCESS_FETCH and ((efer & EFER_NXE and cr4 & CR4_PAE) or cr4 & CR4_SMEP):
        code |= PFERR_FETCH
    return code


def guest_rights(combined: int, xd: int, cr0: int, cr4: int, access: int) -> int:
    """R, W and X that the guest's entries give to the privilege of `access` (SDM 4.6).

    `combined` is the AND of all entries (R/W and U/S matter), `xd` nonzero if any has XD.
    """
    rights = 0
    if access & ACCESS_USER:
        if combined & PTE_USER:
            rights = RIGHT_R
            if combined & PTE_RW:
                rights |= RIGHT_W
            if not xd:
                rights |= RIGHT_X
        return rights
    user_page = combined & PTE_USER
    exempt = access & ACCESS_AC and not access & ACCESS_IMPLICIT
    if not (user_page and cr4 & CR4_SMAP) or exempt:
        rights = RIGHT_R
        if combined & PTE_RW or not cr0 & CR0_WP:
            rights |= RIGHT_W
    if not xd and not (user_page and cr4 & CR4_SMEP):
        rights |= RIGHT_X
    return rights


def walk_tables32(
    mem: Words, nr_frames: int, cr0: int, cr4: int, eptp: int, pml: int, gva: int, access: int, table: int
) -> Walk:
    """A walk of the guest's tables in 32-bit paging: two levels of 4-byte entries, 4M pages, no XD."""
    need = RIGHT_R
    if access & ACCESS_WRITE:
        need = RIGHT_W
    elif access & ACCESS_FETCH:
        need = RIGHT_X
    structure = EPT_ACC_READ
    if eptp & EPTP_AD_ENABLE:
        structure = _READ_WRITE
    combined = PTE_RW | PTE_USER
    level = 2
    while True:
        gpa = table + (gva >> (12 + 10 * (level - 1)) & 1023) * 4
        status, hpa, ept_rights, ept_level = ept_translate(mem, nr_frames, eptp, pml, gpa, structure)
        if status == EPT_VIOLATION:
            return status, 0, 0, structure | ept_rights << 3 | EPT_GVA_VALID, gpa, level
        if status != OK:
            return status, hpa, 0, ept_level, gpa, level
        half = (hpa & 4) * 8
        entry = mem[hpa >> 3] >> half & 0xFFFFFFFF
        if not entry & PTE_PRESENT:
            return PAGE_FAULT, 0, 0, page_fault_code(access, cr4, 0), gpa, level
        large = level == 2 and cr4 & CR4_PSE and entry & PTE_PS
        if large and entry & PDE32_RESERVED:
            code = PFERR_PRESENT | PFERR_RSVD | page_fault_code(access, cr4, 0)
            return PAGE_FAULT, 0, 0, code, gpa, level
        combined &= entry
        wanted = entry | PTE_ACCESSED
        leaf = level == 1 or large
        if leaf:
            rights = guest_rights(combined, 0, cr0, cr4, access)
            if not rights & need:
                return PAGE_FAULT, 0, 0, PFERR_PRESENT | page_fault_code(access, cr4, 0), gpa, level
            if access & ACCESS_WRITE:
                wanted |= PTE_DIRTY
        if wanted != entry:
            if not ept_rights & RIGHT_W:
                return EPT_VIOLATION, 0, 0, _READ_WRITE | ept_rights << 3 | EPT_GVA_VALID, gpa, level
            mem[hpa >> 3] |= (wanted ^ entry) << half
        if leaf:
            if not wanted & PTE_DIRTY:
                rights &= ~RIGHT_W
            if level == 1:
                return OK, entry & _FRAME32 | gva & 0xFFF, rights, 0, 0, level
            return OK, pde32_frame(entry) | gva & 0x3FFFFF, rights, 0, 0, level
        table = entry & _FRAME32
        level -= 1


def walk_tables(
    mem: Words, nr_frames: int, cr0: int, cr4: int, efer: int, eptp: int, pml: int, gva: int, access: int,
    table: int, level: int,
) -> Walk:
    """The rest of a walk of the guest's tables, from the table of `level` at `table` on."""
    need = RIGHT_R
    if access & ACCESS_WRITE:
        need = RIGHT_W
    elif access & ACCESS_FETCH:
        need = RIGHT_X
    # With A/D flags for EPT, accesses to guest paging structures count as writes (SDM 29.3.3.2).
    structure = EPT_ACC_READ
    if eptp & EPTP_AD_ENABLE:
        structure = _READ_WRITE
    combined = PTE_RW | PTE_USER
    xd = 0
    while True:
        gpa = table + table_index(gva, level) * 8
        status, hpa, ept_rights, ept_level = ept_translate(mem, nr_frames, eptp, pml, gpa, structure)
        if status == EPT_VIOLATION:
            return status, 0, 0, structure | ept_rights << 3 | EPT_GVA_VALID, gpa, level
        if status != OK:
            return status, hpa, 0, ept_level, gpa, level
        entry = mem[hpa >> 3]
        if not entry & PTE_PRESENT:
            return PAGE_FAULT, 0, 0, page_fault_code(access, cr4, efer), gpa, level
        if pte_reserved(entry, level, efer):
            code = PFERR_PRESENT | PFERR_RSVD | page_fault_code(access, cr4, efer)
            return PAGE_FAULT, 0, 0, code, gpa, level
        combined &= entry
        if entry < 0:
            xd = 1
        wanted = entry | PTE_ACCESSED
        leaf = level == 1 or entry & PTE_PS
        if leaf:
            rights = guest_rights(combined, xd, cr0, cr4, access)
            if not rights & need:
                return PAGE_FAULT, 0, 0, PFERR_PRESENT | page_fault_code(access, cr4, efer), gpa, level
            if access & ACCESS_WRITE:
                wanted |= PTE_DIRTY
        if wanted != entry:
            # The update is a locked read-modify-write: both access bits are reported.
            if not ept_rights & RIGHT_W:
                return EPT_VIOLATION, 0, 0, _READ_WRITE | ept_rights << 3 | EPT_GVA_VALID, gpa, level
            mem[hpa >> 3] = wanted
        if leaf:
            if not wanted & PTE_DIRTY:
                rights &= ~RIGHT_W
            offset_mask = (1 << (12 + 9 * (level - 1))) - 1
            return OK, (entry & PTE_ADDR_MASK & ~offset_mask) | (gva & offset_mask), rights, 0, 0, level
        table = entry & PTE_ADDR_MASK
        level -= 1


def walk_guest(
    mem: Words, nr_frames: int, cr0: int, cr3: int, cr4: int, efer: int, eptp: int, pml: int, pdpte: int,
    gva: int, access: int,
) -> Walk:
    """The guest's tables only: (OK, gpa, rights, 0, 0, level), or what `walk` then answers."""
    if efer & EFER_LMA:
        if not is_canonical(gva, cr4):
            return NON_CANONICAL, 0, 0, 0, 0, 0
        if not cr4 & CR4_LA57:
            # A call of its own: where the compiler knows the level it unrolls the walk.
            return walk_tables(mem, nr_frames, cr0, cr4, efer, eptp, pml, gva, access, cr3 & _CR3_MASK, 4)
        table, level = cr3 & _CR3_MASK, 5
    else:
        gva &= 0xFFFFFFFF
        if not cr4 & CR4_PAE:
            return walk_tables32(mem, nr_frames, cr0, cr4, eptp, pml, gva, access, cr3 & _FRAME32)
        if not pdpte & PTE_PRESENT:
            gpa = (cr3 & _CR3_MASK_PAE) + (gva >> 30) * 8
            return PAGE_FAULT, 0, 0, page_fault_code(access, cr4, efer), gpa, 3
        table, level = pdpte & PTE_ADDR_MASK, 2
    return walk_tables(mem, nr_frames, cr0, cr4, efer, eptp, pml, gva, access, table, level)


def walk(
    mem: Words, nr_frames: int, cr0: int, cr3: int, cr4: int, efer: int, eptp: int, pml: int, pdpte: int,
    gva: int, access: int,
) -> Walk:
    """Translate `gva` for `access` (ACCESS_* bits), updating A and D flags; see the module for the result."""
    if cr0 & CR0_PG:
        result = walk_guest(mem, nr_frames, cr0, cr3, cr4, efer, eptp, pml, pdpte, gva, access)
        if result[0] != OK:
            return result
        _, gpa, rights, _, _, level = result
    else:
        gpa, rights, level = gva & 0xFFFFFFFF, RIGHT_R | RIGHT_W | RIGHT_X, 0

    ept_access = EPT_ACC_READ
    if access & ACCESS_WRITE:
        ept_access = EPT_ACC_WRITE
    elif access & ACCESS_FETCH:
        ept_access = EPT_ACC_EXEC
    status, hpa, ept_rights, ept_level = ept_translate(mem, nr_frames, eptp, pml, gpa, ept_access)
    if status == EPT_VIOLATION:
        qualification = ept_access | ept_rights << 3 | EPT_GVA_VALID | EPT_GVA_TRANSLATED
        return status, 0, 0, qualification, gpa, 0
    if status != OK:
        return status, hpa, 0, ept_level, gpa, 0
    return OK, hpa, rights & ept_rights, gpa, level, ept_level

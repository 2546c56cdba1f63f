"""The walk of a CPU that runs a guest without EPT: one dimension, over tables that KVM made.

CR3 then holds KVM's root and not the guest's; the other control registers are the guest's with what KVM
needs forced on, as the VMCS's guest-state area has them while the guest reads its own values from the read
shadows. Below a guest in IA-32e mode there is the paging mode it chose, 4-level or 5-level, below any other,
one without paging included, PAE. The PDPTEs of PAE paging are registers, loaded at VM entry.

Twice used like walk.py, whose result this has; an OK has 0 for `a`, the leaf's level for `b` and 0 for `c`,
and the address of an entry is a host-physical one. Level 3 in PAE paging is that of the PDPTE.

Source: arch/x86/kvm/vmx/vmx.c: vmx_set_cr0, vmx_set_cr4, vmx_load_mmu_pgd, update_transition_efer (Linux
6.18); Intel SDM vol. 3A 4.4, 4.5; vol. 3C 27.3.2.4 (PDPTEs at VM entry).

Not modelled: reserved bits in PDPTEs, which would fail the VM entry.
"""

from __future__ import annotations

from emu.cpu.paging import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    PTE_ADDR_MASK,
    PTE_PRESENT,
    is_canonical,
)
from emu.cpu.walk import NON_CANONICAL, OK, OUTSIDE_RAM, PAGE_FAULT, Walk, page_fault_code, walk_tables
from emu.cpu.words import Words

__all__ = ["walk_shadow"]


def walk_shadow(
    mem: Words, nr_frames: int, cr0: int, cr4: int, efer: int, root: int, pdpte: int, gva: int, access: int
) -> Walk:
    """Translate `gva` by the tables at `root`; `cr0`, `cr4` and `efer` as the guest sees them.

    `pdpte` is the one that translates `gva`, where the guest is not in IA-32e mode.
    """
    efer |= EFER_NXE
    if not cr0 & CR0_PG:
        cr4 &= ~(CR4_SMEP | CR4_SMAP)
    cr0 |= CR0_WP
    cr4 |= CR4_PAE
    table, level = root & PTE_ADDR_MASK, 4
    if cr4 & CR4_LA57:
        level = 5
    if not efer & EFER_LMA:
        gva &= 0xFFFFFFFF
        if not pdpte & PTE_PRESENT:
            return PAGE_FAULT, 0, 0, page_fault_code(access, cr4, efer), root + (gva >> 30) * 8, 3
        table, level = pdpte & PTE_ADDR_MASK, 2
    elif not is_canonical(gva, cr4):
        return NON_CANONICAL, 0, 0, 0, 0, 0
    status, hpa, rights, a, b, c = walk_tables(
        mem, nr_frames, cr0, cr4, efer, 0, 0, gva, access, table, level
    )
    if status != OK:
        return status, hpa, rights, a, b, c
    if hpa >> 12 >= nr_frames:
        return OUTSIDE_RAM, hpa, 0, 0, hpa, c
    return OK, hpa, rights, 0, c, 0

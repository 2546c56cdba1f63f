"""The PDPTE registers of PAE paging: when the CPU loads them, and what it refuses.

They are loaded from the 32 bytes at CR3 by a MOV to CR3 in PAE paging, and by a MOV to CR0 or CR4 that leads
into PAE paging or changes CD, NW, PG, PAE, PGE, PSE or SMEP there; not by an access. Under EPT the read goes
through EPT as a read, sets no EPT dirty flag, and its violation has no linear address. (Under shadow paging
these instructions exit, KVM loads the guest's, and the CPU's own come with VM entry: fill.py.)

Source: Intel SDM vol. 3A 4.4.1 (PDPTE registers), table 4-8; vol. 3C table 28-7 (bit 7), 29.3.3.2.

Not modelled: task switches, which load them, too.
"""

from __future__ import annotations

from emu.cpu.memory import VECTOR_GP, GuestFault, raise_walk_failure
from emu.cpu.paging import (
    CR0_PG,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMEP,
    PTE_PRESENT,
    pae_paging,
    pdpte_reserved,
)
from emu.cpu.vcpu import UnicornVcpu
from emu.cpu.walk import EPT_VIOLATION, OK, ept_translate
from kvm_model.vmx.exits import EPT_ACC_READ

__all__ = ["load_pdptes", "load_pdptes_for_cr0", "load_pdptes_for_cr4"]

_CR0_NW, _CR0_CD = 1 << 29, 1 << 30
_CR0_BITS = CR0_PG | _CR0_NW | _CR0_CD
_CR4_BITS = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP
_TABLE = 0xFFFFFFE0


def load_pdptes(vcpu: UnicornVcpu, cr3: int) -> None:
    """Load all four from the table at `cr3`. #GP with a reserved bit in a present one: none is changed."""
    fill = vcpu.fill
    gpa = cr3 & _TABLE
    status, hpa, rights, level = ept_translate(
        fill.ram.i64, fill.ram.nr_frames, fill.eptp, fill.pml, gpa, EPT_ACC_READ
    )
    if status != OK:
        code = EPT_ACC_READ | rights << 3 if status == EPT_VIOLATION else level
        raise_walk_failure((status, hpa, 0, code, gpa, 3), 0, shadow=False)
    entries = [fill.ram.i64[(hpa >> 3) + n] for n in range(4)]
    if any(entry & PTE_PRESENT and pdpte_reserved(entry) for entry in entries):
        raise GuestFault(VECTOR_GP, 0)
    fill.pdptes = entries


def load_pdptes_for_cr0(vcpu: UnicornVcpu, cr0: int) -> None:
    """What a MOV of `cr0` to CR0 does to them first."""
    env = vcpu.env
    if pae_paging(cr0, env.cr(4), env.efer) and (cr0 ^ env.cr(0)) & _CR0_BITS:
        load_pdptes(vcpu, env.cr(3))


def load_pdptes_for_cr4(vcpu: UnicornVcpu, cr4: int) -> None:
    """What a MOV of `cr4` to CR4 does to them first."""
    env = vcpu.env
    if pae_paging(env.cr(0), cr4, env.efer) and (cr4 ^ env.cr(4)) & _CR4_BITS:
        load_pdptes(vcpu, env.cr(3))

"""Emulating an instruction's access to memory: through the memslots, or as MMIO in user space.

Source of truth: arch/x86/kvm/x86.c (Linux 6.18): x86_emulate_instruction, handle_emulation_failure,
kvm_unprotect_and_retry_on_failure, emulator_read_write, emulator_read_write_onepage,
emulator_cmpxchg_emulated, emulator_write_phys, vcpu_is_mmio_gpa, vcpu_mmio_gva_to_gpa, kvm_fetch_guest_virt,
inject_emulated_exception, complete_emulated_mmio; emulate.c: writeback.

The CPU decodes and says what to load or store (kvm_x86_ops.py: MmioAccess); here that is done, piece by piece
where it crosses a page. A store to guest memory goes by the VMM's mapping, is logged, and is told to whoever
tracks writes; a locked one is an exchange by compare, and if another CPU was first, the guest executes the
instruction again. What no memslot takes goes to user space.

Where KVM shadows the guest's tables every address is linear, the instruction's own bytes' too, and is
translated by the guest's tables, whose page faults the guest then gets. An instruction that hardly writes
page tables is rather left to the CPU, after what shadows its page is gone.

Not modelled: MMIO of more than 8 bytes, the #UD that a guest in ring 3 gets for what cannot be
emulated (here the VM stops as for ring 0), under EPT the emulator's own reads of guest code: where EPT has
lost the page, the guest fetches it anew; 5.10's endless retry of what cannot be emulated on a page that is
not shadowed but tracked (it ends the VM as in 6.18). Under EPT operands beside the one that exited go by the
CPU's walk, which may exit again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from host_mm.uaccess import try_cmpxchg_user
from kvm_model.guest_access import (
    kvm_vcpu_gfn_to_hva,
    kvm_vcpu_mark_page_dirty,
    kvm_vcpu_read_guest,
    kvm_vcpu_write_guest,
)
from kvm_model.kvm_x86_ops import EMULATE_RETRY
from kvm_model.lapic import APIC_DEFAULT_PHYS_BASE
from kvm_model.mmu.invalidate import INVALID_GPA
from kvm_model.mmu.invalidate_addr import kvm_inject_emulated_page_fault
from kvm_model.mmu.kvm_mmu import X86Exception, is_cr0_pg, permission_fault
from kvm_model.mmu.mmio import vcpu_match_mmio_gpa, vcpu_match_mmio_gva
from kvm_model.mmu.mmu_internal import PFERR_FETCH_MASK, PFERR_USER_MASK, PFERR_WRITE_MASK
from kvm_model.mmu.page_track import kvm_page_track_write
from kvm_model.mmu.paging_tmpl import gva_to_gpa
from kvm_model.mmu.unprotect import kvm_mmu_unprotect_gfn_and_retry
from kvm_model.vcpu import UserExit, Vcpu
from kvm_model.vmx.exits import EXIT_REASON_NAMES, INTR_INFO_VALID
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_x86_ops import MmioAccess

__all__ = ["TRACEPOINTS", "emulator_write_phys", "internal_error", "x86_emulate_instruction"]

_LONGEST_INSN = 15
_M64 = (1 << 64) - 1
_MMIO_TYPES = ("unsatisfied-read", "read", "write")
_MODES = {0: "real", 3: "vm16", 1: "prot16", 5: "prot32", 9: "prot64"}

KVM_MMIO = Tracepoint(
    "kvm", "kvm_mmio", ("type", "len", "gpa", "val"),
    lambda kind, length, gpa, val: f"mmio {_MMIO_TYPES[kind]} len {length} gpa 0x{gpa:x} val 0x{val:x}",
)
KVM_EMULATE_INSN = Tracepoint(
    "kvm", "kvm_emulate_insn", ("rip", "csbase", "len", "insn", "flags", "failed"),
    lambda rip, csbase, length, insn, flags, failed:
        f"{csbase:x}:{rip:x}:{insn} ({_MODES.get(flags, hex(flags))}){' failed' if failed else ''}",
)
VCPU_MATCH_MMIO = Tracepoint(
    "kvm", "vcpu_match_mmio", ("gva", "gpa", "write", "gpa_match"),
    lambda gva, gpa, write, gpa_match:
        f"gva {gva:#x} gpa {gpa:#x} {'Write' if write else 'Read'} {'GPA' if gpa_match else 'GVA'}",
)
TRACEPOINTS = (KVM_MMIO, KVM_EMULATE_INSN, VCPU_MATCH_MMIO)


def internal_error(vcpu: Vcpu, why: str) -> int:
    """KVM_EXIT_INTERNAL_ERROR about the last exit."""
    reason = EXIT_REASON_NAMES.get(vcpu.exit.reason, str(vcpu.exit.reason))
    vcpu.run = UserExit("internal-error", why=f"{reason} at rip {vcpu.exit.rip:#x}: {why}")
    return 0


class _PropagateFault(Exception):
    """X86EMUL_PROPAGATE_FAULT: the guest gets this page fault, and the instruction has not happened."""

    def __init__(self, fault: X86Exception) -> None:
        super().__init__(fault)
        self.fault = fault


def x86_emulate_instruction(vcpu: Vcpu, addr: int, *, allow_retry: bool = False) -> int:
    """Emulate the instruction at RIP, whose access at `addr` (a gpa, or linear under shadow paging) exited.

    `allow_retry`: it met write protection, and what cannot be emulated may be tried once more by the CPU.
    Above 0 to enter the guest, 0 for user space.
    """
    kvm = vcpu.kvm
    if vcpu.exit.idt_vectoring_info & INTR_INFO_VALID:
        # The access was the CPU's own, to deliver an event; no instruction at RIP makes it.
        return _failed(vcpu, addr, "an event was being delivered through MMIO", allow_retry)
    rip = kvm.cpu.get_reg(vcpu, "rip")
    try:
        access = kvm.cpu.emulate(vcpu, addr) if kvm.tdp_enabled else _decode(vcpu, addr, rip)
    except _PropagateFault as propagated:
        return _inject(vcpu, propagated.fault)
    if access is EMULATE_RETRY:
        return 1
    insn = access.insn if access is not None else b""
    mode = access.mode if access is not None else 9
    t = kvm.trace.kvm_emulate_insn
    if t is not None:
        t(rip, 0, len(insn), insn.hex(" "), mode, False)
    vcpu.stat["insn_emulation"] += 1
    if access is not None:
        if allow_retry and access.gva >= 0 and not access.page_table and _unprotect(vcpu, addr):
            return 1
        return _emulate_access(vcpu, addr, access)
    if t is not None:
        t(rip, 0, len(insn), insn.hex(" "), mode, True)
    return _failed(vcpu, addr, "the instruction cannot be emulated", allow_retry)


def _decode(vcpu: Vcpu, addr: int, rip: int) -> MmioAccess | None:
    """Fetch by the guest's tables, from a second page only if the instruction goes on there, and decode."""
    cpu = vcpu.kvm.cpu
    first = min(_LONGEST_INSN, 0x1000 - (rip & 0xFFF))
    code = _fetch(vcpu, rip, first)
    access = cpu.emulate(vcpu, addr, code)
    if access is None and first < _LONGEST_INSN:
        access = cpu.emulate(vcpu, addr, code + _fetch(vcpu, (rip + first) & _M64, _LONGEST_INSN - first))
    return access


def _user(vcpu: Vcpu) -> int:
    return PFERR_USER_MASK if vcpu.kvm.cpu.get_reg(vcpu, "cpl") == 3 else 0


def _gva_to_gpa(vcpu: Vcpu, gva: int, access: int) -> int:
    fault = X86Exception()
    gpa = gva_to_gpa(vcpu, gva, access | _user(vcpu), fault)
    if gpa == INVALID_GPA:
        raise _PropagateFault(fault)
    return gpa


def _fetch(vcpu: Vcpu, gva: int, length: int) -> bytes:
    """kvm_fetch_guest_virt; nothing where there is no memory."""
    gpa = _gva_to_gpa(vcpu, gva, PFERR_FETCH_MASK)
    try:
        return kvm_vcpu_read_guest(vcpu, gpa, length)
    except KernelError:
        return b""


def _inject(vcpu: Vcpu, fault: X86Exception) -> int:
    """inject_emulated_exception."""
    kvm_inject_emulated_page_fault(vcpu, fault)
    return 1


def _unprotect(vcpu: Vcpu, addr: int, *, always_retry: bool = False) -> bool:
    gpa = addr if vcpu.kvm.tdp_enabled else gva_to_gpa(vcpu, addr, PFERR_WRITE_MASK | _user(vcpu))
    return kvm_mmu_unprotect_gfn_and_retry(vcpu, addr, gpa, always_retry=always_retry)


def _failed(vcpu: Vcpu, addr: int, why: str, allow_retry: bool) -> int:
    """kvm_unprotect_and_retry_on_failure, else handle_emulation_failure."""
    if allow_retry and not vcpu.write_fault_to_shadow_pgtable:
        _unprotect(vcpu, addr, always_retry=True)
        return 1
    vcpu.stat["insn_emulation_fail"] += 1
    return internal_error(vcpu, why)


# -- one access -----------------------------------------------------------------------------------


def _parts(addr: int, access: MmioAccess) -> tuple[tuple[int, int], ...]:
    """(address, length) of each piece: linear addresses where the access has one."""
    if access.gva < 0:
        return access.parts or ((addr, access.length),)
    first = 0x1000 - (access.gva & 0xFFF)
    if first >= access.length:
        return ((access.gva, access.length),)
    return ((access.gva, first), ((access.gva + first) & _M64, access.length - first))


def _emulate_access(vcpu: Vcpu, addr: int, access: MmioAccess) -> int:
    try:
        return _do_access(vcpu, addr, access)
    except _PropagateFault as propagated:
        return _inject(vcpu, propagated.fault)


def _do_access(vcpu: Vcpu, addr: int, access: MmioAccess) -> int:
    """emulator_read_write or, for a locked store, emulator_cmpxchg_emulated."""
    parts = _parts(addr, access)
    if access.lock and len(parts) == 1:
        done = _cmpxchg_emulated(vcpu, parts[0][0], access)
        if done >= 0:
            # Another CPU was first: the guest executes the instruction again.
            return _finish_access(vcpu, addr, access, 0) if done else 1
    data = bytearray((access.data & (1 << 8 * access.length) - 1).to_bytes(access.length, "little"))
    mmio: list[tuple[int, int, int]] = []
    at = 0
    for start, length in parts:
        gpa, known_mmio = _locate(vcpu, start, access)
        if not _read_write_onepage(vcpu, gpa, length, access, data, at, known_mmio):
            mmio.append((gpa, at, length))
        at += length
    if mmio:
        vcpu.stat["mmio_exits"] += 1
        return _exit_mmio(vcpu, addr, access, data, mmio)
    return _finish_access(vcpu, addr, access, int.from_bytes(data, "little"))


def _locate(vcpu: Vcpu, addr: int, access: MmioAccess) -> tuple[int, bool]:
    """The gpa of a piece, and whether the vCPU's cache knows it as MMIO (vcpu_mmio_gva_to_gpa)."""
    if access.gva < 0:
        return addr, _vcpu_is_mmio_gpa(vcpu, vcpu.exit.guest_linear, addr, access.write)
    kind = PFERR_WRITE_MASK if access.write else 0
    if vcpu_match_mmio_gva(vcpu, addr) and not (
        is_cr0_pg(vcpu.mmu) and permission_fault(vcpu, vcpu.mmu, vcpu.mmio_access, kind | _user(vcpu))
    ):
        gpa = vcpu.mmio_gfn << 12 | addr & 0xFFF
        if (t := vcpu.kvm.trace.vcpu_match_mmio) is not None:
            t(addr, gpa, access.write, False)
        return gpa, True
    gpa = _gva_to_gpa(vcpu, addr, kind)
    return gpa, _vcpu_is_mmio_gpa(vcpu, addr, gpa, access.write)


def _finish_access(vcpu: Vcpu, addr: int, access: MmioAccess, data: int) -> int:
    """The access is done; the load of a read-modify-write is followed by its store."""
    store = vcpu.kvm.cpu.complete_mmio(vcpu, access, data)
    return 1 if store is None else _emulate_access(vcpu, addr, store)


def _is_apic(vcpu: Vcpu, gpa: int) -> bool:
    return vcpu.apic is not None and gpa & ~0xFFF == APIC_DEFAULT_PHYS_BASE


def _vcpu_is_mmio_gpa(vcpu: Vcpu, gva: int, gpa: int, write: bool) -> bool:
    if _is_apic(vcpu, gpa):
        return True
    if not vcpu_match_mmio_gpa(vcpu, gpa):
        return False
    if (t := vcpu.kvm.trace.vcpu_match_mmio) is not None:
        t(gva, gpa, write, True)
    return True


def emulator_write_phys(vcpu: Vcpu, gpa: int, data: bytes) -> bool:
    """The guest writes `data` at `gpa`: to memory, to the log, to who tracks it. False: no memory there."""
    try:
        kvm_vcpu_write_guest(vcpu, gpa, data)
    except KernelError:
        return False
    kvm_page_track_write(vcpu, gpa, data)
    return True


def _read_write_onepage(
    vcpu: Vcpu, gpa: int, length: int, access: MmioAccess, data: bytearray, at: int, known_mmio: bool
) -> bool:
    """One piece by the memslots or the local APIC, `data[at:]`; false if it is MMIO for user space."""
    if _is_apic(vcpu, gpa):
        assert vcpu.apic is not None
        if access.write:
            vcpu.apic.mmio_write(gpa & 0xFFF, length, int.from_bytes(data[at : at + length], "little"))
        else:
            value = vcpu.apic.mmio_read(gpa & 0xFFF, length)
            data[at : at + length] = value.to_bytes(length, "little")
        return True
    if known_mmio:
        return False
    if access.write:
        return emulator_write_phys(vcpu, gpa, bytes(data[at : at + length]))
    try:
        data[at : at + length] = kvm_vcpu_read_guest(vcpu, gpa, length)
    except KernelError:
        return False
    return True


def _cmpxchg_emulated(vcpu: Vcpu, addr: int, access: MmioAccess) -> int:
    """1: stored; 0: memory held something else; -1: to be emulated as a plain write."""
    length = access.length
    gpa = addr
    if access.gva >= 0:
        gpa = gva_to_gpa(vcpu, addr, PFERR_WRITE_MASK | _user(vcpu))
        if gpa == INVALID_GPA:
            return -1
    if length > 8 or length & length - 1 or (gpa & 0xFFF) + length > 0x1000:
        return -1
    if _is_apic(vcpu, gpa):
        return -1
    hva = kvm_vcpu_gfn_to_hva(vcpu, gpa >> 12, write=True)
    if hva < 0:
        return -1
    old, new = ((v & (1 << 8 * length) - 1).to_bytes(length, "little") for v in (access.old, access.data))
    try:
        stored = try_cmpxchg_user(vcpu.kvm.process, hva | gpa & 0xFFF, old, new)
    except KernelError:
        return -1
    # Logged even if nothing was stored: the CPU would have written the old value back.
    kvm_vcpu_mark_page_dirty(vcpu, gpa >> 12)
    if not stored:
        return 0
    kvm_page_track_write(vcpu, gpa, new)
    return 1


# -- MMIO -------------------------------------------------------------------------------------------


def _exit_mmio(
    vcpu: Vcpu, addr: int, access: MmioAccess, data: bytearray, mmio: list[tuple[int, int, int]]
) -> int:
    """The first fragment goes to user space; complete_emulated_mmio goes on with the others."""
    kvm = vcpu.kvm
    start, at, length = mmio[0]
    value = int.from_bytes(data[at : at + length], "little") if access.write else 0
    if (t := kvm.trace.kvm_mmio) is not None:
        t(2 if access.write else 0, length, start, value)
    vcpu.run = UserExit("mmio", gpa=start, size=length, write=access.write, data=value)
    if access.write:
        if len(mmio) > 1:
            vcpu.complete_userspace_io = lambda: _exit_mmio(vcpu, addr, access, data, mmio[1:])
        else:
            kvm.cpu.complete_mmio(vcpu, access, 0)
        return 0

    def complete() -> int:
        value = (vcpu.user_data or 0) & (1 << 8 * length) - 1
        if (t := kvm.trace.kvm_mmio) is not None:
            t(1, length, start, value)
        data[at : at + length] = value.to_bytes(length, "little")
        if len(mmio) > 1:
            return _exit_mmio(vcpu, addr, access, data, mmio[1:])
        return _finish_access(vcpu, addr, access, int.from_bytes(data, "little"))

    vcpu.complete_userspace_io = complete
    return 0

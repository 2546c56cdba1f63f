"""What the CPU makes of an access to the APIC-access page: the virtual-APIC page, or a VM exit.

Source: Intel SDM vol. 3C 30.4.2 (virtualizing reads), 30.4.3 (writes, APIC-write emulation), table 28-6 (exit
qualification); the controls "virtualize APIC accesses", "use TPR shadow" and "APIC-register
virtualization" are 1.

An aligned 32-bit access to a register that is virtualized goes to the virtual-APIC page. After a write the
CPU may leave the guest to let KVM do the rest (APIC-write), the instruction being over. Everything else is an
APIC-access exit before the instruction.

Not modelled: virtual-interrupt delivery (an EOI exits), accesses at event delivery to this page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from emu.cpu import mmio
from emu.cpu.insn import is_read_modify_write
from emu.cpu.walk import ACCESS_FETCH, ACCESS_WRITE
from kvm_model.vmx.exits import REASON_APIC_ACCESS, REASON_APIC_WRITE, VmExit

if TYPE_CHECKING:
    from emu.cpu.vcpu import UnicornVcpu

__all__ = ["apic_access"]

_TYPE_READ, _TYPE_WRITE, _TYPE_FETCH = 0, 1 << 12, 2 << 12
_TPR, _LDR_TO_SPIV = 0x80, (0xD0, 0xE0, 0xF0)
_READS = frozenset((
    0x20, 0x30, _TPR, 0xB0, *_LDR_TO_SPIV, *range(0x100, 0x290, 0x10), 0x300, 0x310,
    *range(0x320, 0x380, 0x10), 0x380, 0x3E0,
))
_WRITES = frozenset((
    0x20, _TPR, *_LDR_TO_SPIV, 0x280, 0x300, 0x310, *range(0x320, 0x380, 0x10), 0x380, 0x3E0,
))
_NO_EXIT_AFTER = (_TPR, 0x310)


def apic_access(v: UnicornVcpu, insn: Any, gpa: int, access: int) -> VmExit | None:
    """Do the instruction at RIP, whose operand is at `gpa` in the page, or the exit that it makes.

    `access`: ACCESS_* of what met the page.
    """
    offset = gpa & 0xFFF
    writes = access & ACCESS_WRITE or is_read_modify_write(insn)
    kind = _TYPE_FETCH if access & ACCESS_FETCH else _TYPE_WRITE if writes else _TYPE_READ
    size = 0 if insn is None else insn.size
    leave = VmExit(
        REASON_APIC_ACCESS, v.env.eip, offset | kind, gpa, gpa, insn_len=size if kind == _TYPE_WRITE else 0
    )
    if kind == _TYPE_FETCH or offset & 15 or (writes and offset not in _WRITES) or offset not in _READS:
        return leave
    step = mmio.emulate(v, insn, gpa)
    if step is None or step.length != 4 or step.parts:
        return leave
    at = v.virtual_apic + offset
    while step is not None:
        finish = cast("mmio.Finish", step.priv)
        if step.write:
            v.ram.write(at, (step.data & 0xFFFF_FFFF).to_bytes(4, "little"))
            step = finish(0)
        else:
            step = finish(int.from_bytes(v.ram.read(at, 4), "little"))
    if writes and offset not in _NO_EXIT_AFTER:
        return VmExit(REASON_APIC_WRITE, v.env.eip, offset, gpa)
    return None

"""The CPU's state as SMM saves, replaces and restores it.

Source: arch/x86/kvm/smm.h: struct kvm_smram_state_64 (AMD64's layout), smm.c: enter_smm, rsm_load_state_64;
Intel SDM vol. 3C 32.5 (the environment of SMM).

    0x000 ES CS SS DS FS GS GDTR LDTR IDTR TR, each selector 2, attributes 2, limit 4, base 8
    0x0cb interrupt shadow  0x0d0 EFER  0x0fc revision  0x100 SMBASE
    0x148 CR4 CR3 CR0 DR7 DR6 RFLAGS RIP  0x180 R15 ... R0

Not modelled: debug registers, FPU state (SMM keeps it as it is).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from emu.cpu.env import GDT, HF_INHIBIT_IRQ, IDT, LDT, R_CS, R_DS, R_ES, R_FS, R_GS, R_SS, SEG_SIZE, SEGS, TR
from emu.cpu.paging import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME
from emu.cpu.segments import DESC_DB, DESC_G, DESC_P, DESC_S, load_seg_cache

if TYPE_CHECKING:
    from emu.cpu.vcpu import UnicornVcpu

__all__ = ["rsm_load_state", "smm_enter", "smm_save_state"]

_SIZE = 512
_SEGMENT = struct.Struct("<HHIQ")
_SHADOW, _EFER, _REVISION, _SMBASE = 0xCB, 0xD0, 0xFC, 0x100
_CR4, _CR3, _CR0, _RFLAGS, _RIP, _GPRS = 0x148, 0x150, 0x158, 0x170, 0x178, 0x180
_THE_REVISION = 0x20064
_TABLES = (
    SEGS + SEG_SIZE * R_ES, SEGS + SEG_SIZE * R_CS, SEGS + SEG_SIZE * R_SS, SEGS + SEG_SIZE * R_DS,
    SEGS + SEG_SIZE * R_FS, SEGS + SEG_SIZE * R_GS, GDT, LDT, IDT, TR,
)
_SEGMENTS = (R_ES, R_CS, R_SS, R_DS, R_FS, R_GS)
_CR0_KEPT = ~(CR0_PG | CR0_PE | 1 << 2 | 1 << 3)
_REAL_DATA = DESC_P | DESC_S | DESC_G | 3 << 8
_CODE32 = DESC_P | DESC_S | DESC_G | DESC_DB | 0xB << 8
_RFLAGS_FIXED = 2
_ENTRY = 0x8000
_M32 = (1 << 32) - 1


def smm_save_state(v: UnicornVcpu, smbase: int) -> bytes:
    """The 512 bytes of the save area."""
    env = v.env
    image = bytearray(_SIZE)
    for n, table in enumerate(_TABLES):
        selector, base, limit, flags = env.table(table)
        attributes = flags >> 8 & 0xF0FF
        _SEGMENT.pack_into(image, 16 * n, selector & 0xFFFF, attributes, limit, base)
    image[_SHADOW] = env.hflags & HF_INHIBIT_IRQ != 0
    struct.pack_into("<Q", image, _EFER, env.efer)
    struct.pack_into("<II", image, _REVISION, _THE_REVISION, smbase)
    struct.pack_into("<QQQ", image, _CR4, env.cr(4), env.cr(3), env.cr(0))
    struct.pack_into("<QQ", image, _RFLAGS, env.eflags, env.eip)
    for index in range(16):
        struct.pack_into("<Q", image, _GPRS + 8 * (15 - index), env.reg(index))
    return bytes(image)


def _to_real_mode(v: UnicornVcpu, cr0: int) -> None:
    env, intercepts = v.env, v.intercepts
    load_seg_cache(env, R_CS, 0, 0, _M32, _CODE32)
    if env.cr(0) & CR0_PG:
        intercepts.load_cr0(env.cr(0) & ~CR0_PG)
    env.efer &= ~(EFER_LMA | EFER_LME)
    intercepts.load_cr4(0)
    intercepts.load_cr0(cr0 & _CR0_KEPT)
    env.efer = 0


def smm_enter(v: UnicornVcpu, smbase: int) -> None:
    """16-bit code at `smbase` + 0x8000, flat data, no paging, interrupts off."""
    env = v.env
    v.end_shadow()
    _to_real_mode(v, env.cr(0))
    env.eflags = _RFLAGS_FIXED
    env.eip = _ENTRY
    env.set_table(IDT, 0, 0, 0, 0)
    for index in (R_DS, R_ES, R_FS, R_GS, R_SS):
        load_seg_cache(env, index, 0, 0, _M32, _REAL_DATA)
    load_seg_cache(env, R_CS, smbase >> 4 & 0xFFFF, smbase, _M32, _REAL_DATA)
    v.intercepts.flush_tlb()


def rsm_load_state(v: UnicornVcpu, image: bytes) -> int:
    """Go back to what `image` says; the SMBASE in it, or -1 where that is no state to go back to."""
    cr4, cr3, cr0 = struct.unpack_from("<QQQ", image, _CR4)
    (efer,) = struct.unpack_from("<Q", image, _EFER)
    if efer & EFER_LMA and not (cr0 & CR0_PG and cr4 & CR4_PAE):
        return -1
    env, intercepts = v.env, v.intercepts
    _to_real_mode(v, env.cr(0))
    for index in range(16):
        env.set_reg(index, struct.unpack_from("<Q", image, _GPRS + 8 * (15 - index))[0])
    env.efer = efer & ~EFER_LMA
    intercepts.load_cr4(cr4)
    env.set_cr(3, cr3)
    intercepts.load_cr0(cr0)
    for n, table in enumerate(_TABLES):
        selector, attributes, limit, base = _SEGMENT.unpack_from(image, 16 * n)
        if n < len(_SEGMENTS):
            load_seg_cache(env, _SEGMENTS[n], selector, base, limit, attributes << 8)
        else:
            env.set_table(table, selector, base, limit, attributes << 8)
    rflags, rip = struct.unpack_from("<QQ", image, _RFLAGS)
    env.eflags = rflags | _RFLAGS_FIXED
    env.eip = rip
    if image[_SHADOW]:
        env.hflags |= HF_INHIBIT_IRQ
    intercepts.flush_tlb()
    return int(struct.unpack_from("<I", image, _SMBASE)[0])

"""Loading segment registers with the hidden flags that Unicorn derives from them.

Source: qemu/target/i386/cpu.h: cpu_x86_load_seg_cache; Intel SDM vol. 3A 3.4.5 (descriptors).

    descriptor, high word:  31..24 base  G  D/B L AVL  19..16 limit  P DPL S type  7..0 base
                                         23 22  21 20                15 14 12 11

Not modelled: expand-down limits, call gates, task switches.
"""

from __future__ import annotations

from emu.cpu.env import HF_ADDSEG, HF_CPL, HF_CS32, HF_CS64, HF_LMA, HF_SS32, R_CS, R_DS, R_ES, R_SS, Env
from emu.cpu.paging import CR0_PE

__all__ = [
    "DESC_CODE", "DESC_CONFORMING", "DESC_DB", "DESC_G", "DESC_L", "DESC_P", "DESC_S", "FLAT_CODE32",
    "FLAT_CODE64", "FLAT_DATA", "descriptor_base", "descriptor_dpl", "descriptor_limit", "load_seg_cache",
]

DESC_G = 1 << 23
DESC_DB = 1 << 22
DESC_L = 1 << 21
DESC_P = 1 << 15
DESC_S = 1 << 12
DESC_CODE = 1 << 11
DESC_CONFORMING = 1 << 10
DESC_DPL_SHIFT = 13

FLAT_CODE64 = 0x00AF9B00
FLAT_CODE32 = 0x00CF9B00
FLAT_DATA = 0x00CF9300


def descriptor_base(descriptor: int) -> int:
    """Base address of an 8-byte descriptor."""
    return descriptor >> 16 & 0xFFFFFF | (descriptor >> 56 & 0xFF) << 24


def descriptor_limit(descriptor: int) -> int:
    """Limit in bytes of an 8-byte descriptor."""
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
    return limit << 12 | 0xFFF if descriptor >> 32 & DESC_G else limit


def descriptor_dpl(flags: int) -> int:
    """DPL of a descriptor's high word."""
    return flags >> DESC_DPL_SHIFT & 3


def load_seg_cache(env: Env, index: int, selector: int, base: int, limit: int, flags: int) -> None:
    """Load R_ES..R_GS and its hidden part; SS also sets the CPL, CS the operating mode."""
    env.set_seg(index, selector, base, limit, flags)
    hflags = env.hflags
    if index == R_CS:
        if hflags & HF_LMA and flags & DESC_L:
            env.hflags = (hflags | HF_CS32 | HF_SS32 | HF_CS64) & ~HF_ADDSEG
            return
        hflags &= ~(HF_CS32 | HF_CS64)
        if flags & DESC_DB:
            hflags |= HF_CS32
    if index == R_SS:
        hflags = hflags & ~HF_CPL | flags >> DESC_DPL_SHIFT & 3
    hflags &= ~(HF_SS32 | HF_ADDSEG)
    if env.seg(R_SS)[3] & DESC_DB:
        hflags |= HF_SS32
    if not hflags & HF_CS64:
        bases = env.seg(R_DS)[1] | env.seg(R_ES)[1] | env.seg(R_SS)[1]
        if bases or not env.cr(0) & CR0_PE or not hflags & HF_CS32:
            hflags |= HF_ADDSEG
    env.hflags = hflags

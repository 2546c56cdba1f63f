"""Which (virtual page, frame) pairs a vCPU may execute from: an open-addressing set of int64.

The compiled fill hook looks pairs up, Python adds and removes them. A pair is there once no vCPU can
store to the frame unseen, and stays until one may.

Key: (pfn << 36 | virtual page) + 1; 0 is an empty slot, -1 a removed one.

Not modelled: nothing of the architecture; this is bookkeeping of the emulator.
"""

from __future__ import annotations

import ctypes

from emu.cpu.words import Words
from host_mm.ram import column

__all__ = ["CodePages", "code_page_known"]

_VPN_BITS = 36
_VPN_MASK = (1 << _VPN_BITS) - 1
_HASH_VPN = 0x9E3779B1
_HASH_PFN = 0x85EBCA77


def code_page_known(table: Words, mask: int, gva: int, pfn: int) -> bool:
    """Whether the page of `gva` backed by frame `pfn` is in the set. Compiled by Numba as well."""
    vpn = gva >> 12 & _VPN_MASK
    key = (pfn << _VPN_BITS | vpn) + 1
    at = (vpn * _HASH_VPN + pfn * _HASH_PFN) & mask
    while True:
        found = table[at]
        if found == key:
            return True
        if found == 0:
            return False
        at = (at + 1) & mask


class CodePages:
    """The set of one vCPU. `table` and `mask` go to code_page_known; both change when it grows."""

    def __init__(self, slots: int = 1024) -> None:
        self.by_frame: dict[int, set[int]] = {}
        self._allocate(slots)

    def _allocate(self, slots: int) -> None:
        self.table = column("q", slots)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.table.obj))
        self.mask = slots - 1
        self._used = 0

    def _insert(self, vpn: int, pfn: int) -> None:
        at = (vpn * _HASH_VPN + pfn * _HASH_PFN) & self.mask
        while self.table[at]:
            at = (at + 1) & self.mask
        self.table[at] = (pfn << _VPN_BITS | vpn) + 1
        self._used += 1

    def add(self, gva: int, pfn: int) -> bool:
        """Put the pair in; True when the table moved and its address must be told to the hook."""
        vpn = gva >> 12 & _VPN_MASK
        pages = self.by_frame.setdefault(pfn, set())
        if vpn in pages:
            return False
        pages.add(vpn)
        if 2 * (self._used + 1) <= self.mask:
            self._insert(vpn, pfn)
            return False
        self._allocate(4 * (self.mask + 1))
        for frame, vpns in self.by_frame.items():
            for page in vpns:
                self._insert(page, frame)
        return True

    def forget(self, pfn: int) -> list[int]:
        """Take every pair of frame `pfn` out; their virtual page addresses (canonical, unsigned)."""
        pages = sorted(self.by_frame.pop(pfn, ()))
        for vpn in pages:
            key = (pfn << _VPN_BITS | vpn) + 1
            at = (vpn * _HASH_VPN + pfn * _HASH_PFN) & self.mask
            while self.table[at] != key:
                at = (at + 1) & self.mask
            self.table[at] = -1
        return [_gva(vpn) for vpn in pages]

    def known(self, gva: int, pfn: int) -> bool:
        """Whether the pair is in the set."""
        return (gva >> 12 & _VPN_MASK) in self.by_frame.get(pfn, ())


def _gva(vpn: int) -> int:
    """Page address from its 36 bits, sign-extended to a canonical one."""
    gva = vpn << 12
    return gva | 0xFFFF << 48 if gva >> 47 else gva

"""Which zap took a gfn's mapping away: the memory behind `killed_by` of faults.

Nothing in Linux keeps this; its traces let one guess it from addresses and order.

Not modelled: zaps and installs that happened while nobody traced.
"""

from __future__ import annotations

__all__ = ["KilledBy"]


class KilledBy:
    """Per level and gfn, the sequence numbers of the last zap and of the last install."""

    __slots__ = ("_installs", "_zaps")

    def __init__(self) -> None:
        self._zaps: tuple[dict[int, int], ...] = ({}, {}, {})
        self._installs: tuple[dict[int, int], ...] = ({}, {}, {})

    def zapped(self, gfn: int, level: int, seq: int) -> None:
        """Event `seq` removed the leaf of `level` at `gfn`."""
        self._zaps[level - 1][gfn] = seq

    def installed(self, gfn: int, level: int, seq: int) -> None:
        """Event `seq` mapped `gfn` with a leaf of `level`."""
        self._installs[level - 1][gfn] = seq

    def of(self, gfn: int) -> int | None:
        """The zap that left `gfn` unmapped, if one did."""
        zap = install = -1
        for index in range(3):
            base = gfn >> 9 * index << 9 * index
            zap = max(zap, self._zaps[index].get(base, -1))
            install = max(install, self._installs[index].get(base, -1))
        return zap if zap > install else None

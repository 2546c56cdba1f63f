"""What the twice-used sources index: a row of ints, as a memoryview or as an array of compiled code.

Not modelled: nothing of the architecture; this is a type.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Words"]


class Words(Protocol):
    """Ints by position. A memoryview of RAM, of a column, of a parameter block."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...

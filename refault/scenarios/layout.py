"""Where things are in the machine of a scenario; both back ends build it alike.

    guest                                         VMM, from the address of D
    0x00000000  2 MiB  slot 0: code and tables    +0xa00000 (hugetlb: -0x400000, by it)
    0x10000000  8 MiB  slot 1: D, the data        0
                       memory for other slots     +0x1000000 and above
"""

from __future__ import annotations

__all__ = [
    "DATA_GPA", "DATA_SIZE", "GUEST_SLOT_SIZE", "MORE_OFFSET", "MORE_SIZE", "PAGE", "SLOT0_OFFSET",
    "SLOT0_OFFSET_HUGETLB", "SLOT0_SIZE",
]

PAGE = 4096
DATA_GPA = 0x1000_0000
DATA_SIZE = 0x80_0000
GUEST_SLOT_SIZE = SLOT0_SIZE = 0x20_0000
SLOT0_OFFSET = 0xA0_0000
SLOT0_OFFSET_HUGETLB = -0x40_0000
"""Where slot 0 lay in the recordings of huge pages."""
MORE_OFFSET, MORE_SIZE = 0x100_0000, 0x400_0000

"""A program ready for guest memory: where its bytes go, how the CPU starts, what stands beside them.

`load_image` recognises the file: an ELF64 (long mode), a multiboot image (32-bit protected mode),
anything else a flat binary at 1 MiB (long mode).

Long-mode images start with paging on, which needs tables in guest RAM. They are built here, at a
fixed place in low memory, so that a payload knows what it may overwrite:

    0x0000 +--------------------------+
           | GDT  at 0x0500           |  null, code64, data, code32
    0x1000 +--------------------------+
           | multiboot information    |  (multiboot images only)
    0x2000 +--------------------------+
           | PML4 0x2000, PDPT 0x3000 |
    0x4000 | PDs, one per GiB         |  2 MiB leaves, identity, at least 4 GiB
           +--------------------------+  at most 0x84000
   0x90000 +-- stack top --------------+

Not modelled: relocation, dynamic linking, compressed images, the Linux boot protocol.
"""

from __future__ import annotations

import struct

import msgspec

__all__ = [
    "BOOT_CR3",
    "BOOT_GDT",
    "BOOT_STACK",
    "FLAT_BASE",
    "GDT_CODE32",
    "GDT_CODE64",
    "GDT_DATA",
    "GDT_LIMIT",
    "MBI_BASE",
    "Image",
    "LoaderError",
    "Segment",
    "boot_end",
    "boot_gdt",
    "boot_structures",
    "check_segments",
    "identity_tables",
]

FLAT_BASE = 0x100000
BOOT_GDT = 0x500
MBI_BASE = 0x1000
BOOT_CR3 = 0x2000
BOOT_STACK = 0x90000
GDT_CODE64, GDT_DATA, GDT_CODE32 = 0x08, 0x10, 0x18
GDT_LIMIT = 4 * 8 - 1

_PDPT = 0x3000
_PDS = 0x4000
_MAX_PDS = 128
_GIB = 1 << 30
_P_RW = 0x3
_P_RW_A_D_PS = 0xE3
_MAX_SEGMENTS = 256

Segment = tuple[int, bytes]
"""(guest physical address, bytes)"""


class LoaderError(ValueError):
    """A file that cannot be loaded; the message is one line for whoever named the file."""


class Image(msgspec.Struct, kw_only=True):
    """What the board copies into guest memory and how vCPU 0 starts.

    `segments` hold the file's bytes, then the boot structures; bss needs none: guest memory starts as
    zeros.
    `end` is the first address above everything that belongs to the image, bss included.
    `registers` are initial general registers; everything else follows from `mode`:
    "long" starts with the tables and the GDT of this module, "protected" with flat segments and
    paging off.
    """

    kind: str
    mode: str
    entry: int
    end: int
    segments: list[Segment]
    registers: dict[str, int]


def boot_gdt() -> bytes:
    """null, 64-bit code, flat data, 32-bit code; the accessed bits are set, so loads do not write."""
    return struct.pack("<4Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF)


def _mapped_gib(memory_size: int) -> int:
    # memory above 3 GiB continues above the hole for devices, 1 GiB higher
    return max(4, -(-memory_size // _GIB) + 1)


def identity_tables(memory_size: int) -> list[Segment]:
    """Page tables that map guest RAM, and at least 4 GiB, onto itself: present, writable, supervisor."""
    gib = _mapped_gib(memory_size)
    if gib > 512:
        raise LoaderError(f"guest memory of {gib} GiB is more than one PML4 entry can map (512 GiB)")
    pdpt = bytearray(4096)
    tables: list[Segment] = [(BOOT_CR3, struct.pack("<Q", _PDPT | _P_RW))]
    for n in range(gib):
        if n < _MAX_PDS:
            struct.pack_into("<Q", pdpt, 8 * n, (_PDS + 4096 * n) | _P_RW)
            leaves = [(n * _GIB + (i << 21)) | _P_RW_A_D_PS for i in range(512)]
            tables.append((_PDS + 4096 * n, struct.pack("<512Q", *leaves)))
        else:
            struct.pack_into("<Q", pdpt, 8 * n, n * _GIB | _P_RW_A_D_PS)
    tables.append((_PDPT, bytes(pdpt)))
    return tables


def check_segments(spans: list[tuple[int, int]], memory_size: int, reserved_end: int, what: str) -> None:
    """Refuse spans (address, size) outside guest memory, over each other, or over the boot structures."""
    if not spans:
        raise LoaderError(f"{what}: nothing to load")
    if len(spans) > _MAX_SEGMENTS:
        raise LoaderError(f"{what}: {len(spans)} segments, more than {_MAX_SEGMENTS}")
    last_end = 0
    for start, size in sorted(spans):
        if start + size > memory_size:
            raise LoaderError(
                f"{what}: segment {start:#x}..{start + size:#x} lies outside guest memory of {memory_size:#x}"
            )
        if start < reserved_end:
            below = f"the boot structures below {reserved_end:#x}"
            raise LoaderError(f"{what}: segment at {start:#x} overlaps {below}")
        if start < last_end:
            raise LoaderError(f"{what}: segments overlap at {start:#x}")
        last_end = start + size


def boot_end(memory_size: int, *, long_mode: bool) -> int:
    """First address above the boot structures of this module."""
    if not long_mode:
        return MBI_BASE + 4096
    return _PDS + 4096 * min(_mapped_gib(memory_size), _MAX_PDS)


def boot_structures(memory_size: int, *, long_mode: bool) -> list[Segment]:
    """What a starting state refers to: the GDT and, for long mode, the page tables."""
    gdt = [(BOOT_GDT, boot_gdt())]
    return gdt + identity_tables(memory_size) if long_mode else gdt

"""Multiboot 1 images: ELF32, ELF64 or the address fields of the header; 32-bit protected mode.

Source: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3 (boot
information). The information structure stands at `image.MBI_BASE` with a memory map; modules are
not offered.

    magic 0x1BADB002 | flags | checksum | header_addr load_addr load_end_addr bss_end_addr entry_addr
                                          (flags bit 16: the "a.out kludge")

Not modelled: modules, symbols, VBE, drives, the command line beyond one string.
"""

from __future__ import annotations

import struct

from emu.loaders.elf import file_segments, physical_entry, read_program_headers
from emu.loaders.image import MBI_BASE, Image, LoaderError, Segment, boot_end, boot_structures, check_segments

__all__ = ["BOOT_MAGIC", "HEADER_MAGIC", "find_header", "load_multiboot"]

HEADER_MAGIC = 0x1BADB002
BOOT_MAGIC = 0x2BADB002

_SEARCH = 8192
_FLAG_ADDRESSES = 1 << 16
_REQUIRED_UNKNOWN = 0xFFF8
_MBI_MEMORY, _MBI_CMDLINE, _MBI_MMAP, _MBI_LOADER = 1 << 0, 1 << 2, 1 << 6, 1 << 9
_HOLE_START, _HOLE_END = 0x9FC00, 0x100000


def find_header(data: bytes) -> int | None:
    """Offset of the multiboot header in the first 8192 bytes, or None."""
    for offset in range(0, min(len(data), _SEARCH) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<3I", data, offset)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xFFFFFFFF == 0:
            return offset
    return None


def load_multiboot(data: bytes, memory_size: int, cmdline: str = "") -> Image:
    """A multiboot image, to be started with EAX = 0x2BADB002 and EBX at the boot information."""
    what = "multiboot"
    offset = find_header(data)
    if offset is None:
        raise LoaderError(f"{what}: no header in the first {_SEARCH} bytes")
    (flags,) = struct.unpack_from("<I", data, offset + 4)
    if flags & _REQUIRED_UNKNOWN:
        raise LoaderError(f"{what}: header asks for features {flags & 0xFFFF:#x} that are not offered")
    if flags & _FLAG_ADDRESSES:
        segments, spans, entry = _by_addresses(data, offset, what)
    elif data[:4] == b"\x7fELF":
        header, loads = read_program_headers(data, what)
        spans = [(h["p_paddr"], h["p_memsz"]) for h in loads]
        segments = file_segments(data, loads)
        entry = physical_entry(header["e_entry"], loads, what)
    else:
        raise LoaderError(f"{what}: header without addresses in a file that is not ELF")
    check_segments(spans, memory_size, boot_end(memory_size, long_mode=False), what)
    end = max(start + size for start, size in spans)
    return Image(
        kind="multiboot",
        mode="protected",
        entry=entry,
        end=end,
        segments=[
            *segments,
            (MBI_BASE, _information(memory_size, cmdline)),
            *boot_structures(memory_size, long_mode=False),
        ],
        registers={"rax": BOOT_MAGIC, "rbx": MBI_BASE},
    )


def _by_addresses(data: bytes, offset: int, what: str) -> tuple[list[Segment], list[tuple[int, int]], int]:
    if offset + 32 > len(data):
        raise LoaderError(f"{what}: header is cut off")
    header_addr, load_addr, load_end, bss_end, entry = struct.unpack_from("<5I", data, offset + 12)
    start = offset - (header_addr - load_addr)
    if load_addr > header_addr or start < 0:
        raise LoaderError(f"{what}: load address {load_addr:#x} does not fit header address {header_addr:#x}")
    length = load_end - load_addr if load_end else len(data) - start
    if length <= 0 or start + length > len(data):
        raise LoaderError(f"{what}: load end {load_end:#x} lies behind the end of the file")
    size = max(length, bss_end - load_addr)
    if not load_addr <= entry < load_addr + length:
        raise LoaderError(f"{what}: entry point {entry:#x} lies in no segment")
    return [(load_addr, data[start : start + length])], [(load_addr, size)], entry


def _information(memory_size: int, cmdline: str) -> bytes:
    """The boot information: flags, memory sizes, command line, memory map, loader name."""
    regions = [(0, min(memory_size, _HOLE_START), 1), (0xF0000, 0x10000, 2)]
    if memory_size > _HOLE_END:
        regions.append((_HOLE_END, memory_size - _HOLE_END, 1))
    mmap = b"".join(struct.pack("<IQQI", 20, base, size, kind) for base, size, kind in regions)
    text = cmdline.encode("latin-1", "replace") + b"\0"
    name = b"refault\0"
    mmap_at, name_at = 0x80, 0x80 + len(mmap)
    text_at = name_at + len(name)
    if text_at + len(text) > 4096:
        raise LoaderError(f"multiboot: command line of {len(text)} bytes is too long")
    page = bytearray(text_at + len(text))
    upper = min(max(memory_size - _HOLE_END, 0) >> 10, 0xFFFFFFFF)
    lower = min(memory_size, _HOLE_START) >> 10
    struct.pack_into("<3I", page, 0, _MBI_MEMORY | _MBI_CMDLINE | _MBI_MMAP | _MBI_LOADER, lower, upper)
    struct.pack_into("<I", page, 16, MBI_BASE + text_at)
    struct.pack_into("<2I", page, 44, len(mmap), MBI_BASE + mmap_at)
    struct.pack_into("<I", page, 64, MBI_BASE + name_at)
    page[mmap_at:name_at] = mmap
    page[name_at:text_at] = name
    page[text_at:] = text
    return bytes(page)

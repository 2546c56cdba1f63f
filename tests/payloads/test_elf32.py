"""The image file, read back by an independent reader."""

from __future__ import annotations

import io
import struct

from elftools.elf.elffile import ELFFile

from emu import abi
from guest_payloads.builder import assemble, build

NAME = "first-touch"


def test_it_is_an_i386_executable_with_one_segment_per_section() -> None:
    elf = ELFFile(io.BytesIO(build(NAME)))
    assert (elf["e_machine"], elf["e_type"], elf.elfclass) == ("EM_386", "ET_EXEC", 32)
    segments = list(elf.iter_segments())
    assert [s["p_type"] for s in segments] == ["PT_LOAD"] * 4
    assert [s["p_flags"] for s in segments] == [5, 4, 6, 6]
    assert segments[0]["p_vaddr"] == abi.IMAGE_BASE
    ends = [s["p_vaddr"] + s["p_memsz"] for s in segments]
    assert all(end <= s["p_vaddr"] for end, s in zip(ends, segments[1:], strict=False))
    assert all(s["p_vaddr"] % 4096 == 0 and s["p_offset"] % 4096 == 0 for s in segments if s["p_filesz"])
    assert ends[-1] <= abi.HEAP_BASE


def test_the_multiboot_header_is_near_the_beginning_and_adds_up() -> None:
    image = build(NAME)
    offset = image.find(struct.pack("<I", 0x1BADB002))
    assert offset in range(0, 8192, 4)
    magic, flags, checksum = struct.unpack_from("<III", image, offset)
    assert (magic + flags + checksum) & 0xFFFF_FFFF == 0
    assert flags & 2


def test_symbols_are_those_of_the_program() -> None:
    program = assemble(NAME)
    table = ELFFile(io.BytesIO(build(NAME))).get_section_by_name(".symtab")
    found = {symbol.name: symbol["st_value"] for symbol in table.iter_symbols() if symbol.name}
    assert found == program.symbols
    assert found["multiboot_entry"] == program.entry

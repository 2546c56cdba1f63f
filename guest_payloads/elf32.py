"""Writes a program as an ELF32 executable that a Multiboot loader accepts.

Source of truth: the ELF specification 1.2 (i386) and Multiboot 0.6.96 section 3.1: the header stands in
the first 8192 bytes of the file, so the first segment's bytes begin at file offset 4096.

    0x0000  ELF header, program headers
    0x1000  text, rodata, data: each from a page boundary, as in memory
            .symtab, .strtab, .shstrtab, section headers

The bytes depend on the program only: no time, no path, no host.

Not modelled: relocations, dynamic linking, debug information beyond the symbol table.
"""

from __future__ import annotations

import struct

from guest_payloads.assemble import SECTIONS, Program

__all__ = ["write_elf32"]

_PAGE = 4096
_EHDR = struct.Struct("<16sHHIIIIIHHHHHH")
_PHDR = struct.Struct("<IIIIIIII")
_SHDR = struct.Struct("<IIIIIIIIII")
_SYM = struct.Struct("<IIIBBH")
_IDENT = b"\x7fELF\x01\x01\x01" + bytes(9)
_ET_EXEC, _EM_386, _PT_LOAD = 2, 3, 1
_SHT_PROGBITS, _SHT_SYMTAB, _SHT_STRTAB, _SHT_NOBITS = 1, 2, 3, 8
_PF = {"text": 5, "rodata": 4, "data": 6, "bss": 6}
_SHF = {"text": 6, "rodata": 2, "data": 3, "bss": 3}


def write_elf32(program: Program) -> bytes:
    """The image file of `program`: one PT_LOAD per section that is not empty, and a symbol table."""
    used = [name for name in SECTIONS if program.sections[name][1]]
    body = bytearray(_PAGE)
    headers: list[bytes] = []
    segments: list[bytes] = []
    names = _Strings()
    for name in used:
        address, size, blob = program.sections[name]
        if name == "bss":
            blob = b""
        body += bytes(-len(body) % _PAGE)
        offset = len(body)
        body += blob
        segments.append(_PHDR.pack(_PT_LOAD, offset, address, address, len(blob), size, _PF[name], _PAGE))
        kind = _SHT_NOBITS if name == "bss" else _SHT_PROGBITS
        headers.append(_SHDR.pack(names.add("." + name), kind, _SHF[name], address, offset, size,
                                  0, 0, _PAGE, 0))
    _append_symbols(body, headers, names, program, used)
    table_offset = len(body)
    body += _SHDR.pack(*[0] * 10) + b"".join(headers)
    ehdr = _EHDR.pack(_IDENT, _ET_EXEC, _EM_386, 1, program.entry, _EHDR.size, table_offset, 0, _EHDR.size,
                      _PHDR.size, len(segments), _SHDR.size, len(headers) + 1, len(headers))
    head = ehdr + b"".join(segments)
    body[:len(head)] = head
    return bytes(body)


class _Strings:
    """A string table."""

    def __init__(self) -> None:
        self.data = bytearray(1)

    def add(self, name: str) -> int:
        """The offset of `name`, appended."""
        offset = len(self.data)
        self.data += name.encode() + b"\0"
        return offset


def _append_symbols(body: bytearray, headers: list[bytes], names: _Strings, program: Program,
                    used: list[str]) -> None:
    strings = _Strings()
    table = bytearray(_SYM.size)
    for name, address in sorted(program.symbols.items(), key=lambda pair: (pair[1], pair[0])):
        index = 0xFFF1
        for number, section in enumerate(used, 1):
            start, size, _ = program.sections[section]
            if start <= address < start + size:
                index = number
        table += _SYM.pack(strings.add(name), address, 0, 0x10, 0, index)
    body += bytes(-len(body) % 16)
    symtab_name, strtab_name, shstrtab_name = (names.add(n) for n in (".symtab", ".strtab", ".shstrtab"))
    headers.append(_SHDR.pack(symtab_name, _SHT_SYMTAB, 0, 0, len(body), len(table),
                              len(headers) + 2, 1, 4, _SYM.size))
    body += table
    headers.append(_SHDR.pack(strtab_name, _SHT_STRTAB, 0, 0, len(body), len(strings.data), 0, 0, 1, 0))
    body += strings.data
    headers.append(_SHDR.pack(shstrtab_name, _SHT_STRTAB, 0, 0, len(body), len(names.data), 0, 0, 1, 0))
    body += names.data
    body += bytes(-len(body) % 16)

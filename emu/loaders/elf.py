"""ELF64 executables for x86-64: segments by physical address, started in long mode.

Source: System V ABI, chapters 4 and 5; the file format is read by pyelftools.

Not modelled: relocations, interpreters, ET_DYN, notes.
"""

from __future__ import annotations

import io

from elftools.common.exceptions import ELFError
from elftools.construct.lib.container import Container
from elftools.elf.elffile import ELFFile

from emu.loaders.image import Image, LoaderError, Segment, boot_end, boot_structures, check_segments

__all__ = ["load_elf64", "read_program_headers"]

_MAX_PHNUM = 256
_E_PHNUM = {32: 44, 64: 56}


def read_program_headers(data: bytes, what: str) -> tuple[Container, list[Container]]:
    """The ELF header and the PT_LOAD headers with a size, bounds of the file checked."""
    try:
        elf = ELFFile(io.BytesIO(data))
        at = _E_PHNUM[elf.elfclass]
        # ahead of pyelftools, which follows PN_XNUM into section headers that need not exist
        if int.from_bytes(data[at : at + 2], "little") > _MAX_PHNUM:
            raise LoaderError(f"{what}: more than {_MAX_PHNUM} program headers")
        if elf["e_machine"] not in ("EM_X86_64", "EM_386"):
            raise LoaderError(f"{what}: machine {elf['e_machine']} is not x86")
        if elf["e_type"] != "ET_EXEC":
            raise LoaderError(f"{what}: {elf['e_type']} is not a fixed-address executable (ET_EXEC)")
        headers = [elf._get_segment_header(n) for n in range(elf.num_segments())]
    except LoaderError:
        raise
    except (ELFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise LoaderError(f"{what}: damaged ELF file: {reason}") from err
    loads = [h for h in headers if h["p_type"] == "PT_LOAD" and h["p_memsz"]]
    for header in loads:
        if header["p_filesz"] > header["p_memsz"]:
            raise LoaderError(f"{what}: segment at {header['p_paddr']:#x} has more file than memory")
        if header["p_offset"] + header["p_filesz"] > len(data):
            raise LoaderError(f"{what}: segment at {header['p_paddr']:#x} ends behind the end of the file")
    return elf.header, loads


def physical_entry(entry: int, loads: list[Container], what: str) -> int:
    """The physical address of a virtual entry point; it must lie in file bytes of a segment."""
    for header in loads:
        offset = entry - header["p_vaddr"]
        if 0 <= offset < header["p_filesz"]:
            return int(header["p_paddr"] + offset)
    raise LoaderError(f"{what}: entry point {entry:#x} lies in no segment")


def file_segments(data: bytes, loads: list[Container]) -> list[Segment]:
    """(physical address, bytes) of every segment that has file bytes."""
    return [
        (h["p_paddr"], data[h["p_offset"] : h["p_offset"] + h["p_filesz"]]) for h in loads if h["p_filesz"]
    ]


def load_elf64(data: bytes, memory_size: int) -> Image:
    """An ET_EXEC for x86-64, to be started in long mode at its entry point's physical address."""
    what = "ELF64"
    header, loads = read_program_headers(data, what)
    if header["e_machine"] != "EM_X86_64":
        raise LoaderError(f"{what}: machine {header['e_machine']} in a 64-bit file")
    spans = [(h["p_paddr"], h["p_memsz"]) for h in loads]
    check_segments(spans, memory_size, boot_end(memory_size, long_mode=True), what)
    return Image(
        kind="elf64",
        mode="long",
        entry=physical_entry(header["e_entry"], loads, what),
        end=max(start + size for start, size in spans),
        segments=file_segments(data, loads) + boot_structures(memory_size, long_mode=True),
        registers={},
    )

"""Builds guest payloads: a name or a source file in, a Multiboot ELF32 image out.

A payload is `guest_payloads/NAME.s`, or any file of the user's own, that includes "runtime.inc" and
defines `main`. Its leading comment is its documentation:

    ; NAME: one line that says what it claims
    ;
    ; A paragraph or more.
    ;
    ; param seed=1  what it is
    ; vmcalls: swap_out migrate

`param` lines are the words it understands on the Multiboot command line, with their defaults; `vmcalls`
are those of emu/abi.py it makes when the machine serves them.

Not modelled: C payloads, linking several objects.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from emu import abi
from guest_payloads.preprocess import AssemblyError, Preprocessor

if TYPE_CHECKING:
    from guest_payloads.assemble import Program

__all__ = ["AssemblyError", "Param", "PayloadError", "PayloadInfo", "assemble", "build", "payload_info",
           "payload_names", "payloads"]

LIBRARY = Path(__file__).resolve().parent
ENTRY = "multiboot_entry"


class PayloadError(ValueError):
    """No such payload, or no such file. The message is one line."""


class Param(NamedTuple):
    """A word `name=value` of the command line: its default (decimal) and what it means."""

    name: str
    default: str
    doc: str


class PayloadInfo(NamedTuple):
    """What the header of a payload's source says."""

    name: str
    title: str
    doc: str
    params: tuple[Param, ...]
    vmcalls: tuple[str, ...]
    path: Path


def payload_names() -> list[str]:
    """The names of the payloads that come with refault, sorted."""
    return sorted(path.stem for path in LIBRARY.glob("*.s"))


def payloads() -> list[PayloadInfo]:
    """Their documentation, in the order of payload_names."""
    return [payload_info(name) for name in payload_names()]


def payload_info(name_or_path: str | Path) -> PayloadInfo:
    """The documentation in the source's leading comment. Raises PayloadError."""
    path = _find(name_or_path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PayloadError(f"{path}: cannot be read as text") from error
    return _parse_header(path, lines)


def _parse_header(path: Path, lines: list[str]) -> PayloadInfo:
    title = ""
    text: list[str] = []
    params: list[Param] = []
    vmcalls: tuple[str, ...] = ()
    for line in lines:
        if not line.startswith((";", "#")):
            break
        words = line.lstrip(";#").strip()
        if words.startswith("param "):
            head, _, doc = words[6:].strip().partition(" ")
            name, _, default = head.partition("=")
            params.append(Param(name, default, doc.strip()))
        elif words.startswith("vmcalls:"):
            vmcalls += tuple(words[8:].split())
        elif not title and words:
            title = words.partition(": ")[2] if words.startswith(path.stem + ": ") else words
        else:
            text.append(words)
    return PayloadInfo(path.stem, title, "\n".join(text).strip(), tuple(params), vmcalls, path)


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    path = Path(text)
    if isinstance(name_or_path, Path) or "/" in text or "\\" in text or path.suffix:
        if not path.is_file():
            raise PayloadError(f"{path}: no such file")
        return path
    names = payload_names()
    if text in names:
        return LIBRARY / (text + ".s")
    close = difflib.get_close_matches(text, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"
    raise PayloadError(f"no payload '{text}'; {hint}")


def assemble(name_or_path: str | Path) -> Program:
    """The assembled program, with its symbols and listing. Raises PayloadError or AssemblyError."""
    from guest_payloads.assemble import Assembler  # keystone: 30 ms that names and docs do not need

    path = _find(name_or_path)
    constants = {name: value for name, value in vars(abi).items() if type(value) is int}
    source = Preprocessor(LIBRARY, constants)
    statements = source.run(path)
    program = Assembler(constants, source.equates, abi.IMAGE_BASE).assemble(statements, ENTRY, path.name)
    end = program.sections["bss"][0] + program.sections["bss"][1]
    if end > abi.HEAP_BASE:
        raise AssemblyError(f"{path.name}:1: the image ends at {end:#x}, behind HEAP_BASE {abi.HEAP_BASE:#x}")
    return program


def build(name_or_path: str | Path) -> bytes:
    """The image file of a payload by name, or of a source file by path; the same bytes every time.

    Raises PayloadError for an unknown name (naming close ones) or a missing file, AssemblyError
    ("file:line: why") for bad source.
    """
    from guest_payloads.elf32 import write_elf32

    return write_elf32(assemble(name_or_path))

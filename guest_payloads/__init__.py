"""Guest programs that check themselves, their runtime, and what builds them.

    NAME.s              a payload; its leading comment is its documentation
    runtime.inc         what every payload includes; it pulls in the other .inc files
    kernel.inc          which kernel the host runs, for those that must know
    preprocess, expr    source text -> statements and numbers
    assemble            statements -> bytes at fixed addresses, by keystone
    elf32               bytes -> a Multiboot ELF32 image
    builder             a name or a path -> an image; the documentation of the payloads

Start with first-touch.s and boot.inc. `from guest_payloads.builder import build`; nothing is imported
here, so that asking for a payload's name does not load keystone.

A payload sees of the machine what emu/abi.py says and nothing else.
"""

from __future__ import annotations

__all__: list[str] = []

"""The guest code that is measured: bytes, position-independent, each routine ended by the same two bytes."""

from __future__ import annotations

__all__ = [
    "ALU", "CALLS", "END", "HALT", "INSNS", "INVLPG_PAGES", "MEMORY", "PAUSE", "READ_PAGES", "WRITE_PAGES",
]

PAUSE = b"\xe6\x80"
"""out 0x80, al: back to whoever measures, on the real machine."""
HALT = b"\xf4\x90"
"""hlt; nop: the same on bare Unicorn."""
END = PAUSE


def _code(*lines: str) -> bytes:
    return bytes.fromhex(" ".join(lines))


_STEP = "48 81 c3 00 10 00 00", "48 ff c9"  # add rbx, 4096; dec rcx
READ_PAGES = _code("48 8b 03", *_STEP, "75 f1")  # l: mov rax, [rbx]; step; jnz l
WRITE_PAGES = _code("48 89 03", *_STEP, "75 f1")  # l: mov [rbx], rax; step; jnz l
INVLPG_PAGES = _code("0f 01 3b", *_STEP, "75 f1")  # l: invlpg [rbx]; step; jnz l

ALU = _code(
    "48 01 c8",  # l: add rax, rcx
    "48 31 c2",  # xor rdx, rax
    "48 c1 c0 07",  # rol rax, 7
    "48 8d 34 10",  # lea rsi, [rax+rdx]
    "48 ff c9",  # dec rcx
    "75 ed",  # jnz l
)
MEMORY = _code(
    "48 8b 04 3b",  # l: mov rax, [rbx+rdi]
    "48 01 c8",  # add rax, rcx
    "48 89 04 3b",  # mov [rbx+rdi], rax
    "83 c7 48",  # add edi, 72
    "81 e7 f8 ff 00 00",  # and edi, 0xfff8: sixteen pages
    "48 ff c9",  # dec rcx
    "75 e7",  # jnz l
)
CALLS = _code(
    "eb 04",  # jmp l
    "48 ff c0",  # f: inc rax
    "c3",  # ret
    "e8 f7 ff ff ff",  # l: call f
    "48 ff c9",  # dec rcx
    "75 f6",  # jnz l
)
INSNS = {"alu": 6, "memory": 7, "calls": 5}
"""Guest instructions in a round of each loop."""

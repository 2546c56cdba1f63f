"""The guest of every scenario: a handful of instructions, each followed by `out 0xf4, al`, and its tables.

    0x1000 code   0x2000 PML4   0x3000 PDPT   0x4000 PD   0x8000 stack   0x10000 PTs of D

It runs at CPL 3 with IOPL 3. Everything is mapped by 2 MiB pages one to one, D by 4 KiB pages unless the
machine says 2 MiB; all entries are accessed, but for those of the upper tables.
"""

from __future__ import annotations

import struct

from refault.scenarios.layout import DATA_GPA, DATA_SIZE, GUEST_SLOT_SIZE, PAGE

__all__ = [
    "CR4", "CUSTOM", "ENTRY", "GUEST_SLOT_SIZE", "INSTRUCTIONS", "OUT", "PML4", "RFLAGS_IOPL3", "SNIPPETS",
    "USER_STACK", "guest_memory", "pte_gpa",
]

CODE = 0x1000
PML4, PDPT, PD, PTS = 0x2000, 0x3000, 0x4000, 0x10000
USER_STACK = 0x8000
RFLAGS_IOPL3 = 0x3002
CR4 = 0x620
"""PAE, OSFXSR, OSXMMEXCPT."""
OUT = bytes.fromhex("e6f4")
"""out 0xf4, al"""

SNIPPETS = {
    "load": bytes.fromhex("488b06e6f4"),  # mov rax,[rsi]; out 0xf4,al
    "store": bytes.fromhex("488907e6f4"),  # mov [rdi],rax; out 0xf4,al
    "read_modify_write": bytes.fromhex("48ff07e6f4"),  # inc qword [rdi]; out 0xf4,al
    "nop": OUT,
    # mov [rdi],rax; mov [rdi+4096],rax; dec rcx; jnz; out 0xf4,al
    "loop": bytes.fromhex("48890748898700100000" "48ffc975f1e6f4"),
}
INSTRUCTIONS = {
    "lock_inc": "f048ff07", "inc": "48ff07", "xchg": "488707", "cmpxchg_hit": "f0480fb10f",
    "cmpxchg_miss": "f0480fb10f", "xadd": "f0480fc107", "bts": "f0480fab07", "movsb": "a4", "stosq": "48ab",
    "cmp": "483907", "push": "ff37", "prefetchw": "0f0d0f", "clflush": "0fae3f",
}
"""Instructions by name, with RSI and RDI at the place; RAX and RCX are the scenario's."""
ENTRY = {name: CODE + 0x40 * index for index, name in enumerate(SNIPPETS)}
ENTRY |= {name: CODE + 0x400 + 0x40 * index for index, name in enumerate(INSTRUCTIONS)}
CUSTOM = CODE + 0xF00
"""Where an instruction that has no name is put."""


def pte_gpa(offset: int) -> int:
    """Where the guest's PTE of D + offset is."""
    return PTS + (offset >> 12) * 8


def guest_memory(pages: str = "4K") -> list[tuple[int, bytes]]:
    """(gpa, bytes): code and page tables, which map D with `pages` of 4K or 2M."""
    directory = [i << 21 | 0xE7 for i in range(512)]
    tables: list[tuple[int, bytes]] = []
    for i in range(DATA_SIZE >> 21 if pages == "4K" else 0):
        directory[(DATA_GPA >> 21) + i] = (PTS + i * PAGE) | 7
        entries = [(DATA_GPA + (i << 21) + j * PAGE) | 0x67 for j in range(512)]
        tables.append((PTS + i * PAGE, struct.pack("<512Q", *entries)))
    return [
        *((ENTRY[name], code) for name, code in SNIPPETS.items()),
        *((ENTRY[name], bytes.fromhex(code) + OUT) for name, code in INSTRUCTIONS.items()),
        (PML4, struct.pack("<Q", PDPT | 7)),
        (PDPT, struct.pack("<Q", PD | 7)),
        (PD, struct.pack("<512Q", *directory)),
        *tables,
    ]

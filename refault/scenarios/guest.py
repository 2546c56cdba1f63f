"""The guest of every scenario: a handful of instructions, each followed by `out 0xf4, al`, and its tables.

    0x1000 code   0x2000 PML4   0x3000 PDPT   0x4000 PD   0x8000 stack   0x10000 PTs of D

It runs at CPL 3 with IOPL 3. Everything is mapped by 2 MiB pages one to one, D by 4 KiB pages; all
entries are accessed, but for those of the upper tables.
"""

from __future__ import annotations

import struct

from refault.scenarios.api import DATA_GPA, DATA_SIZE, PAGE

__all__ = ["ENTRY", "GUEST_SLOT_SIZE", "PML4", "RFLAGS_IOPL3", "SNIPPETS", "USER_STACK", "guest_memory"]

GUEST_SLOT_SIZE = 0x200000
CODE = 0x1000
PML4, PDPT, PD, PTS = 0x2000, 0x3000, 0x4000, 0x10000
USER_STACK = 0x8000
RFLAGS_IOPL3 = 0x3002

SNIPPETS = {
    "load": bytes.fromhex("488b06e6f4"),  # mov rax,[rsi]; out 0xf4,al
    "store": bytes.fromhex("488907e6f4"),  # mov [rdi],rax; out 0xf4,al
    "read_modify_write": bytes.fromhex("48ff07e6f4"),  # inc qword [rdi]; out 0xf4,al
    "nop": bytes.fromhex("e6f4"),
    "to_user": bytes.fromhex("48cf"),  # iretq
}
ENTRY = {name: CODE + 0x40 * index for index, name in enumerate(SNIPPETS)}


def guest_memory() -> list[tuple[int, bytes]]:
    """(gpa, bytes): code and page tables."""
    directory = [i << 21 | 0xE7 for i in range(512)]
    tables: list[tuple[int, bytes]] = []
    for i in range(DATA_SIZE >> 21):
        directory[(DATA_GPA >> 21) + i] = (PTS + i * PAGE) | 7
        entries = [(DATA_GPA + (i << 21) + j * PAGE) | 0x67 for j in range(512)]
        tables.append((PTS + i * PAGE, struct.pack("<512Q", *entries)))
    return [
        *((ENTRY[name], code) for name, code in SNIPPETS.items()),
        (PML4, struct.pack("<Q", PDPT | 7)),
        (PDPT, struct.pack("<Q", PD | 7)),
        (PD, struct.pack("<512Q", *directory)),
        *tables,
    ]

"""Counting guest instructions at the start of each translated block, and stopping at a budget.

One source, run interpreted or compiled. Unicorn tells a block hook the block's address and size in
bytes but not its number of instructions; the edge hook, called whenever a block is translated,
does. So translations are remembered in a two-way table by (address, size).

A block is counted when it starts, whole, also where a fault then cuts it short and the rest is
counted again as a block of its own; the same run always counts the same. The budget is looked at
before the block runs: a stop is exactly at a block's start, and any budget above the present count
lets at least one block run.

Source: unicorn.h: uc_cb_hookcode_t, uc_hook_edge_gen_t, struct uc_tb; qemu/accel/tcg/cpu-exec.c:
tb_find (no edges until a Uc's first block has ended by itself: counts are estimated till then).

Not modelled: nothing of the architecture; it is the emulator's clock.
"""

from __future__ import annotations

from emu.cpu.words import Words

__all__ = [
    "B_BLOCKS", "B_BUDGET", "B_COUNT", "B_ESTIMATED", "B_LAST_ICOUNT", "B_LAST_PC", "B_LAST_SIZE", "B_MASK",
    "B_SIZE", "B_STOPPED", "B_STOP_FUNCTION", "B_TABLE", "count_block", "learn_block",
]

B_COUNT = 0
B_BUDGET = 1
B_STOPPED = 2
B_STOP_FUNCTION = 3
B_BLOCKS = 4
B_ESTIMATED = 5
B_LAST_PC = 6
B_LAST_SIZE = 7
B_LAST_ICOUNT = 8
B_TABLE = 9
B_MASK = 10
B_SIZE = 16

_HASH = 0x9E3779B1


def learn_block(table: Words, mask: int, pc: int, icount: int, size: int) -> None:
    """Remember that the block of `size` bytes at `pc` has `icount` instructions."""
    first = (pc * _HASH & mask) * 4
    at = first
    if table[at + 1] and (table[at] != pc or table[at + 1] >> 16 != size):
        other = first + 2
        if not table[other + 1] or (table[other] == pc and table[other + 1] >> 16 == size):
            at = other
        else:
            # The older of the two moves out: it becomes the second way.
            table[other] = table[first]
            table[other + 1] = table[first + 1]
    table[at] = pc
    table[at + 1] = size << 16 | icount


def count_block(state: Words, table: Words, pc: int, size: int) -> int:
    """Note that a block starts; 1 where the budget is used up and it must not run."""
    if state[B_COUNT] >= state[B_BUDGET]:
        state[B_STOPPED] = 1
        return 1
    at = (pc * _HASH & state[B_MASK]) * 4
    if table[at] == pc and table[at + 1] >> 16 == size:
        icount = table[at + 1] & 0xFFFF
    elif table[at + 2] == pc and table[at + 3] >> 16 == size:
        icount = table[at + 3] & 0xFFFF
    else:
        icount = (size + 3) // 4
        state[B_ESTIMATED] += 1
    state[B_COUNT] += icount
    state[B_BLOCKS] += 1
    state[B_LAST_PC] = pc
    state[B_LAST_SIZE] = size
    state[B_LAST_ICOUNT] = icount
    return 0

"""The instruction counter of one vCPU: its state, its hooks, its budget.

The bodies are block_body's. A stop by budget is exactly at the start of a block, the only place
where Unicorn can be stopped without running an instruction twice.

Source: unicorn.h: UC_HOOK_BLOCK, UC_HOOK_EDGE_GENERATED, uc_emu_stop.

Not modelled: nothing of the architecture; it is the emulator's clock.
"""

from __future__ import annotations

import ctypes
from typing import Any

from unicorn import UC_HOOK_BLOCK, UC_HOOK_EDGE_GENERATED
from unicorn.unicorn_py3.unicorn import uclib

from emu.cpu import block_body as body
from emu.cpu.fill import add_hook
from host_mm.ram import column

__all__ = ["BlockCounter"]

_BLOCK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_void_p)
_EDGE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p
)
_TABLE_SETS = 1 << 15
_NO_BUDGET = (1 << 63) - 1


class BlockCounter:
    """Counts the guest instructions of `uc` from installation on."""

    def __init__(self, uc: Any, *, interpreted: bool = False) -> None:
        self.uc = uc
        self.state = column("q", body.B_SIZE)
        self.table = column("q", 4 * _TABLE_SETS)
        s = self.state
        s[body.B_BUDGET] = _NO_BUDGET
        s[body.B_STOP_FUNCTION] = int(ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p).value or 0)
        s[body.B_TABLE] = ctypes.addressof(ctypes.c_char.from_buffer(self.table.obj))
        s[body.B_MASK] = _TABLE_SETS - 1
        if interpreted:
            self._block, self._edge = _BLOCK(self._on_block), _EDGE(self._on_edge)
            block = int(ctypes.cast(self._block, ctypes.c_void_p).value or 0)
            edge = int(ctypes.cast(self._edge, ctypes.c_void_p).value or 0)
        else:
            from emu.cpu.compile import native

            code = native()
            block, edge = code.block_hook, code.edge_hook
        user_data = ctypes.addressof(ctypes.c_char.from_buffer(s.obj))
        add_hook(uc, UC_HOOK_BLOCK, block, user_data)
        add_hook(uc, UC_HOOK_EDGE_GENERATED, edge, user_data)

    def _on_block(self, uc: int, pc: int, size: int, user_data: int) -> None:
        if body.count_block(self.state, self.table, pc, size):
            uclib.uc_emu_stop(ctypes.c_void_p(uc))

    def _on_edge(self, uc: int, current: Any, previous: Any, user_data: int) -> None:
        word = current[1]
        body.learn_block(self.table, self.state[body.B_MASK], current[0], word & 0xFFFF, word >> 16 & 0xFFFF)

    @property
    def count(self) -> int:
        """Guest instructions so far: whole blocks, as they were started."""
        return self.state[body.B_COUNT]

    @property
    def blocks(self) -> int:
        """Blocks so far."""
        return self.state[body.B_BLOCKS]

    @property
    def stopped(self) -> bool:
        """Whether the last run ended because the budget was used up."""
        return self.state[body.B_STOPPED] != 0

    def allow(self, instructions: int) -> None:
        """Let the next run start blocks until `instructions` more (at least 1) were counted."""
        self.state[body.B_BUDGET] = self.state[body.B_COUNT] + max(instructions, 1)
        self.state[body.B_STOPPED] = 0

"""The outermost functions of native code: Unicorn's callbacks around the compiled sources.

These bodies are only ever compiled (compile.py copies them into the scope of the compiled
functions); they turn addresses into arrays, which Python does by other means in fill.py and
block.py. Importing this module imports Numba.

Source: unicorn.h: uc_cb_tlbevent_t, struct uc_tlb_entry {u64 paddr; i32 perms}, uc_cb_hookcode_t,
uc_hook_edge_gen_t, struct uc_tb {u64 pc; u16 icount; u16 size}.

Not modelled: nothing of the architecture; this is plumbing.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from emu.cpu.block_body import B_MASK, B_SIZE, B_STOP_FUNCTION, B_TABLE, count_block, learn_block
from emu.cpu.env import ENV_SIZE
from emu.cpu.fill_body import (
    P_CODE,
    P_CODE_MASK,
    P_COUNT,
    P_ENV,
    P_FETCHED,
    P_FILL_EPOCH,
    P_HPA,
    P_NR_FRAMES,
    P_RAM,
    P_WRITE_EPOCH,
    tlb_fill,
)

__all__ = ["block_hook", "edge_hook", "fill_hook", "signatures"]

_I64 = types.CPointer(types.int64)
_U8 = types.CPointer(types.uint8)


@intrinsic  # type: ignore[untyped-decorator]
def words_at(typingctx: Any, address: Any) -> Any:
    """An int64 address as a pointer to int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

    return _I64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def bytes_at(typingctx: Any, address: Any) -> Any:
    """An int64 address as a pointer to bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return _U8(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def call_with_pointer(typingctx: Any, function: Any, argument: Any) -> Any:
    """Call the C function at an int64 address with one pointer; its int result is dropped.

    The address is data and not a constant of the code, so that the code can be cached.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(8).as_pointer()])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.voidptr), generate


def signatures() -> dict[str, Any]:
    """C signature of each callback."""
    return {
        "fill_hook": types.boolean(types.voidptr, types.int64, types.int32, _I64, _I64),
        "block_hook": types.void(types.voidptr, types.int64, types.uint32, _I64),
        "edge_hook": types.void(types.voidptr, _I64, _I64, _I64),
    }


def fill_hook(uc, gva, kind, result, user_data):  # type: ignore[no-untyped-def]
    """UC_HOOK_TLB_FILL; user data is the parameter block of fill_body."""
    params = carray(user_data, (P_COUNT,))
    frames = params[P_NR_FRAMES]
    granted = tlb_fill(
        params,
        carray(words_at(params[P_ENV]), (ENV_SIZE // 8,)),
        carray(words_at(params[P_RAM]), (frames * 512,)),
        carray(bytes_at(params[P_FETCHED]), (frames,)),
        carray(words_at(params[P_FILL_EPOCH]), (frames,)),
        carray(words_at(params[P_WRITE_EPOCH]), (frames,)),
        carray(words_at(params[P_CODE]), (params[P_CODE_MASK] + 1,)),
        gva,
        kind,
    )
    if granted == 0:
        return False
    entry = carray(result, (2,))
    entry[0] = params[P_HPA]
    entry[1] = granted
    return True


def block_hook(uc, pc, size, user_data):  # type: ignore[no-untyped-def]
    """UC_HOOK_BLOCK; user data is the state of block_body."""
    state = carray(user_data, (B_SIZE,))
    table = carray(words_at(state[B_TABLE]), ((state[B_MASK] + 1) * 4,))
    if count_block(state, table, pc, size):
        call_with_pointer(state[B_STOP_FUNCTION], uc)


def edge_hook(uc, current, previous, user_data):  # type: ignore[no-untyped-def]
    """UC_HOOK_EDGE_GENERATED; user data is the state of block_body."""
    state = carray(user_data, (B_SIZE,))
    table = carray(words_at(state[B_TABLE]), ((state[B_MASK] + 1) * 4,))
    block = carray(current, (2,))
    learn_block(table, state[B_MASK], block[0], block[1] & 0xFFFF, block[1] >> 16 & 0xFFFF)

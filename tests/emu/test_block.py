"""The instruction counter counts, and its budget stops exactly at the start of a block."""

from __future__ import annotations

import pytest
from unicorn import UC_ARCH_X86, UC_MODE_64, UC_PROT_ALL, Uc

from emu.cpu import block_body as body
from emu.cpu.block import BlockCounter
from emu.cpu.env import Env

BASE = 0x1000
# mov ecx, 1000; l: inc rax; inc rax; inc rax; dec ecx; jnz l; hlt
LOOP = bytes.fromhex("b9e8030000" + "48ffc0" * 3 + "ffc9" + "75f3" + "f4")
IN_LOOP = 5


class Run:
    def __init__(self, interpreted: bool) -> None:
        self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self.uc.mem_map(0, 0x10000, UC_PROT_ALL)
        self.uc.mem_write(BASE, LOOP)
        self.uc.mem_write(0x8000, b"\xeb\x00\xf4")  # jmp $+2; hlt
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        self.env = Env(self.uc)
        self.uc.emu_start(0x8000, 0)  # before the first block has ended there are no edges
        self.counter = BlockCounter(self.uc, interpreted=interpreted)


@pytest.fixture(params=[False, True], ids=["compiled", "interpreted"])
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


def test_instructions_are_counted_exactly(run: Run) -> None:
    run.uc.emu_start(BASE, 0)
    assert run.counter.count == 1 + 1000 * IN_LOOP + 1
    assert run.counter.blocks == 1001
    assert run.counter.state[body.B_ESTIMATED] == 0


def test_a_budget_stops_at_a_block_and_the_rest_runs_once(run: Run) -> None:
    run.counter.allow(500)
    run.uc.emu_start(BASE, 0)
    assert run.counter.stopped
    assert 500 <= run.counter.count < 500 + IN_LOOP
    done = run.env.reg(0)
    assert done % 3 == 0
    assert run.env.reg(1) == 1000 - done // 3
    run.counter.allow(1 << 40)
    run.uc.emu_start(run.env.eip, 0)
    assert not run.counter.stopped
    assert run.env.reg(0) == 3000
    assert run.counter.count == 1 + 1000 * IN_LOOP + 1


def test_any_budget_makes_progress(run: Run) -> None:
    run.counter.allow(0)
    run.uc.emu_start(BASE, 0)
    steps = 0
    while run.counter.stopped:
        before = run.counter.blocks
        run.counter.allow(0)
        run.uc.emu_start(run.env.eip, 0)
        assert run.counter.blocks > before
        steps += 1
    assert steps == 1000
    assert run.env.reg(0) == 3000


def test_the_same_run_counts_the_same_in_both_forms() -> None:
    counts = []
    for interpreted in (False, True, False):
        run = Run(interpreted)
        for _ in range(50):
            run.counter.allow(37)
            run.uc.emu_start(run.env.eip if run.counter.blocks else BASE, 0)
            counts.append((run.counter.count, run.counter.blocks, run.env.eip))
    assert counts[:50] == counts[50:100] == counts[100:]


def test_two_blocks_of_one_hash_both_stay_known_and_a_third_moves_one_out() -> None:
    table = [0] * 16
    mask = 3
    same = [pc for pc in range(0x1000, 0x2000, 4) if pc * body._HASH & mask == 0][:3]
    state = [0] * body.B_SIZE
    state[body.B_BUDGET], state[body.B_MASK] = 1 << 40, mask
    for n, pc in enumerate(same[:2]):
        body.learn_block(table, mask, pc, n + 1, 10)
    for n, pc in enumerate(same[:2]):
        body.count_block(state, table, pc, 10)
        assert state[body.B_LAST_ICOUNT] == n + 1
    assert state[body.B_ESTIMATED] == 0
    body.learn_block(table, mask, same[2], 7, 10)
    body.count_block(state, table, same[2], 10)
    assert (state[body.B_LAST_ICOUNT], state[body.B_ESTIMATED]) == (7, 0)
    body.count_block(state, table, same[0], 12)
    assert (state[body.B_LAST_ICOUNT], state[body.B_ESTIMATED]) == (3, 1)

"""Whatever the host does, the guest reads what a dict of bytes says it must.

Random guest loads, stores and read-modify-writes on 96 pages between random host operations, with every
truth checked, in two machines: one that switches tasks only when they block and one that switches at
random points. REFAULT_STEPS sets the steps a run (2,000 by default; `make soak` sets more).
"""

from __future__ import annotations

import os
import random

import pytest

from emu.hostops import perform
from host_mm.kernel.errors import KernelError
from refault.scenarios.api import DATA_GPA, PAGE
from refault.scenarios.emulator import EmulatorBackend

STEPS = int(os.environ.get("REFAULT_STEPS", "2000"))
SEEDS = [int(s) for s in os.environ.get("REFAULT_SEEDS", "1,2").split(",")]
PAGES = 96
U64 = (1 << 64) - 1


class Machine:
    """The oracle beside the machine: `words` maps offset to the u64 that a read must give."""

    def __init__(self, seed: int, strategy: str) -> None:
        params = {"sched.strategy": "random", "sched.period": "6"} if strategy == "random" else {}
        self.rng = random.Random(seed)
        self.backend = EmulatorBackend(seed=seed, check=True, params=params)
        self.words: dict[int, int] = {}
        self.snapshot: dict[int, int] | None = None
        self.maybe_zero: set[int] = set()
        self.read_only: set[int] = set()
        self.logging = False
        self.written: set[int] = set()
        self.log: list[str] = []

    def place(self) -> int:
        return self.rng.randrange(PAGES) * PAGE + self.rng.choice((0, 8, 0x7F8, 0xFF8))

    def expect(self, offset: int, got: object) -> None:
        page = offset // PAGE
        want = self.words.get(offset, 0)
        if got == 0 and want and page in self.maybe_zero:
            # MADV_FREE: reclaim dropped the page, and then it is gone as a whole.
            self.forget(page)
            return
        assert got == want, f"D+{offset:#x} is {got!r}, wants {want:#x}"

    def forget(self, page: int) -> None:
        for offset in [o for o in self.words if o // PAGE == page]:
            del self.words[offset]
        self.maybe_zero.discard(page)

    def op(self, name: str, *args: int) -> int:
        board = self.backend.board
        return board.host.sched.run_task("op", lambda: perform(board, name, *args))

    # -- steps --------------------------------------------------------------------------------

    def load(self) -> None:
        offset = self.place()
        self.expect(offset, self.backend.load(offset))

    def host_read(self) -> None:
        offset = self.place()
        self.expect(offset, self.backend.host_read(offset))

    def _settle(self, offset: int) -> None:
        # A store to a page that MADV_FREE gave away keeps it or starts it anew: read first to know.
        if offset // PAGE in self.maybe_zero:
            for known in [o for o in self.words if o // PAGE == offset // PAGE]:
                self.expect(known, self.backend.host_read(known))

    def store(self) -> None:
        offset, value = self.place(), self.rng.getrandbits(64)
        self._settle(offset)
        result = self.backend.store(offset, value)
        if offset // PAGE in self.read_only:
            assert result == "EFAULT", result
            return
        assert result == "ok", result
        self.words[offset] = value
        self.maybe_zero.discard(offset // PAGE)
        self.written.add(offset // PAGE)

    def rmw(self) -> None:
        offset = self.place()
        if offset // PAGE in self.read_only:
            return
        self._settle(offset)
        assert self.backend.read_modify_write(offset) == "IO"
        self.words[offset] = (self.words.get(offset, 0) + 1) & U64
        self.maybe_zero.discard(offset // PAGE)
        self.written.add(offset // PAGE)

    def host_write(self) -> None:
        offset, value = self.place(), self.rng.getrandbits(64)
        if offset // PAGE in self.read_only:
            return
        self._settle(offset)
        assert self.backend.host_write(offset, value) is None
        self.words[offset] = value
        self.maybe_zero.discard(offset // PAGE)

    def span(self) -> tuple[int, int]:
        first = self.rng.randrange(PAGES)
        return first, min(self.rng.choice((1, 1, 2, 5, 16)), PAGES - first)

    def swap_out(self) -> None:
        first, count = self.span()
        self.op("swap_out", DATA_GPA + first * PAGE, count)

    def migrate(self) -> None:
        first, count = self.span()
        self.op("migrate", DATA_GPA + first * PAGE, count)

    def dontneed(self) -> None:
        first, count = self.span()
        self.op("dontneed", DATA_GPA + first * PAGE, count)
        for page in range(first, first + count):
            self.forget(page)

    def free(self) -> None:
        first, count = self.span()
        self.op("free", DATA_GPA + first * PAGE, count)
        self.maybe_zero.update(range(first, first + count))

    def cold(self) -> None:
        first, count = self.span()
        self.op("cold", DATA_GPA + first * PAGE, count)

    def age(self) -> None:
        first, count = self.span()
        self.op("age", DATA_GPA + first * PAGE, count)

    def mremap(self) -> None:
        first, count = self.span()
        self.op("mremap", DATA_GPA + first * PAGE, count)

    def locked(self) -> None:
        """Reclaim and migration while a range is locked; only what may be written can be populated."""
        first, count = self.span()
        if self.read_only & set(range(first, first + count)):
            return
        for page in range(first, first + count):
            self._settle(page * PAGE)
        self.op("mlock", DATA_GPA + first * PAGE, count)
        self.op("reclaim", 8)
        self.op("migrate", DATA_GPA + first * PAGE, count)
        self.op("munlock", DATA_GPA + first * PAGE, count)

    def reclaim(self) -> None:
        self.op("reclaim", self.rng.choice((1, 8, 32)))

    def clear_refs(self) -> None:
        self.op("clear_refs", self.rng.choice((1, 4)))

    def protect(self) -> None:
        first, count = self.span()
        self.backend.mprotect(first * PAGE, count * PAGE, 1)
        self.read_only.update(range(first, first + count))

    def unprotect(self) -> None:
        self.backend.mprotect(0, PAGES * PAGE, 3)
        self.read_only.clear()

    def fork(self) -> None:
        if self.snapshot is None:
            for page in sorted(self.maybe_zero):
                for offset in [o for o in self.words if o // PAGE == page]:
                    self.expect(offset, self.backend.host_read(offset))
            self.op("fork")
            # A page given to MADV_FREE may still vanish in the child: no claim about those.
            self.snapshot = {o: v for o, v in self.words.items() if o // PAGE not in self.maybe_zero}

    def child_read(self) -> None:
        if self.snapshot:
            offset = self.rng.choice(sorted(self.snapshot))
            got = self.op("child_read", DATA_GPA + offset, 8)
            assert got == self.snapshot[offset], f"the child reads {got:#x} at D+{offset:#x}"

    def child_exit(self) -> None:
        if self.snapshot is not None:
            self.op("child_exit")
            self.snapshot = None

    def dirty_log(self) -> None:
        self.logging = not self.logging
        self.op("dirty_log", DATA_GPA, int(self.logging))
        self.written.clear()

    def get_dirty(self) -> None:
        if not self.logging:
            with pytest.raises(KernelError):
                self.op("get_dirty", DATA_GPA, 1)
            return
        board = self.backend.board
        bitmap = int.from_bytes(
            board.host.sched.run_task("log", lambda: board.kvm.get_dirty_log(1)), "little"
        )
        missing = [page for page in self.written if not bitmap >> page & 1]
        assert not missing, f"the guest wrote pages {missing}, the dirty log does not have them"
        self.written.clear()

    STEPS = (
        ("load", 20), ("store", 20), ("rmw", 8), ("host_read", 5), ("host_write", 5), ("swap_out", 6),
        ("migrate", 5), ("dontneed", 3), ("free", 2), ("cold", 1), ("age", 3), ("reclaim", 3),
        ("mremap", 3), ("locked", 1),
        ("clear_refs", 1), ("protect", 1), ("unprotect", 2), ("fork", 2), ("child_read", 3),
        ("child_exit", 1), ("dirty_log", 1), ("get_dirty", 2),
    )

    def step(self) -> None:
        names, weights = zip(*self.STEPS, strict=True)
        name = self.rng.choices(names, weights)[0]
        self.log.append(name)
        getattr(self, name)()

    def finish(self) -> None:
        self.unprotect()
        for offset in sorted(self.words):
            self.expect(offset, self.backend.load(offset))
        if self.snapshot is not None:
            self.child_exit()
        self.backend.close()


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("strategy", ["run-to-block", "random"])
@pytest.mark.parametrize("seed", SEEDS)
def test_guest_reads_what_the_oracle_says(seed: int, strategy: str) -> None:
    machine = Machine(seed, strategy)
    steps = max(1, STEPS // (2 * len(SEEDS)))
    for number in range(steps):
        try:
            machine.step()
        except BaseException:
            last = " ".join(machine.log[-12:])
            print(f"\nstep {number} of seed {seed}, {strategy}; the last steps: {last}")
            print(
                f"repeat: REFAULT_SEEDS={seed} REFAULT_STEPS={2 * (number + 1)} "
                f"python -m pytest {__file__} -k {strategy}"
            )
            raise
    machine.finish()

"""Guests that count on many pages while the host does random things: no count is ever lost.

Two vCPUs run tests/property/counters.s in short slices beside tasks of the host that choose from the
operations, all under a scheduler that switches at random points. The retries of the fault path are
counted by their reasons: if none happened, nothing raced and the test has shown nothing.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import refault
from emu.abi import SLOT_TEST_GPA
from emu.hostops import perform
from host_mm.kernel.errors import KernelError
from trace_events.stream import Listener

GUEST = str(Path(__file__).with_name("counters.s"))
SEEDS = [int(s) for s in os.environ.get("REFAULT_SEEDS", "1,2,3,4").split(",")]
SLICE = 300
PAGES, PASSES = 24, max(1, int(os.environ.get("REFAULT_STEPS", "2000")) // 120)
REASONS = {
    "stale-before-gup", "stale-after-gup", "stale-under-lock", "stale-root", "invalid-slot", "spte-changed"
}
seen: Counter[str] = Counter()


class Storm:
    """Host tasks that ask for random operations until the guest has ended."""

    def __init__(self, vm: refault.VM, seed: int) -> None:
        self.vm = vm
        self.rng = random.Random(seed)
        self.slot: int | None = None
        self.logging = 0
        sched = vm.board.host.sched
        for body, period in (
            (self.memory, 60_000), (self.memory, 60_000), (self.slots, 200_000), (self.process, 400_000)
        ):
            sched.spawn(f"storm {body.__name__}", partial(self.loop, body, period))

    def loop(self, body: Callable[[], None], period: int) -> None:
        board = self.vm.board
        while board.stop is None:
            board.host.sched.sleep(self.rng.randrange(period // 2, period * 3 // 2))
            if board.stop is None:
                try:
                    body()
                except KernelError as exc:
                    if exc.errno not in (errno.EBUSY, errno.ECHILD, errno.ENOMEM):
                        raise

    def op(self, name: str, *args: int) -> int:
        return perform(self.vm.board, name, *args)

    def memory(self) -> None:
        """What leaves the bytes as they are."""
        rng = self.rng
        pages = self.vm.config.memory >> 12
        # The lowest MiB and the heap behind it, where the guest is.
        first, count = rng.randrange(min(pages, 700) - 16), rng.choice((1, 4, 16))
        name = rng.choice(
            ("migrate", "migrate", "swap_out", "age", "cold", "reclaim", "clear_refs", "protect", "read")
        )
        if name == "reclaim":
            self.op(name, count)
        elif name == "clear_refs":
            self.op(name, rng.choice((1, 4)))
        elif name == "protect":
            self.op(name, first << 12, count, rng.choice((0, 1)))
            self.op("protect", first << 12, count, 3)
        elif name == "read":
            self.op("host_read", first << 12)
        else:
            self.op(name, first << 12, count)

    def slots(self) -> None:
        """A slot comes and goes; the dirty log is turned on and off and read."""
        if self.slot is None:
            self.slot = self.op("slot_create", SLOT_TEST_GPA, 4)
        elif self.rng.random() < 0.7:
            self.op("slot_delete", self.slot)
            self.op("slot_restore", self.slot)
        elif self.logging:
            self.op("get_dirty", 0x10_0000, 64)
            self.logging = self.rng.choice((0, 1))
            self.op("dirty_log", 0, self.logging)
        else:
            self.logging = 1
            self.op("dirty_log", 0, 1)

    def process(self) -> None:
        """fork, and the child's end."""
        self.op("fork" if self.vm.board.child is None else "child_exit")


@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_count_is_lost_beside_a_storm(seed: int) -> None:
    seen.update(storm(seed))


@pytest.mark.timeout(0)
def test_nor_under_linux_5_10() -> None:
    reasons = storm(SEEDS[0], "linux-5.10")
    assert not reasons & Counter({"stale-before-gup": 1, "stale-after-gup": 1}), "it asks under mmu_lock only"


@pytest.mark.timeout(0)
@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
def test_nor_in_the_mmu_that_is_not_the_kernels_default(profile: str) -> None:
    storm(SEEDS[0], profile, "N" if profile == "linux-6.18" else "Y")


def storm(seed: int, profile: str = "linux-6.18", tdp_mmu: str = "") -> Counter[str]:
    """Why faults were retried."""
    params = {"sched.strategy": "random", "sched.period": str(3 + seed % 3), "kvm_intel.eptad": str(seed % 2)}
    if tdp_mmu:
        params["kvm.tdp_mmu"] = tdp_mmu
    ram = "3M" if seed % 2 else "16M"
    reasons: Counter[str] = Counter()
    with refault.VM(
        "8M", host_ram=ram, swap="16M", vcpus=2, seed=seed, check=True, params=params, profile=profile
    ) as vm:
        stream = vm.board.host.stream
        retries = Listener(
            ("refault:fault_retry",), lambda e: reasons.update([e.args["reason"]]), ancestors=False
        )
        stream.listen(retries)
        vm.load(GUEST, f"pages={PAGES}", f"passes={PASSES}")
        vm.board.cpu.slice_insns = SLICE
        vm.run(until=lambda: "start a CPU" in vm.serial)
        Storm(vm, seed)
        stop = vm.run()
        assert vm.board.cpu.slice_insns == SLICE
        assert " 0 unexpected failures" in vm.serial, f"{stop}\n{vm.serial}"
        assert "FAIL" not in vm.serial, vm.serial
    assert sum(reasons.values()) > 0, "nothing raced"
    return reasons


def test_every_reason_to_retry_was_met() -> None:
    if len(SEEDS) < 4:
        pytest.skip("needs the runs of four seeds")
    assert set(seen) >= REASONS, f"never met: {sorted(REASONS - set(seen))}; met: {dict(seen)}"

"""No image harms the process that runs it, whatever it holds.

REFAULT_IMAGES sets how many are tried (300 by default).
"""

from __future__ import annotations

import os
import time

import pytest

import refault
from emu.vmm import Vmm
from host_mm.kernel.errors import OutOfMemory
from refault.errors import UsageError
from tests.refault.images import random_image

IMAGES = int(os.environ.get("REFAULT_IMAGES", "300"))
GROUPS = 5
CANARY = bytes(range(256)) * 16 * 8
ENDS = {"exit", "halt", "dead", "shutdown", "error", "limit"}  # and never "timeout"


def run(seed: int) -> str:
    with refault.VM(
        "4M", host_ram="3M" if seed % 4 == 0 else "8M", swap="8M", vcpus=1 + seed % 2, seed=seed,
        check=seed % 3 == 0, mmu=("ept", "shadow")[seed // 2 % 2],
        profile=("linux-6.18", "linux-5.10")[seed // 4 % 2],
    ) as vm:
        host = vm.board.host
        bystander = Vmm(host.mm, host.mm.create_process("bystander"))
        place = host.sched.run_task("bystander", lambda: bystander.mmap(len(CANARY), 3))
        host.sched.run_task("bystander", lambda: bystander.write(place, CANARY))
        try:
            vm.load(random_image(seed))
        except UsageError as exc:
            return "refused" if len(str(exc).splitlines()) == 1 else str(exc)
        try:
            stop = vm.run(max_insns=100_000, timeout=20)
        except OutOfMemory:
            return "out of memory"
        vm.finish()
        assert host.sched.run_task("bystander", lambda: bystander.read(place, len(CANARY))) == CANARY
        host.sched.run_task("bystander", bystander.exit)
        assert stop.why
        return stop.kind


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_random_image_ends_in_good_order(group: int) -> None:
    for seed in range(group, IMAGES, GROUPS):
        began = time.monotonic()
        end = run(seed)
        assert end in ENDS | {"refused", "out of memory"}, f"image {seed}: {end}"
        assert time.monotonic() - began < 60, f"image {seed} met no limit"

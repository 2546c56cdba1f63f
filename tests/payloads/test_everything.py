"""The payload `everything` survives every operation, and each meets pages that the guest has mapped.

REFAULT_OPS   operations over all machines (12,000; `make soak` sets more)
REFAULT_SEEDS the seed ("1")
"""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

import refault
from emu.board import Board
from emu.hostops import OPERATIONS
from guest_payloads.builder import payload_info
from kvm_model.instrument import leaf_spte
from trace_events.event import Event
from trace_events.stream import Listener

OPS = int(os.environ.get("REFAULT_OPS", "12000"))
SEED = int(os.environ.get("REFAULT_SEEDS", "1").split(",")[0])
HITS = 100
"""How often, in all of this, each must meet a page that an SPTE maps."""
RANDOM = {"sched.strategy": "random", "sched.period": "40"}
MACHINES = {
    # Options, ns between two things that the host does by itself, the share of the operations.
    "run to block": ({}, "64M", 2_000_000, 0.5),
    "random": (RANDOM, "64M", 0, 0.5),
    "random, little RAM": (RANDOM, "8M", 2_000_000, 0.1),
}

NOT_ASKED = {
    # Instruments, and questions about the machine.
    "cpu_count", "ept_ad", "ept_restore", "ept_set", "last_exit", "map_level", "mmio_device",
    "protect_faults", "start_cpu",
    "child_read",  # changes nothing
    # How the log is kept is chosen once for a machine: tests/emu/test_dirty_rings.py and tests of KVM's.
    "clear_dirty", "harvest_rings", "manual_dirty",
    "smi", "smram", "smram_out",  # The payload smm asks for these.
    "flash",  # The payload flash asks for it.
    # The payload gvt asks for these.
    "gvt_close", "gvt_open", "gvt_read", "gvt_shadow", "gvt_stale", "gvt_told", "gvt_unshadow",
    "apic_page",  # The payload apic asks for it.
    "kvmclock_ctrl", "set_clock",  # The payload kvmclock asks for these.
    # The payloads guest-memfd and prefault ask for these.
    "gmem_create", "gmem_punch", "map_gpa_range", "memory_attributes", "prefault",
}
ANSWERED = {"contig_free"}
"""Asked for only where another one was served."""
ONCE = {"file_create", "hugetlb_create", "memfd_create", "pfnmap_create", "slot_create", "weather"}


class Hits:
    """Counts the operations that find a leaf SPTE in their range, or anywhere if they have none."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.count: Counter[str] = Counter()
        board.host.stream.listen(Listener(("refault:host_op",), self.note, ancestors=False))

    def note(self, event: Event) -> None:
        name = event.args["op"]
        args = [int(text, 0) for text in re.findall(r"0x[0-9a-f]+|\d+", event.args["args"])]
        gpa, pages = self.span(name, args)
        kvm = self.board.kvm
        self.count[name] += any(leaf_spte(kvm, gfn)[1] for gfn in range(gpa >> 12, (gpa >> 12) + pages))

    def span(self, name: str, args: list[int]) -> tuple[int, int]:
        names = [text.split(":")[0] for text in OPERATIONS[name].args]
        given = dict(zip(names, args, strict=False))
        if "gpa" not in given or "slot" in given:
            # It takes mappings wherever they are; the guest's text is mapped whenever it asks.
            return 0x10_0000, 64
        return given["gpa"], given.get("pages", 1)


def asked() -> set[str]:
    return {*payload_info("everything").vmcalls}


def test_the_payload_asks_for_every_operation() -> None:
    assert asked() == {*OPERATIONS} - NOT_ASKED


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("machine", MACHINES)
def test_no_byte_is_wrong_after_any_operation(machine: str) -> None:
    params, ram, weather, share = MACHINES[machine]
    ops = int(OPS * share)
    # So that memory can be taken and sent offline.
    params = {"mm.page_group_by_mobility": "Y", **params}
    with refault.VM("16M", host_ram=ram, swap="64M", seed=SEED, check=True, params=params) as vm:
        hits = Hits(vm.board).count
        vm.load("everything", f"ops={ops}", f"seed={SEED}", f"weather={weather}")
        stop = vm.run()
        assert stop.kind == "exit", f"{stop}\n{vm.serial}"
        assert stop.status == 0, vm.serial
    if share == 0.5:
        wanted = int(HITS * share * min(1, OPS / 12_000))
        few = {name: hits[name] for name in asked() - ONCE - ANSWERED if hits[name] < wanted}
        assert not few, f"met fewer than {wanted} mapped pages: {few}"

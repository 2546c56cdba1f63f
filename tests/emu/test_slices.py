"""A guest that only exits gives way, too: limits and Ctrl-C are looked at between slices."""

from __future__ import annotations

import refault

ENDLESS_OUT = bytes.fromhex("e680ebfc")  # out 0x80,al; jmp back
ENDLESS_FAULT = bytes.fromhex("bf0000b0fe8807ebfc")  # mov edi,0xfeb00000; mov [rdi],al; jmp back


def test_a_guest_that_does_nothing_but_port_output_meets_its_limit() -> None:
    with refault.VM("4M") as vm:
        vm.load(ENDLESS_OUT)
        assert vm.run(max_insns=500).kind == "limit"


def test_a_guest_that_does_nothing_but_mmio_meets_its_limit() -> None:
    with refault.VM("4M") as vm:
        vm.load(ENDLESS_FAULT)
        asked = []
        stop = vm.run(until=lambda: len(asked) > 3 or asked.append(1) is not None)
        assert stop.kind == "pause"

"""x86_emulate.py: accesses by the memslots, exchanges, page crossings, MMIO, what cannot be emulated."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model.kvm_x86_ops import MmioAccess
from kvm_model.mmu.page_track import kvm_write_track_add_gfn
from tests.kvm_model.machine import BASE, Machine
from tests.kvm_model.test_page_track import machine

TRACKED = 0x3000


def tracked(**options: Any) -> tuple[Machine, list[Any]]:
    m, log, _ = machine(**options)
    m.do(lambda: kvm_write_track_add_gfn(m.kvm, TRACKED >> 12))
    m.run(("r", TRACKED))
    return m, log


def script(m: Machine, *accesses: MmioAccess | None) -> list[int]:
    """The emulator's next accesses, one an instruction; where one has another for `priv`, that follows it."""
    todo = list(accesses)
    data: list[int] = []

    def complete(vcpu: Any, access: MmioAccess, value: int) -> MmioAccess | None:
        data.append(value)
        if isinstance(access.priv, MmioAccess):
            return access.priv
        m.cpu.skip_emulated_instruction(vcpu, 4)
        return None

    m.cpu.emulate = lambda vcpu, gpa: todo.pop(0)  # type: ignore[method-assign]
    m.cpu.complete_mmio = complete  # type: ignore[assignment, method-assign]
    return data


def peek(m: Machine, gpa: int, length: int = 8) -> int:
    return int.from_bytes(m.do(lambda: copy_from_user(m.process, BASE + gpa, length)), "little")


def test_a_read_modify_write_is_a_load_then_a_store_and_one_word_to_the_nodes() -> None:
    m, log = tracked()
    data = script(m, MmioAccess(False, 4, priv=MmioAccess(True, 4, 0x1234)))
    m.run(("w", TRACKED + 4, 0))
    assert data == [0, 0x1234]
    assert log == [("n", TRACKED + 4, 0x1234)]
    assert peek(m, TRACKED + 4, 4) == 0x1234


def test_a_locked_store_is_an_exchange_by_compare() -> None:
    m, log = tracked()
    script(m, MmioAccess(True, 8, 7, lock=True, old=0))
    m.run(("w", TRACKED, 0))
    assert (peek(m, TRACKED), log) == (7, [("n", TRACKED, 7)])


def test_a_lost_exchange_stores_nothing_and_the_guest_executes_it_again() -> None:
    m, log = tracked()
    m.do(lambda: copy_to_user(m.process, BASE + TRACKED, b"\x05"))
    script(m, MmioAccess(True, 8, 7, lock=True, old=0), MmioAccess(True, 8, 9, lock=True, old=5))
    m.run(("w", TRACKED, 0))
    assert (peek(m, TRACKED), log) == (9, [("n", TRACKED, 9)])
    assert m.vcpus[0].stat["insn_emulation"] == 2


def test_a_lost_exchange_is_logged_all_the_same() -> None:
    m, _ = tracked()
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 << 12, BASE, 1))
    script(m, MmioAccess(True, 8, 7, lock=True, old=1), None, None)
    m.run_raw(("w", TRACKED, 0))
    assert m.do(lambda: m.kvm.get_dirty_log(0))[0] == 0b1000


def test_a_store_across_pages_is_told_page_by_page() -> None:
    m, log = tracked()
    parts = ((TRACKED - 2, 2), (TRACKED, 6))
    script(m, MmioAccess(True, 8, 0x8877665544332211, parts=parts))
    m.run(("w", TRACKED, 0))
    assert peek(m, TRACKED - 2) == 0x8877665544332211
    assert log == [("n", TRACKED - 2, 0x2211), ("n", TRACKED, 0x887766554433)]


def test_an_exchange_across_pages_is_emulated_as_a_write() -> None:
    m, log = tracked()
    parts = ((TRACKED - 2, 2), (TRACKED, 6))
    script(m, MmioAccess(True, 8, 1, lock=True, old=99, parts=parts))
    m.run(("w", TRACKED, 0))
    assert peek(m, TRACKED - 2) == 1
    assert len(log) == 2


def test_a_load_across_the_end_of_memory_has_its_second_part_from_user_space() -> None:
    m, _ = tracked(pages=4)
    m.do(lambda: copy_to_user(m.process, BASE + 0x3FFC, b"\x11\x22\x33\x44"))
    data = script(m, MmioAccess(False, 8, parts=((0x3FFC, 4), (0x4000, 4))))
    exit_ = m.run_raw(("r", 0x4000))
    assert (exit_.kind, exit_.gpa, exit_.size, exit_.write) == ("mmio", 0x4000, 4, False)
    m.vcpus[0].complete_mmio(0xDDCCBBAA)
    m.run()
    assert data == [0xDDCCBBAA44332211]


def test_a_store_to_two_pages_without_memory_is_two_exits() -> None:
    m, _ = tracked(pages=4)
    script(m, MmioAccess(True, 8, 0x1122334455667788, parts=((0x5FFC, 4), (0x6000, 4))))
    first = m.run_raw(("w", 0x5FFC, 0))
    assert (first.gpa, first.size, first.data) == (0x5FFC, 4, 0x55667788)
    second = m.run_raw()
    assert (second.gpa, second.size, second.data) == (0x6000, 4, 0x11223344)
    assert m.run() == []
    assert m.vcpus[0].stat["mmio_exits"] == 1


@pytest.mark.parametrize("profile", ["linux-6.18", "linux-5.10"])
def test_what_cannot_be_emulated_is_tried_by_the_cpu_once_and_then_ends_the_vm(profile: str) -> None:
    m, _ = tracked(profile=profile)
    script(m, None, None)
    exit_ = m.run_raw(("w", TRACKED, 0))
    assert exit_.kind == "internal-error"
    assert "cannot be emulated" in exit_.why
    assert m.vcpus[0].stat["insn_emulation"] == 2
    assert m.vcpus[0].stat["insn_emulation_fail"] == 1
    assert m.vcpus[0].last_retry_addr == TRACKED

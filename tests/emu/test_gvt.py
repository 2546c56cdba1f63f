"""emu/devices/gvt.py, emu/operations/gvt.py: a GPU behind page tracking, as the host asks for it."""

from __future__ import annotations

import pytest

import refault
from host_mm.kernel.errors import KernelError

TABLE, PAGE = 0x40_0000, 4096
CASES = [
    pytest.param("linux-6.18", "Y", id="6.18-tdp"), pytest.param("linux-6.18", "N", id="6.18-direct"),
    pytest.param("linux-5.10", "Y", id="5.10-tdp"), pytest.param("linux-5.10", "N", id="5.10-direct"),
]


def machine(profile: str = "linux-6.18", tdp: str = "Y") -> refault.VM:
    vm = refault.VM("8M", seed=1, check=True, profile=profile, params={"kvm.tdp_mmu": tdp})
    vm.write(TABLE, bytes(PAGE))
    for n in range(4):
        vm.write(TABLE + 8 * n, (TABLE + (n + 1) * PAGE | 1).to_bytes(8, "little"))
        vm.write(TABLE + (n + 1) * PAGE, (100 + n).to_bytes(8, "little"))
    return vm


@pytest.mark.parametrize(("profile", "tdp"), CASES)
def test_a_gpu_reads_by_the_table_and_holds_what_it_maps(profile: str, tdp: str) -> None:
    with machine(profile, tdp) as vm:
        gpu = vm.host.gvt_open()
        assert vm.host.gvt_shadow(gpu, TABLE) == 0
        assert [vm.host.gvt_read(gpu, TABLE, n) for n in range(4)] == [100, 101, 102, 103]
        # Pinned pages go nowhere, and the table may go where it likes.
        assert vm.host.migrate(TABLE + PAGE, 4) == 0
        assert vm.host.migrate(TABLE, 1) == 1
        assert [vm.host.gvt_read(gpu, TABLE, n) for n in range(4)] == [100, 101, 102, 103]
        assert vm.host.gvt_stale(gpu) == 0
        assert vm.host.gvt_close(gpu) == 0
        assert vm.host.migrate(TABLE + PAGE, 4) == 4


def test_what_the_host_writes_into_the_table_the_gpu_does_not_hear() -> None:
    with machine() as vm:
        gpu = vm.host.gvt_open()
        vm.host.gvt_shadow(gpu, TABLE)
        vm.write(TABLE, bytes(8))
        assert vm.host.gvt_stale(gpu) == 1
        assert vm.host.gvt_told(gpu) == 0


@pytest.mark.parametrize(("profile", "tdp"), CASES)
def test_a_slot_that_goes_takes_its_tables_along(profile: str, tdp: str) -> None:
    with machine(profile, tdp) as vm:
        gpu = vm.host.gvt_open()
        slot = vm.host.slot_create(0xE000_0000, 4)
        vm.host.gvt_shadow(gpu, 0xE000_0000)
        vm.host.slot_delete(slot)
        with pytest.raises(KernelError, match="not shadowed"):
            vm.host.gvt_unshadow(gpu, 0xE000_0000)
        assert vm.host.gvt_stale(gpu) == 0


def test_a_slot_with_a_table_moves_in_5_10_only() -> None:
    for profile in ("linux-6.18", "linux-5.10"):
        with machine(profile) as vm:
            gpu = vm.host.gvt_open()
            slot = vm.host.slot_create(0xE000_0000, 4)
            vm.host.gvt_shadow(gpu, 0xE000_0000)
            if profile == "linux-5.10":
                assert vm.host.slot_move(slot, 0xE010_0000) == 0
                continue
            with pytest.raises(KernelError) as refused:
                vm.host.slot_move(slot, 0xE010_0000)
            assert refused.value.errno == 22


@pytest.mark.parametrize(("call", "errno"), [
    ("gvt_shadow(9, 0x400000)", 2), ("gvt_shadow(1, 0x40000000)", 22), ("gvt_shadow(1, 0x400001)", 22),
    ("gvt_unshadow(1, 0x500000)", 2), ("gvt_read(1, 0x500000, 0)", 2), ("gvt_read(1, 0x500000, 512)", 22),
    ("gvt_read(1, 0x500000, 0, 4)", 22), ("gvt_told(2)", 2), ("gvt_stale(2)", 2), ("gvt_close(2)", 2),
])
def test_bad_arguments(call: str, errno: int) -> None:
    with machine() as vm:
        assert vm.host.gvt_open() == 1
        with pytest.raises(KernelError) as refused:
            eval(f"vm.host.{call}")
        assert refused.value.errno == errno


def test_there_are_eight() -> None:
    with machine() as vm:
        assert [vm.host.gvt_open() for _ in range(8)] == list(range(1, 9))
        with pytest.raises(KernelError) as refused:
            vm.host.gvt_open()
        assert refused.value.errno == 19
        vm.host.gvt_close(3)
        assert vm.host.gvt_open() == 3

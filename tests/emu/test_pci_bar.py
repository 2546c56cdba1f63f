"""A BAR is mapped by faults or at once, and its driver can take it back from everybody."""

from __future__ import annotations

from typing import Any

import pytest

from emu.devices.pci_bar import PciBar
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, Recorder, make_host, run

PAGES = 4


def machine() -> tuple[PciBar, Process]:
    host = make_host()
    return PciBar(host, PAGES), host.create_process("vmm")


def test_a_fault_maps_one_frame_and_two_processes_share_it() -> None:
    bar, process = machine()
    base = bar.mmap(process)
    child = fork_process(process)

    def body() -> None:
        copy_to_user(process, base + PAGE, b"shared")
        assert copy_from_user(child, base + PAGE, 6) == b"shared"
        assert bar.host.ram.read((bar.first + 1) << 12, 6) == b"shared"

    run(bar.host, body)
    audit(bar.host)


@pytest.mark.parametrize("how", ["mmap", "mmap_at_once"])
def test_revoking_zaps_every_mapping_in_a_bracket_and_a_fault_finds_the_new_frames(how: str) -> None:
    bar, process = machine()
    base = getattr(bar, how)(process)
    child = fork_process(process)
    recorders: list[Any] = []
    for each in (process, child):
        run(bar.host, lambda each=each: copy_to_user(each, base, b"old"))  # type: ignore[misc]
        recorder = Recorder(base)
        mmu_notifier_register(recorder, each.mm)
        recorders.append(recorder)
    run(bar.host, bar.revoke)
    assert [recorder.take() for recorder in recorders] == [[("clear", 0, PAGES * PAGE)]] * 2
    if how == "mmap":
        run(bar.host, lambda: copy_to_user(process, base + 8, b"new"))
        assert copy_from_user(child, base, 11) == bytes(8) + b"new"
    else:
        with pytest.raises(KernelError, match="bus error"):
            run(bar.host, lambda: copy_from_user(process, base, 1))
    audit(bar.host)
    exit_process(child)
    exit_process(process)
    bar.close()
    assert not bar.host.device_frames.busy
    assert not bar.host.mappings


def test_a_function_whose_memory_is_disabled_is_a_bus_error() -> None:
    bar, process = machine()
    base = bar.mmap(process)
    run(bar.host, lambda: copy_to_user(process, base, b"x"))
    run(bar.host, bar.disable)
    with pytest.raises(KernelError, match="bus error"):
        run(bar.host, lambda: copy_from_user(process, base, 1))
    with pytest.raises(KernelError, match="EINVAL"):
        run(bar.host, bar.revoke)


def test_closing_takes_it_from_a_process_that_still_maps_it() -> None:
    bar, process = machine()
    base = bar.mmap(process)
    run(bar.host, lambda: copy_to_user(process, base, b"x"))
    run(bar.host, bar.close)
    audit(bar.host)
    exit_process(process)
    audit(bar.host)

"""Memory regions: what a key opens, on demand or pinned, and for how long (emu/devices/rdma_mr.py)."""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EINVAL, ENOENT, EPERM

import pytest

from host_mm.fork import exit_process
from host_mm.kernel.errors import KernelError
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.emu.rdma_machine import IOVA, PAGES, at_rest, machine, swap_out
from tests.host_mm.machine import PAGE, run


@pytest.mark.parametrize("pinned", [False, True])
def test_what_the_process_wrote_the_device_reads_and_the_other_way_round(pinned: bool) -> None:
    device, process, base = machine()
    key = device.register(IOVA, base, PAGES * PAGE, pinned=pinned)

    def body() -> None:
        copy_to_user(process, base + 100, b"from the cpu")
        assert device.dma_read(key, IOVA + 100, 12) == b"from the cpu"
        device.dma_write(key, IOVA + PAGE - 3, b"over the edge")
        assert copy_from_user(process, base + PAGE - 3, 13) == b"over the edge"
        assert device.fetch_add(key, IOVA + 8 * PAGE, 7) == 0
        assert device.fetch_add(key, IOVA + 8 * PAGE, 1) == 7
        assert copy_from_user(process, base + 8 * PAGE, 8) == (8).to_bytes(8, "little")

    run(device.host, body)
    at_rest(device)
    device.close()


@pytest.mark.parametrize("pinned", [False, True])
def test_an_on_demand_region_survives_the_loss_of_its_pages_and_a_pinned_one_keeps_them(pinned: bool) -> None:
    device, process, base = machine()
    key = device.register(IOVA, base, PAGES * PAGE, pinned=pinned)

    def body() -> None:
        device.dma_write(key, IOVA, b"".join(bytes([n]) * PAGE for n in range(PAGES)))
        swap_out(process, base, PAGES)
        assert process.mm.rss[1] == (PAGES if pinned else 0)
        assert device.dma_read(key, IOVA + 3 * PAGE, 2 * PAGE) == b"\3" * PAGE + b"\4" * PAGE

    run(device.host, body)
    at_rest(device)


def test_a_key_opens_its_region_and_nothing_else() -> None:
    device, process, base = machine()
    key = device.register(IOVA, base, PAGE, pinned=False)
    reading = device.register(IOVA, base, PAGE, pinned=False, writable=False)

    def refused(call: Callable[[], object], errno: int) -> None:
        with pytest.raises(KernelError) as caught:
            call()
        assert caught.value.errno == errno

    def body() -> None:
        refused(lambda: device.dma_read(key + 9, IOVA, 1), ENOENT)
        refused(lambda: device.dma_read(key, IOVA - 1, 1), EFAULT)
        refused(lambda: device.dma_write(key, IOVA + PAGE - 1, b"ab"), EFAULT)
        refused(lambda: device.dma_write(reading, IOVA, b"a"), EPERM)
        refused(lambda: device.fetch_add(key, IOVA + 4, 1), EINVAL)
        refused(lambda: device.deregister(99), ENOENT)

    run(device.host, body)
    process.host.sched.run_task("unmap", lambda: None)
    device.deregister(key)
    refused(lambda: device.dma_read(key, IOVA, 1), ENOENT)


def test_a_region_without_memory_behind_it_is_refused_or_faults() -> None:
    device, _, base = machine()
    nowhere = base + 2 * PAGES * PAGE
    with pytest.raises(KernelError) as caught:
        run(device.host, lambda: device.register(IOVA, nowhere, PAGE, pinned=True))
    assert caught.value.errno == EFAULT
    assert not device.host.pins.total()
    key = device.register(IOVA, nowhere, PAGE, pinned=False)
    with pytest.raises(KernelError) as caught:
        run(device.host, lambda: device.dma_read(key, IOVA, 1))
    assert caught.value.errno == EFAULT


@pytest.mark.parametrize("pinned", [False, True])
def test_registrations_may_outlive_the_process(pinned: bool) -> None:
    device, process, base = machine()
    host = device.host
    key = device.register(IOVA, base, PAGES * PAGE, pinned=pinned)
    run(host, lambda: device.dma_write(key, IOVA, bytes(PAGES * PAGE)))
    run(host, lambda: exit_process(process))
    audit(host)
    if not pinned:
        with pytest.raises(KernelError, match="EINVAL"):
            run(host, lambda: device.dma_read(key, IOVA, 1))
    run(host, device.close)
    audit(host)
    assert not host.mms

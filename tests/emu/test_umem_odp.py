"""On-demand paging: the device's table is right, its writes are known, its DMA is waited for."""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN

import pytest

from emu.devices.rdma import RdmaDevice
from host_mm import mmu_notifier as mn
from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.uaccess import copy_from_user
from tests.emu.rdma_machine import IOVA, PAGES, at_rest, machine, swap_out
from tests.host_mm.machine import PAGE, run
from trace_events.stream import Listener


def test_reading_asks_for_no_right_to_write() -> None:
    device, process, base = machine()
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)
    run(device.host, lambda: device.dma_read(key, IOVA, 1))
    region = device.region(key)
    assert region.umem.table.entries == {base >> 12: device.host.zero_pfn << 1}  # type: ignore[attr-defined]
    assert process.mm.rss[1] == 0
    run(device.host, lambda: device.dma_write(key, IOVA, b"x"))
    assert region.umem.table.entries[base >> 12] & 1  # type: ignore[attr-defined]


def test_one_fault_of_the_device_maps_the_rest_of_its_request() -> None:
    device, _, base = machine()
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)
    run(device.host, lambda: device.dma_write(key, IOVA, bytes(4 * PAGE)))
    assert len(device.region(key).umem.table.entries) == 4  # type: ignore[attr-defined]


def test_a_page_that_only_the_device_wrote_is_dirty_when_it_is_swapped_again() -> None:
    """Its host entry is clean: swapped in for reading, writable because nobody shares it."""
    device, process, base = machine()
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)

    def body() -> None:
        for value in (b"one", b"two", b"three"):
            device.dma_write(key, IOVA, value)
            swap_out(process, base, 1)
            assert copy_from_user(process, base, len(value)) == value

    run(device.host, body)
    at_rest(device)


def lose_a_write(*breaks: str) -> bytes:
    device, process, base = machine(breaks=frozenset(breaks))
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)

    def body() -> None:
        device.dma_write(key, IOVA, b"old")
        swap_out(process, base, 1)
        copy_from_user(process, base, 1)
        device.dma_read(key, IOVA, 1)
        device.dma_write(key, IOVA, b"new")
        swap_out(process, base, 1)

    run(device.host, body)
    return copy_from_user(process, base, 3)


def test_without_set_page_dirty_the_devices_write_is_dropped_with_the_page() -> None:
    assert lose_a_write() == b"new"
    with pytest.raises(BrokenTruth, match="dirty-dropped"):
        lose_a_write("odp-no-dirty")


def beside(device: RdmaDevice, first: Callable[[], object], then: Callable[[], object]) -> list[str]:
    """`then` runs once the DMA of `first` is under way; the order in which they end."""
    sched = device.host.sched
    order: list[str] = []

    def a() -> None:
        first()
        order.append("dma")

    def b() -> None:
        sched.sleep(100)
        then()
        order.append("host")

    run(device.host, a, b)
    return order


@pytest.mark.parametrize("what", [MADV_PAGEOUT, MADV_DONTNEED])
def test_a_bracket_waits_for_the_dma_that_is_under_way_in_its_range(what: int) -> None:
    device, process, base = machine()
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)
    run(device.host, lambda: device.dma_write(key, IOVA, b"x"))
    away = lambda: do_madvise(process.mm, base, PAGE, what)  # noqa: E731
    assert beside(device, lambda: device.dma_write(key, IOVA, b"y"), away) == ["dma", "host"]
    elsewhere = lambda: do_madvise(process.mm, base + PAGE, PAGE, what)  # noqa: E731
    run(device.host, lambda: device.dma_write(key, IOVA, b"x"))
    assert beside(device, lambda: device.dma_write(key, IOVA, b"y"), elsewhere) == ["host", "dma"]


def test_without_waiting_dma_lands_in_a_frame_that_is_somebody_elses() -> None:
    device, process, base = machine(breaks=frozenset({"odp-no-drain"}))
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)
    run(device.host, lambda: device.dma_write(key, IOVA, b"x"), device.host.lru.lru_add_drain_all)
    with pytest.raises(BrokenTruth, match=r"freed-frame-translated.*DMA under way"):
        beside(
            device, lambda: device.dma_write(key, IOVA, b"y"),
            lambda: do_madvise(process.mm, base, PAGE, MADV_DONTNEED),
        )


def test_a_swap_out_is_told_to_the_device_before_anything_changes_and_idles_after_the_bracket() -> None:
    """Documentation/mm/mmu_notifier.rst for interval notifiers, event by event."""
    device, process, base = machine()
    host = device.host
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)
    run(host, lambda: device.dma_write(key, IOVA, b"x"), host.lru.lru_add_drain_all)
    log: list[str] = []
    names = {
        "mmu_notifier_start": "start", "mmu_notifier_end": "end", "mmu_interval_seq": "seq",
        "mmu_interval_invalidate": "invalidate", "odp_unmap": "device table", "primary_flush": "flush",
        "swap_write_start": "io",
    }
    host.stream.listen(Listener(
        [f"refault:{name}" for name in names],
        lambda e: log.append(f"seq {e.args['why']}" if e.name == "mmu_interval_seq" else names[e.name]),
        ancestors=False,
    ))
    host.pte_hooks.append(
        lambda mm, _, old, new: log.append("set" if new else "clear") if mm is process.mm else None
    )
    run(host, lambda: swap_out(process, base, 1))
    assert log == [
        "start", "seq invalidate", "device table", "invalidate", "clear", "set", "seq idle", "end",
        "flush", "io",
    ]


def test_a_bracket_that_may_not_sleep_is_refused_and_leaves_the_device_alone() -> None:
    device, process, base = machine()
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)
    run(device.host, lambda: device.dma_write(key, IOVA, b"x"))
    region = device.region(key)
    range_ = mn.mmu_notifier_range_init(mn.MMU_NOTIFY_UNMAP, process.mm, base, base + PAGE)
    assert mn.mmu_notifier_invalidate_range_start_nonblock(range_) == -EAGAIN
    assert region.umem.table.entries  # type: ignore[attr-defined]
    assert process.mm.notifier_subscriptions.active_invalidate_ranges == 0

"""Guest RAM exported to an RDMA engine: device, guest and host see one memory, and the host may swap it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from errno import EFAULT, EINVAL, ENOENT, EPERM
from typing import Any

import pytest

from emu import abi
from emu.devices.rdma import RdmaDevice
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import do_mmap
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, make_host, run

PAGES = 16
IOVA = 0x40000


def machine(**kw: Any) -> tuple[RdmaDevice, Process, int]:
    host = make_host(ram=4 << 20, **kw)
    process = host.create_process("vmm")
    base = do_mmap(process.mm, 0, PAGES * PAGE, RW, ANON)
    return RdmaDevice(host, process), process, base


def drain(device: RdmaDevice) -> None:
    device.host.sched.run_until(lambda: not device.running)


def swap_out(process: Process, address: int, pages: int) -> None:
    do_madvise(process.mm, address, pages * PAGE, MADV_PAGEOUT)
    process.host.swap_device.drain()


def at_rest(device: RdmaDevice) -> None:
    host = device.host
    host.sched.run_task("rest", host.quiesce)
    audit(host)


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


# -- the queue ------------------------------------------------------------------------------------
SQ, CQ, DATA = IOVA, IOVA + PAGE, IOVA + 2 * PAGE


class Queue:
    """A driver of the queue pair: rings in pages 0 and 1 of the region, data from page 2 on."""

    def __init__(self, device: RdmaDevice, process: Process, base: int, key: int) -> None:
        self.device, self.process, self.base, self.key = device, process, base, key
        self.produced = 0
        self.register(abi.RDMA_SQ, SQ)
        self.register(abi.RDMA_CQ, CQ)
        self.register(abi.RDMA_RING_KEY, key)

    def register(self, offset: int, value: int) -> None:
        self.device.write(abi.RDMA_GPA + offset, 8, value)

    def load(self, offset: int) -> int:
        return self.device.read(abi.RDMA_GPA + offset, 4)

    def post(
        self, opcode: int, laddr: int, raddr: int, length: int, operand: int = 0, *,
        lkey: int = 0, rkey: int = 0,
    ) -> None:
        wqe = struct.pack(
            "<IIIIQQIIQ", opcode, self.produced + 1000, lkey or self.key, rkey or self.key, laddr, raddr,
            length, 0, operand,
        )
        at = self.base + self.produced % abi.RDMA_RING_ENTRIES * abi.RDMA_WQE_SIZE
        copy_to_user(self.process, at, wqe)
        self.produced += 1

    def ring(self) -> None:
        self.register(abi.RDMA_DOORBELL, self.produced)

    def completion(self, number: int) -> tuple[int, ...]:
        at = self.base + PAGE + number % abi.RDMA_RING_ENTRIES * abi.RDMA_CQE_SIZE
        return struct.unpack("<IIQ", copy_from_user(self.process, at, 16))


@pytest.fixture
def queue() -> Iterator[Queue]:
    device, process, base = machine()
    yield Queue(device, process, base, device.register(IOVA, base, PAGES * PAGE, pinned=False))
    at_rest(device)
    run(device.host, lambda: exit_process(process))
    device.close()
    audit(device.host)


def test_requests_are_done_in_order_each_with_its_completion(queue: Queue) -> None:
    copy_to_user(queue.process, queue.base + 2 * PAGE, b"A" * 5000)
    queue.post(abi.RDMA_WRITE, DATA, DATA + 4 * PAGE + 100, 5000)
    queue.post(abi.RDMA_READ, DATA + 8 * PAGE, DATA + 4 * PAGE + 100, 5000)
    queue.post(abi.RDMA_FETCH_ADD, DATA + 12 * PAGE, DATA + 8 * PAGE, 0, operand=1)
    queue.ring()
    drain(queue.device)
    assert [queue.completion(n) for n in range(3)] == [(1000 + n, abi.WC_SUCCESS, n + 1) for n in range(3)]
    assert queue.load(abi.RDMA_COMPLETED) == 3
    got = copy_from_user(queue.process, queue.base + 10 * PAGE, 5000)
    assert got == b"B" + b"A" * 4999
    assert copy_from_user(queue.process, queue.base + 14 * PAGE, 8) == b"A" * 8


def test_a_ring_goes_round_and_its_pages_may_be_on_disk(queue: Queue) -> None:
    for turn in range(3):
        for _ in range(40):
            queue.post(abi.RDMA_FETCH_ADD, DATA + PAGE, DATA, 8, operand=1)
        swap_out(queue.process, queue.base, 4)
        queue.ring()
        drain(queue.device)
        assert queue.completion(queue.produced - 1)[2] == 40 * (turn + 1)
    assert copy_from_user(queue.process, queue.base + 2 * PAGE, 8) == (120).to_bytes(8, "little")


@pytest.mark.parametrize(("bad", "status"), [
    ({"opcode": 9}, abi.WC_LOC_QP_OP_ERR),
    ({"length": abi.RDMA_MAX_BYTES + 1}, abi.WC_LOC_QP_OP_ERR),
    ({"lkey": 77}, abi.WC_LOC_PROT_ERR),
    ({"rkey": 77}, abi.WC_REM_ACCESS_ERR),
    ({"raddr": IOVA + PAGES * PAGE}, abi.WC_REM_ACCESS_ERR),
    ({"opcode": abi.RDMA_READ, "rkey": 77}, abi.WC_REM_ACCESS_ERR),
    ({"opcode": abi.RDMA_FETCH_ADD, "raddr": DATA + 1}, abi.WC_REM_ACCESS_ERR),
])
def test_a_request_that_fails_stops_the_queue_until_a_reset(
    queue: Queue, bad: dict[str, int], status: int
) -> None:
    good: dict[str, int] = {"opcode": abi.RDMA_WRITE, "laddr": DATA, "raddr": DATA + PAGE, "length": 8}
    queue.post(**good | bad)  # type: ignore[arg-type]
    queue.post(**good)  # type: ignore[arg-type]
    queue.ring()
    drain(queue.device)
    assert [queue.completion(n)[1] for n in range(2)] == [status, abi.WC_WR_FLUSH_ERR]
    assert queue.load(abi.RDMA_STATE) == abi.RDMA_ERROR
    queue.register(abi.RDMA_SQ, SQ)
    queue.produced = 0
    queue.post(**good)  # type: ignore[arg-type]
    queue.ring()
    drain(queue.device)
    assert queue.completion(0)[1] == abi.WC_SUCCESS


def test_rings_that_cannot_be_reached_stop_the_queue_without_a_completion(queue: Queue) -> None:
    queue.register(abi.RDMA_RING_KEY, 99)
    queue.post(abi.RDMA_WRITE, DATA, DATA + PAGE, 8)
    queue.ring()
    drain(queue.device)
    assert queue.load(abi.RDMA_STATE) == abi.RDMA_ERROR
    assert queue.completion(0) == (0, 0, 0)


def test_the_registers_read_as_the_abi_says(queue: Queue) -> None:
    assert queue.load(0x20) == 0xFFFF_FFFF
    assert queue.load(abi.RDMA_STATE) == abi.RDMA_READY
    queue.register(abi.RDMA_STATE, 5)
    assert queue.load(abi.RDMA_STATE) == abi.RDMA_READY
    fresh = RdmaDevice(queue.device.host, queue.process)
    fresh.write(abi.RDMA_GPA + abi.RDMA_DOORBELL, 4, 1)
    assert fresh.read(abi.RDMA_GPA + abi.RDMA_STATE, 4) == abi.RDMA_RESET
    assert not fresh.running


# -- races ----------------------------------------------------------------------------------------
def storm(seed: int, *breaks: str) -> RdmaDevice:
    """A device, a process and a kernel at work on the same pages; every byte is known to an oracle."""
    device, process, base = machine(breaks=frozenset(breaks))
    host = device.host
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    left = [2]
    oracle = {"cpu": bytearray(PAGES * PAGE), "device": bytearray(PAGES * PAGE)}

    # Both write everywhere, each every other 8 bytes, so that they share pages and never bytes.
    def user(
        name: str, phase: int, read: Callable[[int], bytes], write: Callable[[int, bytes], object]
    ) -> None:
        rng = random.Random(seed * 3 + phase)
        mine = oracle[name]
        for _ in range(60):
            at = rng.randrange(PAGES * PAGE // 16) * 16 + phase * 8
            if rng.random() < 0.5:
                assert read(at) == mine[at : at + 8], f"{name} at {at:#x}"
            else:
                data = rng.randbytes(8)
                write(at, data)
                mine[at : at + 8] = data
            host.sched.point("user")
        left[0] -= 1

    def kernel() -> None:
        rng = random.Random(seed)
        children: list[Process] = []
        while left[0]:
            first = rng.randrange(PAGES)
            count = rng.randrange(1, PAGES + 1 - first)
            what = rng.randrange(4)
            if what == 0:
                do_madvise(process.mm, base + first * PAGE, count * PAGE, MADV_PAGEOUT)
            elif what == 1:
                pages = [base + (first + n) * PAGE for n in range(count)]
                move_pages(process, pages, [rng.randrange(2)] * count)
            elif what == 2 and not children:
                children.append(fork_process(process))
            elif children:
                exit_process(children.pop())
            host.sched.sleep(rng.randrange(1, 4000))
        for child in children:
            exit_process(child)

    def cpu_read(at: int) -> bytes:
        return copy_from_user(process, base + at, 8)

    def cpu_write(at: int, data: bytes) -> None:
        copy_to_user(process, base + at, data)

    run(
        host, kernel,
        lambda: user("cpu", 0, cpu_read, cpu_write),
        lambda: user(
            "device", 1, lambda at: device.dma_read(key, IOVA + at, 8),
            lambda at, data: device.dma_write(key, IOVA + at, data),
        ),
    )
    host.sched.set_strategy(None)
    return device


@pytest.mark.parametrize("seed", range(12))
def test_no_byte_is_lost_in_any_order(seed: int) -> None:
    device = storm(seed)
    at_rest(device)
    device.close()
    at_rest(device)


def test_publishing_without_asking_breaks_a_truth() -> None:
    def until_broken() -> None:
        for seed in range(40):
            storm(seed, "no-interval-retry")

    with pytest.raises(BrokenTruth, match="interval-publish"):
        until_broken()

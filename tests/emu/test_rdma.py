"""Guest RAM exported to an RDMA engine: device, guest and host see one memory, and the host may swap it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from emu import abi
from emu.devices.rdma import RdmaDevice
from host_mm.fork import exit_process
from host_mm.kernel.errors import BrokenTruth
from host_mm.process import Process
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.emu.rdma_machine import IOVA, PAGES, at_rest, drain, machine, swap_out
from tests.host_mm.machine import PAGE, run
from tests.host_mm.storm import storm

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
def together(seed: int, *breaks: str, profile: MmProfile = LINUX_6_18) -> RdmaDevice:
    """A device, a process and a kernel at work on the same pages."""
    device, process, base = machine(breaks=frozenset(breaks), profile=profile)
    key = device.register(IOVA, base, PAGES * PAGE, pinned=False)
    storm(
        process, base, PAGES, seed, lambda at: device.dma_read(key, IOVA + at, 8),
        lambda at, data: device.dma_write(key, IOVA + at, data),
    )
    return device


@pytest.mark.parametrize("profile", [LINUX_6_18, LINUX_5_10], ids=lambda profile: profile.name)
@pytest.mark.parametrize("seed", range(12))
def test_no_byte_is_lost_in_any_order(seed: int, profile: MmProfile) -> None:
    device = together(seed, profile=profile)
    at_rest(device)
    device.close()
    at_rest(device)


def test_publishing_without_asking_breaks_a_truth() -> None:
    def until_broken() -> None:
        for seed in range(40):
            together(seed, "no-interval-retry")

    with pytest.raises(BrokenTruth, match="interval-publish"):
        until_broken()

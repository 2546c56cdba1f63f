"""A small host with one process, and an RDMA engine beside it."""

from __future__ import annotations

from typing import Any

from emu.devices.rdma import RdmaDevice
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mmap import do_mmap
from host_mm.process import Process
from host_mm.truths import audit
from tests.host_mm.machine import ANON, PAGE, RW, make_host

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

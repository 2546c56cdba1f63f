"""Processes with mergeable memory, and what must be left when they and ksmd are done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn, pte_present
from host_mm.fork import exit_process
from host_mm.host import HostMm
from host_mm.ksm import run_store
from host_mm.ksm_types import KSM_RUN_MERGE, KSM_RUN_STOP, folio_stable_node
from host_mm.madvise import MADV_MERGEABLE, do_madvise
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, do_mmap
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, RW

BASE = 0x10000000


ANON = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED


def fill(process: Process, page: int, byte: int, address: int = BASE) -> None:
    copy_to_user(process, address + page * PAGE, bytes([byte]) * PAGE)


def holds(process: Process, page: int, byte: int) -> bool:
    return copy_from_user(process, BASE + page * PAGE, PAGE) == bytes([byte]) * PAGE


def entry(process: Process, page: int = 0) -> int:
    return lookup_address_in_mm(process.mm, BASE + page * PAGE)[0]


def frame(process: Process, page: int = 0) -> int:
    value = entry(process, page)
    return pte_pfn(value) if pte_present(value) else -1


def mergeable(host: HostMm, contents: str | bytes, name: str = "p") -> Process:
    """A process whose pages are filled with these bytes, on ksmd's round."""
    process = host.create_process(name)
    data = contents.encode() if isinstance(contents, str) else contents
    do_mmap(process.mm, BASE, len(data) * PAGE, RW, ANON)
    for page, byte in enumerate(data):
        fill(process, page, byte)
    do_madvise(process.mm, BASE, len(data) * PAGE, MADV_MERGEABLE)
    return process


def on(host: HostMm, body: Callable[[], Any]) -> Any:
    return host.sched.run_task("test", body)


def leave_nothing(host: HostMm, *processes: Process) -> None:
    """End the processes, let ksmd forget them, and look for every frame and slot."""

    def body() -> None:
        audit(host)
        for process in processes:
            exit_process(process)
        run_store(host, KSM_RUN_MERGE)
        while host.ksm.mm_slots:
            host.sched.sleep(1_000_000)
        run_store(host, KSM_RUN_STOP)
        for node in host.ksm.stable_tree:
            # Stale by now: the last page went with the last process. The next search would drop them.
            assert all(folio_stable_node(host, dup.kpfn) is not dup for dup in getattr(node, "dups", [node]))
        host.quiesce()
        host.lru.lru_add_drain_all()
        for nid in range(len(host.nodes)):
            while host.reclaim(0, nid):
                pass
        host.quiesce()
        audit(host)

    on(host, body)
    assert host.ksm.ksm_rmap_items == host.ksm.ksm_zero_pages == 0
    assert not host.mms
    assert host.allocator.nr_free_pages() == sum(zone.managed for zone in host.zones)
    assert host.swap is not None
    assert host.swap.inuse_pages == 0

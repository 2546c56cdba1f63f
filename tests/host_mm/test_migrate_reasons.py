"""Whoever asks for a migration, it goes by the same steps (host_mm/migrate.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm.compaction import compact_nodes
from host_mm.contig import alloc_contig_range
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page
from host_mm.host import HostMm
from host_mm.memory_failure import soft_offline_page
from host_mm.memory_hotplug import offline_pages
from host_mm.mempolicy import MPOL_BIND, MPOL_MF_MOVE, do_mbind, do_migrate_pages
from host_mm.migrate import move_pages
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.process import Process
from host_mm.uaccess import copy_to_user
from tests.host_mm.machine import run
from tests.host_mm.test_migrate import BASE, PAGE, make, pfn_of
from tests.host_mm.test_order_classes import Recorder
from trace_events.stream import Listener

STEPS = ["start", "clear", "swap-entry", "end", "flush", "set"]


def lone_page(**kw: Any) -> tuple[HostMm, Process]:
    """A process with one page, which is alone in its page block of node 1."""
    host, process = make(1, ram=4096, **kw)
    run(host, lambda: copy_to_user(process, BASE, b"x"))
    run(host, lambda: move_pages(process, [BASE], [1]))
    host.lru.lru_add_drain_all()
    return host, process


def block(process: Process) -> int:
    return pfn_of(process) & -512


REASONS: dict[str, tuple[Callable[[HostMm, Process], Any], bool]] = {
    "syscall_or_cpuset": (lambda host, p: move_pages(p, [BASE], [0]), True),
    "mempolicy_mbind": (lambda host, p: do_mbind(p, BASE, PAGE, MPOL_BIND, 0, MPOL_MF_MOVE), True),
    "memory_hotplug": (lambda host, p: offline_pages(host, block(p), 512), True),
    "contig_range": (lambda host, p: alloc_contig_range(host, pfn_of(p), pfn_of(p) + 1), True),
    "memory_failure": (lambda host, p: soft_offline_page(host, pfn_of(p)), False),
}


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_the_steps_of_a_migration_for_each_reason(reason: str) -> None:
    host, process = lone_page()
    operation, frees = REASONS[reason]
    recorder = Recorder(host, process.mm)
    mmu_notifier_register(recorder, process.mm)
    reasons = reasons_of(host)
    old = pfn_of(process)
    host.sched.run_task("operation", lambda: operation(host, process))
    assert recorder.log == STEPS + ["free"] * frees
    assert recorder.ranges == [(mn.MMU_NOTIFY_CLEAR, BASE, BASE + PAGE, mn.ORDER_BATCHED)]
    assert reasons == [reason]
    assert pfn_of(process) not in (old, -1)


def reasons_of(host: HostMm) -> list[str]:
    points = {tp.full_name: tp for tp in host.stream.tracepoints()}
    reasons: list[str] = []

    def note(event: Any) -> None:
        reasons.append(points[event.event].format(tuple(event.args.values())).split("reason=")[1])

    host.stream.listen(Listener(["migrate:mm_migrate_pages"], note, ancestors=False))
    return reasons


def test_a_long_pin_migrates_by_the_same_steps_before_it_pins_again() -> None:
    host, process = lone_page(params={"mm.movablecore": "8M"})
    assert host.allocator.zone_of(pfn_of(process)).name == "Movable"
    recorder = Recorder(host, process.mm)
    mmu_notifier_register(recorder, process.mm)
    reasons = reasons_of(host)
    run(host, lambda: pin_user_page(process.mm, BASE, FOLL_WRITE | FOLL_LONGTERM))
    assert recorder.log == [*STEPS, "free"]
    assert reasons == ["longterm_pin"]
    assert host.allocator.zone_of(pfn_of(process)).name == "Normal"


def test_migrate_pages_moves_by_the_same_steps() -> None:
    host, process = lone_page()
    recorder = Recorder(host, process.mm)
    mmu_notifier_register(recorder, process.mm)
    assert host.sched.run_task("migrate", lambda: do_migrate_pages(process, 1, 0)) == 0
    assert recorder.log == [*STEPS, "free"]


def test_compaction_of_a_lone_page_has_nowhere_to_go_and_tells_nobody() -> None:
    host, process = lone_page()
    recorder = Recorder(host, process.mm)
    mmu_notifier_register(recorder, process.mm)
    host.sched.run_task("compact", lambda: compact_nodes(host))
    assert recorder.log == []

"""A trace made by hand, in which every link is known, and the command run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trace_events.event import Event
from trace_events.ndjson import Trace, write_trace

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"memory": 1 << 20, "seed": 1}
GFN = 0x200


def synthetic_events() -> list[Event]:
    """A page is mapped, swapped out by a host operation, and faulted back in; another one is not."""
    vcpu = "CPU 0/KVM"
    fault = {"vcpu_id": 0, "guest_rip": 0x100000, "fault_address": GFN << 12 | 8, "error_code": 0x182}
    bracket = {
        "pid": 1,
        "event": "clear",
        "start": 0x7F0000000000,
        "end": 0x7F0000001000,
        "order": 2,
        "blockable": True,
    }
    return [
        Event(
            0, 1_000, "kvm:kvm_exit", vcpu, 0, args={"vcpu_id": 0, "exit_reason": 48, "guest_rip": 0x100000}
        ),
        Event(1, 1_100, "kvm:kvm_page_fault", vcpu, 0, args=fault),
        Event(2, 2_000, "kvm:kvm_entry", vcpu, 0, args={"vcpu_id": 0, "guest_rip": 0x100000}),
        Event(3, 5_000, "refault:host_op", "vmm", args={"op": "swap_out", "args": "0x200000, 2"}),
        Event(4, 5_100, "refault:mmu_notifier_start", "vmm", cause=3, args=bracket),
        Event(
            5,
            5_200,
            "refault:spte_zap",
            "vmm",
            cause=4,
            args={"gfn": GFN, "level": 1, "old_spte": 0x77, "why": "mmu-notifier"},
        ),
        Event(
            6,
            5_300,
            "refault:spte_zap",
            "vmm",
            cause=4,
            args={"gfn": GFN + 1, "level": 1, "old_spte": 0x77, "why": "mmu-notifier"},
        ),
        Event(
            7, 9_000, "kvm:kvm_exit", vcpu, 0, args={"vcpu_id": 0, "exit_reason": 48, "guest_rip": 0x100008}
        ),
        Event(8, 9_100, "kvm:kvm_page_fault", vcpu, 0, killed_by=5, args=fault),
        Event(9, 89_000, "kvm:kvm_entry", vcpu, 0, args={"vcpu_id": 0, "guest_rip": 0x100008}),
        Event(
            10, 90_000, "kvm:kvm_exit", vcpu, 0, args={"vcpu_id": 0, "exit_reason": 12, "guest_rip": 0x100010}
        ),
        Event(11, 90_500, "kvm:kvm_entry", vcpu, 0, args={"vcpu_id": 0, "guest_rip": 0x100010}),
    ]


@pytest.fixture
def events() -> list[Event]:
    return synthetic_events()


@pytest.fixture
def trace_file(tmp_path: Path, events: list[Event]) -> Path:
    path = tmp_path / "t.ndjson"
    write_trace(path, Trace({"machine": MACHINE, "events": ["*"]}, events))
    return path


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def refault(tmp_path: Path) -> Command:
    """Run `refault ARGS` in an empty directory."""

    def run(*args: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "100"}
        env.pop("REFAULT_TRACEBACK", None)
        return subprocess.run(
            [sys.executable, "-m", "refault", *map(str, args)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run

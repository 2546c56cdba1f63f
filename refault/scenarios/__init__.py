"""Scenarios: claims about Linux as small programs that run on the emulator and on a real KVM.

| file | subject |
|---|---|
| `api.py`, `api_kvm.py` | what a scenario can do: guest accesses, host operations, KVM's ioctls |
| `layout.py`, `backend.py` | where things are in its machine; what a back end must do |
| `emulator.py` | the back end that runs it here |
| `emulator_reclaim.py`, `emulator_hugetlb.py` | its steps for reclaim and for huge pages |
| `emulator_migrate.py` | its steps for migration and compaction |
| `emulator_files.py` | its steps for files and shared memory |
| `emulator_dirty.py` | its steps for dirty tracking |
| `emulator_guest.py`, `emulator_slots.py` | its steps for the guest, and for memory slots |
| `emulator_gmem.py` | its steps for guest_memfd |
| `recordings.py` | what the real kernel did |
| `normal.py` | the form in which the two are compared |
| `comparison.py`, `explained.py` | whether they are equal; why they may differ, as typed records |
| `invariants.py` | what holds where chance is in a scenario |
| `guest.py` | the guest, the same for both |
| `live/` | the back end that runs it on this machine's `/dev/kvm` |
| `linux_mm.py` | the scenarios of host memory management |
| `linux_mm_migrate.py` | those of migration and compaction |
| `linux_mm_files.py` | those of files and shared memory |
| `linux_mm_hugetlb.py` | those of huge pages |
| `linux_mm_reclaim.py` | those of reclaim and access tracking |
| `linux_mm_thp.py` | those of transparent huge pages |
| `linux_mm_uffd.py` | those of userfaultfd; `emulator_uffd.py` has their steps |
| `linux_kvm_dirty.py` | those of dirty tracking in KVM |
| `linux_kvm_guest.py`, `linux_kvm_prefetch.py` | those of guest instructions and tables; of neighbours |
| `linux_kvm_slots.py` | those of memory slots |
| `recorded/linux-6.18/` | the real kernel's traces |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refault.scenarios.api import Scenario

__all__ = ["MACHINES", "OPTIONS", "REPEATS", "SCENARIOS", "scenario"]

SCENARIOS: dict[str, Callable[[Scenario], None]] = {}
MACHINES: dict[str, dict[str, Any]] = {}
"""What a scenario's machine has that the usual one has not, of OPTIONS."""
OPTIONS = {
    "swap": "size of the swap file, None for no swap (64M)",
    "vcpus": "how many (1); Scenario.use_vcpu says whose turn it is",
    "guest_pages": "with what the guest maps D: 4K or 2M (4K)",
    "slot_flags": "of D's slot from the start: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY (0)",
    "file": "what D is: memfd, shared or private, the latter two a file on disk (anonymous memory)",
    "file_bytes": "how much of the file is 0x11 and not a hole (0)",
    "hugetlb": "D is of huge pages: shared or private (no)",
    "thp": "D may be of transparent huge pages; otherwise it is MADV_NOHUGEPAGE (False)",
    "dirty_ring": "entries of each vCPU's dirty ring (0)",
    "params": "module parameters, as --param; swap.device, hugetlb.nr_hugepages and thp.* on both machines",
    "mmu": "of the emulator: shadow or ept (shadow)",
    "profile": "of the emulator: whose behaviour (linux-6.18)",
    "seed": "of the emulator: all chance comes from it (1)",
    "host_ram": "of the emulator: host memory (64M)",
}


REPEATS: dict[str, str] = {}
"""How much of a scenario a real machine repeats, where not everything: see comparison.py."""


def scenario(
    *, repeats: str = "exactly", **machine: Any
) -> Callable[[Callable[[Scenario], None]], Callable[[Scenario], None]]:
    """Register a scenario under its function's name; its docstring is its claim.

    `machine` has OPTIONS; TypeError for another. `repeats`: see comparison.compare.
    """
    for name in machine:
        if name not in OPTIONS:
            raise TypeError(f"a scenario's machine has no option {name!r}; there are {', '.join(OPTIONS)}")

    def register(fn: Callable[[Scenario], None]) -> Callable[[Scenario], None]:
        SCENARIOS[fn.__name__] = fn
        MACHINES[fn.__name__] = machine
        REPEATS[fn.__name__] = repeats
        return fn

    return register

"""The canonical configuration of a machine: everything that decides what it does.

Two machines with equal configurations write the same bytes of trace. Neither argv, nor output
paths, nor how the walk is executed (compiled or interpreted) belongs here.
"""

from __future__ import annotations

import msgspec

__all__ = ["MachineConfig"]


class MachineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One VM on one host. Sizes are bytes; `swap` None means no swap.

    `memory_backend` is what the guest's RAM is to the host: "anon", "memfd", "hugetlb" or "file:PATH".

    `params` are module parameters by the kernel's names; `breaks` protocol steps left out;
    `checks` whether the truths are checked (a broken one ends the run).
    """

    memory: int = 64 << 20
    memory_backend: str = "anon"
    host_ram: int = 256 << 20
    swap: int | None = 256 << 20
    vcpus: int = 1
    mmu: str = "ept"
    profile: str = "linux-6.18"
    params: dict[str, str] = {}
    seed: int = 0
    breaks: tuple[str, ...] = ()
    checks: bool = False

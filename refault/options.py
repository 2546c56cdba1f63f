"""What `refault run` was asked to do, typed and checked; `refault.runner.run` takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from refault.kvmstat import KvmStat

__all__ = ["RunOptions"]


class RunOptions(msgspec.Struct, kw_only=True):
    """One run. Sizes are bytes, `timeout` is seconds of real time.

    `words` are the payload's own parameters, `NAME=VALUE`, for its command line. `swap` None means
    no swap. `vcpus` is how many the machine has; the guest starts the others. Into `kvm_stat` go KVM's
    statistics at the end; the guest's serial port then is stderr.
    """

    payload: str
    words: tuple[str, ...] = ()
    memory: int
    memory_backend: str = "anon"
    host_ram: int
    swap: int | None
    vcpus: int = 1
    mmu: str = "ept"
    profile: str = "linux-6.18"
    params: dict[str, str] = msgspec.field(default_factory=dict)
    seed: int = 1
    events: tuple[str, ...] = ("*",)
    trace: str | None = None
    host_script: str | None = None
    check: bool = False
    breaks: frozenset[str] = frozenset()
    json: bool = False
    quiet: bool = False
    max_insns: int | None = None
    timeout: float = 600.0
    interpreted: bool = False
    kvm_stat: list[KvmStat] | None = None

"""From a trace's header (see header.py) to a machine again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from emu.config import MachineConfig
from refault.errors import UsageError
from refault.header import read_payload
from refault.host_script import start_host_script
from refault.vm import VM

if TYPE_CHECKING:
    from trace_events.event import Event
    from trace_events.stream import Listener

__all__ = ["replay"]


class _Payload(msgspec.Struct):
    name: str
    sha256: str
    words: tuple[str, ...] = ()


class _Rest(msgspec.Struct):
    """What a header's machine holds beside its MachineConfig."""

    payload: _Payload
    host_script: str | None = None
    max_insns: Annotated[int, msgspec.Meta(ge=0)] | None = None


def _read(header: dict[str, Any]) -> tuple[MachineConfig, _Rest]:
    machine = header["machine"]
    try:
        return msgspec.convert(machine, MachineConfig), msgspec.convert(machine, _Rest)
    except msgspec.ValidationError as exc:
        raise UsageError(f"the trace's machine configuration is not one of ours: {exc}") from None


def vm_from_header(header: dict[str, Any]) -> VM:
    """An unstarted VM as the header describes it, its payload not yet loaded."""
    config, rest = _read(header)
    vm = VM(
        config.memory, memory_backend=config.memory_backend, host_ram=config.host_ram, swap=config.swap,
        vcpus=config.vcpus, mmu=config.mmu, profile=config.profile, params=config.params, seed=config.seed,
        breaks=frozenset(config.breaks),
        check=config.checks,
    )
    extra = {"host_script": rest.host_script, "max_insns": rest.max_insns}
    vm.extra = {name: value for name, value in extra.items() if value is not None}
    return vm


def replay(header: dict[str, Any], until_event: int | None = None, listener: Listener | None = None) -> VM:
    """Run the machine of `header` again, to its end or until event `until_event` has fired.

    At an event the machine is frozen between two instructions of the model: for looking only.
    """
    from trace_events.stream import Listener

    if not header["machine"].get("payload"):
        raise UsageError("the trace names no payload that could be loaded again")
    payload = _read(header)[1].payload
    name = payload.name
    if not name or name == "bytes":
        raise UsageError("the trace names no payload that could be loaded again")
    data = read_payload(name)
    if hashlib.sha256(data).hexdigest() != payload.sha256:
        raise UsageError(f"{name}: not the payload of this trace any more (its hash differs)")
    vm = vm_from_header(header)
    sched, stream = vm.board.host.sched, vm.board.host.stream
    reached: list[int] = []

    def watch(event: Event) -> None:
        if event.seq == until_event and not reached:
            reached.append(event.seq)
            sched.freeze()

    if listener is not None:
        stream.listen(listener)
    if until_event is not None:
        stream.listen(Listener(("*",), watch, ancestors=False))
    vm.load(name, *payload.words)
    if vm.extra.get("host_script") is not None:
        start_host_script(vm, vm.extra["host_script"])
    if not reached:
        vm.run(until=lambda: bool(reached), max_insns=vm.extra.get("max_insns"))
    return vm

"""From a trace's header (see header.py) to a machine again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

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


def vm_from_header(header: dict[str, Any]) -> VM:
    """An unstarted VM as the header describes it, its payload not yet loaded."""
    machine = dict(header["machine"])
    try:
        config = msgspec.convert(
            {k: v for k, v in machine.items() if k in MachineConfig.__struct_fields__}, MachineConfig
        )
    except msgspec.ValidationError as exc:
        raise UsageError(f"the trace's machine configuration is not one of ours: {exc}") from None
    vm = VM(
        config.memory, host_ram=config.host_ram, swap=config.swap, vcpus=config.vcpus, mmu=config.mmu,
        profile=config.profile, params=config.params, seed=config.seed, breaks=frozenset(config.breaks),
        check=config.checks,
    )
    vm.extra = {k: machine[k] for k in ("host_script", "max_insns") if machine.get(k) is not None}
    return vm


def replay(header: dict[str, Any], until_event: int | None = None, listener: Listener | None = None) -> VM:
    """Run the machine of `header` again, to its end or until event `until_event` has fired.

    At an event the machine is frozen between two instructions of the model: for looking only.
    """
    from trace_events.stream import Listener

    payload = header["machine"].get("payload", {})
    name = payload.get("name", "")
    if not name or name == "bytes":
        raise UsageError("the trace names no payload that could be loaded again")
    data = read_payload(name)
    if hashlib.sha256(data).hexdigest() != payload.get("sha256"):
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
    vm.load(name, *payload.get("words", ()))
    if vm.extra.get("host_script") is not None:
        start_host_script(vm, vm.extra["host_script"])
    if not reached:
        vm.run(until=lambda: bool(reached), max_insns=vm.extra.get("max_insns"))
    return vm

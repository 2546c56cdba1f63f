"""What a trace's header says of a machine, and where a payload's bytes come from.

The header's `machine` object is the MachineConfig plus the payload (name, hash, words), the host
script's text and the instruction limit: everything that decides the trace's bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from refault.errors import UsageError
from trace_events.ndjson import FORMAT

if TYPE_CHECKING:
    from refault.vm import VM

__all__ = ["check_words", "make_header", "read_payload"]


def read_payload(name: str) -> bytes:
    """The image of a payload by name, a file, or assembler source; an error of one line otherwise."""
    from guest_payloads.builder import build, payload_names

    if not name:
        raise UsageError("the payload's name is empty; see refault list payloads")
    path = Path(name)
    if path.is_char_device() or path.is_block_device():
        raise UsageError(f"{name}: a device, not a file")
    if name in payload_names() or path.suffix == ".s":
        return build(name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        from difflib import get_close_matches

        near = get_close_matches(name, payload_names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else "see refault list payloads"
        raise UsageError(f"no payload and no file {name!r}; {hint}") from None
    except OSError as exc:
        raise UsageError(f"{name}: cannot be read: {exc.strerror}") from None
    if not data:
        raise UsageError(f"{name}: the file is empty")
    if data.startswith(b'{"format":"%s"' % FORMAT.encode()):
        raise UsageError(f"{name}: a trace file, not a guest image")
    return data


def check_words(name: str, words: tuple[str, ...]) -> None:
    """UsageError for a word that a payload of ours does not know; other images take any."""
    from guest_payloads.builder import payload_info, payload_names

    if not words or (name not in payload_names() and Path(name).suffix != ".s"):
        return
    known = [param.name for param in payload_info(name).params]
    for word in words:
        if word.partition("=")[0] not in known:
            raise UsageError(f"{name} knows no {word!r}; it takes {', '.join(known) or 'no parameters'}")


def make_header(vm: VM, globs: tuple[str, ...]) -> dict[str, Any]:
    """The header of traces of `vm`."""
    from trace_events.ndjson import FORMAT, VERSION

    machine = msgspec.to_builtins(vm.config)
    if vm.config.memory_backend == "anon":
        del machine["memory_backend"]
    machine["payload"] = vm.payload
    machine.update(vm.extra)
    return {"format": FORMAT, "version": VERSION, "machine": machine, "events": list(globs)}

"""refault: an x86-64 computer whose memory system you can see and break.

    import refault
    vm = refault.VM(memory="64M", seed=1)
    vm.load("swap-storm")
    with vm.trace("kvm:*", "refault:*") as tr:
        vm.run(until=refault.HALT)
    tr.refaults()

Map of this room, the front door. It holds no model logic.

| file | subject |
|---|---|
| `vm.py`, `host.py`, `host_machine.py` | `VM` and `Host`: the machine as a Python object |
| `header.py`, `machine.py` | what a trace's header says of a machine, and the machine made from it again |
| `params.py`, `numbers.py` | what `--param` takes; numbers and sizes as people type them |
| `host_script.py`, `user_code.py` | `--host SCRIPT.py`; how the users' own Python is run |
| `options.py`, `runner.py` | `refault run`: what was asked, and doing it |
| `observer.py`, `summary.py` | what a run notes, and the table it ends with |
| `scenarios/` | claims about Linux as small programs, and what the real kernel did |
| `analysis.py`, `story.py` | what a trace says: refaults, cause chains, the story of one page |
| `refaults.py` | all that it says of each refault: killer, SPTEs, GUP, retries |
| `exitstat.py`, `kvmstat.py` | the table of `perf kvm stat report`; KVM's own statistics |
| `compare.py` | differences: the first place where two traces part |
| `registry.py` | which tracepoints, payloads and modules exist, found without importing them |
| `switch_runs.py` | for each protocol switch a run that shows what it breaks |
| `cli.py`, `commands/` | the `refault` command, one file a verb |
| `errors.py`, `output.py` | exit codes and the errors that carry one; how the commands print |

Names are imported when they are first used, so that `import refault` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from host_mm.kernel.errors import BrokenTruth as BrokenTruth
    from host_mm.kernel.errors import KernelError as KernelError
    from host_mm.kernel.errors import OutOfMemory as OutOfMemory
    from refault.analysis import Analysis as Analysis
    from refault.errors import UsageError as UsageError
    from refault.host import Host as Host
    from refault.vm import HALT as HALT
    from refault.vm import VM as VM
    from trace_events.event import Event as Event
    from trace_events.ndjson import Trace as Trace
    from trace_events.ndjson import TraceError as TraceError
    from trace_events.ndjson import read_trace as read_trace

__all__ = [
    "HALT", "VM", "Analysis", "BrokenTruth", "Event", "Host", "KernelError", "OutOfMemory", "Trace",
    "TraceError", "UsageError", "__version__", "read_trace",
]

__version__ = "0.1.0"

_WHERE = {
    "Analysis": "refault.analysis",
    "BrokenTruth": "host_mm.kernel.errors",
    "Event": "trace_events.event",
    "HALT": "refault.vm",
    "Host": "refault.host",
    "KernelError": "host_mm.kernel.errors",
    "OutOfMemory": "host_mm.kernel.errors",
    "Trace": "trace_events.ndjson",
    "TraceError": "trace_events.ndjson",
    "UsageError": "refault.errors",
    "VM": "refault.vm",
    "read_trace": "trace_events.ndjson",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'refault' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

"""What it costs to start, and how much memory a guest takes. Each in a process of its own.

Seconds are processor time, as everywhere here.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile

from bench.report import Group, Measure

__all__ = ["GROUP"]

_VERSION = "import refault"
_BIG = """
import refault
vm = refault.VM(memory="16G", host_ram="20G")
vm.load("first-touch")
stop = vm.run()
assert (stop.kind, stop.status) == ("exit", 0), (stop, vm.serial)
# Not ru_maxrss: that begins with what the process that forked it had.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
_TOUCH = """
import json, resource
from bench.lab import Lab
def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
lab = Lab()
lab.write_pages(256, 0x200000)
before = rss()
lab.write_pages({pages})
print(json.dumps((rss() - before) / {pages} - 4096))
"""
TOUCHED = 12288


def _run(*arguments: str, rounds: int = 3) -> tuple[float, str]:
    """Least processor time in seconds, and what the last run printed. One more run goes before, so that
    byte code and native code are in their caches."""
    least, text = float("inf"), ""
    with tempfile.TemporaryDirectory() as bytecode:
        env = dict(os.environ, PYTHONPYCACHEPREFIX=bytecode)
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(rounds + 1):
            began = _children()
            text = subprocess.run(
                [sys.executable, *arguments], check=True, capture_output=True, text=True, env=env
            ).stdout
            least = min(least, _children() - began)
    return least, text


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure() -> dict[str, float]:
    """Seconds, MB and bytes."""
    listed, _ = _run("-m", "refault", "list", rounds=5)
    imported, _ = _run("-c", _VERSION, rounds=5)
    big, rss = _run("-c", _BIG)
    _, touched = _run("-c", _TOUCH.format(pages=TOUCHED), rounds=1)
    return {
        "refault_list": listed, "import_refault": imported, "start_16g": big,
        "start_16g_rss": json.loads(rss) / 1000, "touched_frame": json.loads(touched),
    }


GROUP = Group(
    "startup",
    (
        Measure("refault_list", "s", "`refault list`, the process and all"),
        Measure("import_refault", "s", "`python -c 'import refault'`"),
        Measure("start_16g", "s", "a guest of 16 GiB from nothing to its end (first-touch)"),
        Measure("start_16g_rss", "MB", "the memory of that process"),
        Measure("touched_frame", "bytes", "bookkeeping for each frame the guest touched, beside its bytes"),
    ),
    measure,
)

"""What a scenario needs of the whole machine, for as long as it needs it: swap, ksmd, settings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from refault import numbers
from refault.errors import UsageError

__all__ = ["SETTINGS", "ending_in_order", "here", "ksm", "on_disk", "setting", "swap_file", "zram"]

KSM = Path("/sys/kernel/mm/ksm")
ZRAM = Path("/sys/block/zram0")
SETTINGS = {
    "hugetlb.nr_hugepages": Path("/proc/sys/vm/nr_hugepages"),
    "thp.shmem_enabled": Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    "thp.enabled": Path("/sys/kernel/mm/transparent_hugepage/enabled"),
}
"""Parameters of the emulator's machine that are settings of a real one."""
BDI = Path("/sys/class/bdi")


@contextmanager
def ending_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as SIGINT does, so that what was changed is put back; main thread only."""
    owner = os.getpid()

    def interrupt(number: int, frame: object) -> None:
        if os.getpid() != owner:
            # A child must not put back what is its parent's.
            os._exit(128 + number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def setting(path: Path, value: str) -> Iterator[None]:
    """A file of sysfs has another value meanwhile; of several words the one in brackets is the value."""
    text = path.read_text().strip()
    chosen = re.search(r"\[(\S+)\]", text)
    before = chosen[1] if chosen else text
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def swap_file(size: str) -> Iterator[None]:
    """A swap file of `size`, made, turned on and off and removed."""
    with tempfile.NamedTemporaryFile(prefix="refault-swap-", dir=on_disk()) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(bytes(numbers.size(size)))
        file.flush()
        os.fsync(file.fileno())
        subprocess.run(["mkswap", file.name], check=True, capture_output=True)
        subprocess.run(["swapon", file.name], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", file.name], check=True, capture_output=True)


@contextmanager
def zram(size: str) -> Iterator[None]:
    """/dev/zram0, which nobody else may use, as swap of `size`."""
    if not ZRAM.is_dir() or (ZRAM / "disksize").read_text().strip() != "0":
        raise UsageError("this machine has no zram0, or uses it")
    (ZRAM / "disksize").write_text(str(numbers.size(size)))
    try:
        subprocess.run(["mkswap", "/dev/zram0"], check=True, capture_output=True)
        subprocess.run(["swapon", "/dev/zram0"], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", "/dev/zram0"], check=True, capture_output=True)
    finally:
        (ZRAM / "reset").write_text("1")


def on_disk() -> str:
    """A folder that is not tmpfs: swap files cannot lie there, and its pages are never written back."""
    return str(Path.cwd())


def here() -> dict[str, str]:
    """Parameters with which the emulator's machine reads files as this one does."""
    disk = os.stat(on_disk()).st_dev
    path = BDI / f"{os.major(disk)}:{os.minor(disk)}" / "read_ahead_kb"
    return {"mm.read_ahead_kb": path.read_text().strip()} if path.exists() else {}


@contextmanager
def ksm(*, use_zero_pages: bool) -> Iterator[None]:
    """ksmd scans fast."""
    with ExitStack() as stack:
        stack.enter_context(setting(KSM / "use_zero_pages", str(int(use_zero_pages))))
        for name, value in (("pages_to_scan", "5000"), ("sleep_millisecs", "10"), ("run", "1")):
            stack.enter_context(setting(KSM / name, value))
        yield

"""What a scenario needs of the whole machine, for as long as it needs it: swap, ksmd."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from refault import numbers

__all__ = ["ksm", "setting", "swap_file"]

KSM = Path("/sys/kernel/mm/ksm")


@contextmanager
def setting(path: Path, value: str) -> Iterator[None]:
    """A file of sysfs has another value meanwhile."""
    before = path.read_text().strip()
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def swap_file(size: str) -> Iterator[None]:
    """A swap file of `size`, made, turned on and off and removed."""
    with tempfile.NamedTemporaryFile(prefix="refault-swap-", dir=_swappable()) as file:
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


def _swappable() -> str:
    """Swap files cannot lie on tmpfs."""
    return str(Path.cwd())


@contextmanager
def ksm(*, use_zero_pages: bool) -> Iterator[None]:
    """ksmd scans fast."""
    with ExitStack() as stack:
        stack.enter_context(setting(KSM / "use_zero_pages", str(int(use_zero_pages))))
        for name, value in (("pages_to_scan", "5000"), ("sleep_millisecs", "10"), ("run", "1")):
            stack.enter_context(setting(KSM / name, value))
        yield

"""Whether this machine can run scenarios on its KVM, and if not, why; the rule is in README.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from refault.scenarios.live.tracefs import TRACEFS

__all__ = ["why_not"]

TDP_MMU = Path("/sys/module/kvm/parameters/tdp_mmu")
NATIVE = """
from refault.scenarios.live.backend import runs_natively
raise SystemExit(not runs_natively())
"""
TIMEOUT = 20


def why_not() -> str | None:
    """One line that says what is missing, or None."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm cannot be read and written"
    try:
        tdp_mmu = TDP_MMU.read_text().strip()
    except OSError:
        return f"{TDP_MMU} cannot be read"
    if tdp_mmu != "N":
        return f"{TDP_MMU} reads {tdp_mmu}: with the TDP MMU the events are others"
    if not (TRACEFS / "events/kvmmmu").is_dir() or not os.access(TRACEFS / "instances", os.W_OK):
        return f"{TRACEFS} has no events/kvmmmu or takes no instances (mount -t tracefs nodev {TRACEFS})"
    # In a process of its own: a KVM that emulates may abort or never come back.
    try:
        child = subprocess.run(
            [sys.executable, "-c", NATIVE], check=False, capture_output=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"a guest store on /dev/kvm took more than {TIMEOUT} s"
    return "a guest store at CPL 3 does not run natively on /dev/kvm" if child.returncode else None

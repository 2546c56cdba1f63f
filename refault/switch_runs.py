"""For each protocol switch, a run that shows what leaving out that step breaks.

The runs stand in switch_runs.toml, one table a switch. A switch that no run can show would be a claim
without a witness; a test holds the two lists against each other and runs all.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

import msgspec

__all__ = ["MAX_INSNS", "SwitchRun", "switch_runs"]

MAX_INSNS = 3_000_000
"""Guest instructions within which every one of the runs breaks its truth."""


class SwitchRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The words and options of `refault run`, the truth that breaks, whether the guest sees it too."""

    truth: str
    run: str
    guest: bool = False

    def command(self, switch: str) -> str:
        """The whole command line."""
        return f"refault run {self.run} --max-insns {MAX_INSNS} --check --break {switch}"


@cache
def switch_runs() -> dict[str, SwitchRun]:
    """Switch -> its run."""
    text = files("refault").joinpath("switch_runs.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, SwitchRun])

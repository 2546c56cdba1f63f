"""This machine's KVM does in every scenario what was recorded. `make live`, as root."""

from __future__ import annotations

import os

import pytest

import refault.scenarios.linux_mm  # noqa: F401  (fills the registry)
from refault.errors import UsageError
from refault.scenarios import MACHINES, SCENARIOS
from refault.scenarios.normal import normal_recorded
from refault.scenarios.recordings import recording

LIVE = "REFAULT_LIVE" in os.environ
CHANCE = {"compact"}
"""What compaction moves depends on where the machine's frames lie."""


def why_not() -> str | None:
    if not LIVE:
        return "asked for by make live only"
    from refault.scenarios.live.probe import why_not

    return why_not()


REASON = why_not()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", SCENARIOS)
def test_this_machine_does_what_was_recorded(name: str) -> None:
    from refault.scenarios.live.backend import KvmBackend, run_on_kvm

    if name in CHANCE:
        pytest.skip("what it does depends on the machine's other memory")
    missing = needs(name) - set(dir(KvmBackend))
    if missing:
        pytest.skip(f"not on a real machine: {', '.join(sorted(missing))}")
    try:
        text = run_on_kvm(SCENARIOS[name], **MACHINES[name])
    except UsageError as exc:
        pytest.skip(str(exc))
    assert normal_recorded(text) == normal_recorded(recording(name))


def needs(name: str) -> set[str]:
    """The methods of a back end that the scenario calls."""
    from refault.scenarios.api import Scenario

    class Names:
        def __init__(self) -> None:
            self.seen: set[str] = set()

        def __getattr__(self, method: str) -> object:
            self.seen.add(method)
            return lambda *args, **kwargs: 0

    names = Names()
    SCENARIOS[name](Scenario(names))  # type: ignore[arg-type]
    return names.seen - {"mark"}

"""This machine's KVM does in every scenario what was recorded. `make live`, as root."""

from __future__ import annotations

import os

import pytest

import refault.scenarios.linux_mm  # noqa: F401  (fills the registry)
from refault.errors import UsageError
from refault.scenarios import MACHINES, REPEATS, SCENARIOS
from refault.scenarios.comparison import compare
from refault.scenarios.recordings import recording

LIVE = "REFAULT_LIVE" in os.environ
CHANCE = {
    "compact": "what it does depends on the machine's other memory",
    "memcg_reclaim": "how many pages a limit takes depends on what else the process has",
}


def why_not() -> str | None:
    if not LIVE:
        return "asked for by make live only"
    from refault.scenarios.live.probe import why_not

    return why_not()


REASON = why_not()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", SCENARIOS)
def test_this_machine_does_what_was_recorded(name: str) -> None:
    from refault.scenarios.live.backend import run_on_kvm

    if name in CHANCE:
        pytest.skip(CHANCE[name])
    try:
        seen = run_on_kvm(SCENARIOS[name], **MACHINES[name])
    except UsageError as exc:
        pytest.skip(str(exc))
    comparison = compare(name, seen, recording(name), repeats=REPEATS[name])
    assert comparison.broken == []
    assert comparison.unexplained == []

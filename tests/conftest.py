"""What all tests share: hypothesis profiles, and a guard against tests that depend on the terminal."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Derandomised: a red test is red for everybody. `make soak` looks for new ones.
settings.register_profile(
    "refault", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("soak", deadline=None, max_examples=100_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "refault"))


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("REFAULT_TRACEBACK", raising=False)

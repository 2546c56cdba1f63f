"""The emulator's back end of scenarios."""

from __future__ import annotations

import pytest

from refault.scenarios.api import Scenario
from refault.scenarios.emulator import run_on_emulator


def test_an_error_in_the_middle_ends_the_machine_and_not_in_a_wait_for_rest() -> None:
    def broken(s: Scenario) -> None:
        s.st(0x3000, 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_on_emulator(broken, check=True)

"""The emulator's back end of scenarios."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from refault.cli import main
from refault.scenarios import OPTIONS
from refault.scenarios.api import Scenario
from refault.scenarios.emulator import run_on_emulator


def test_an_error_in_the_middle_ends_the_machine_and_not_in_a_wait_for_rest() -> None:
    def broken(s: Scenario) -> None:
        s.st(0x3000, 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_on_emulator(broken, check=True)


def test_a_scenario_can_ask_for_any_operation_of_the_registry() -> None:
    def scenario(s: Scenario) -> None:
        s.st(0x3000, 1)
        assert s.op("migrate", 0x3000, 1) == 1
        assert s.op("reclaim", 1) >= 0
        assert s.op("host_read", 0x3000) == 1
        assert s.op("host_red", 0x3000) == "errno ENOSYS"

    lines = run_on_emulator(scenario, check=True).lines
    at = lines.index(">> host migrate(0x3000,0x1)")
    assert lines[at + 1 : at + 3] == [
        "kvm_unmap_hva_range [D+0x3000..D+0x4000]", "<< host migrate(0x3000,0x1): 1",
    ]


def test_the_document_names_every_step_and_every_option_of_the_machine() -> None:
    text = (Path(__file__).parents[2] / "docs" / "SCENARIOS.md").read_text()
    steps = {name for name in dir(Scenario) if not name.startswith("_")}
    told = set(re.findall(r"`(\w+)`", text))
    assert steps - told == set()
    assert set(OPTIONS) - told == set()


def test_the_documents_example_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "SCENARIOS.md").read_text()
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line)
    mine = tmp_path / "mine.py"
    mine.write_text(code.partition("refault compare")[0])
    (tmp_path / "none.txt").write_text(">> nothing\n")
    assert main(["compare", f"{mine}:two_readers", "--against", str(tmp_path / "none.txt")]) == 1

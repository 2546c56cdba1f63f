"""The benchmarks' own promises: what is held to a target is measured, and a miss is told."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from bench.__main__ import GROUPS, main
from bench.hostops import populated
from bench.lab import GPA, Lab
from bench.report import Group, Measure, Target, misses, read_targets

SPEED = Measure("speed", "", "how fast", higher_is_better=True)
COST = Measure("cost", "us", "how dear")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Replaces all groups by one that gives the entries of this list, the last one for ever."""
    runs = [{"speed": 0.5, "cost": 10.0}]
    left = iter(range(100))
    fake = Group("fake", (SPEED, COST), lambda: runs[min(next(left), len(runs) - 1)])
    monkeypatch.setattr("bench.__main__.GROUPS", {"fake": fake})
    return runs


def targets(tmp_path: Path, text: str) -> str:
    path = tmp_path / "targets.toml"
    path.write_text(text)
    return f"--targets={path}"


def test_every_target_has_a_measure() -> None:
    measured = {m.name for group in GROUPS.values() for m in group.measures}
    assert read_targets().keys() <= measured


def test_no_name_is_measured_twice() -> None:
    names = [m.name for group in GROUPS.values() for m in group.measures]
    assert len(names) == len(set(names))


def test_a_target_points_the_way_that_is_better() -> None:
    better = {m.name: m.higher_is_better for group in GROUPS.values() for m in group.measures}
    for name, target in read_targets().items():
        assert (target.at_least is not None) == better[name]
        assert (target.at_most is not None) != better[name]


def test_a_file_that_is_not_targets_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "targets.toml"
    path.write_text('speed = "fast"\n')
    with pytest.raises(msgspec.ValidationError):
        read_targets(path)


def test_misses_are_found_on_both_sides() -> None:
    held = {"speed": Target(at_least=0.9), "cost": Target(at_most=10)}
    assert misses({"speed": 0.9, "cost": 10.0}, held) == []
    assert misses({"speed": 0.89, "cost": 10.1, "other": 5.0}, held) == ["speed", "cost"]


@pytest.mark.usefixtures("group")
def test_check_tells_a_miss_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = targets(tmp_path, "speed = { at_least = 0.9 }\ncost = { at_most = 20 }\n")
    assert main(["--check", file]) == 1
    out, err = capsys.readouterr()
    assert "missed: speed is 0.5, want >= 0.9" in err
    assert "missed: cost" not in err
    assert json.loads(out.splitlines()[-1]) == {"speed": 0.5, "cost": 10.0}


@pytest.mark.usefixtures("group")
def test_without_check_a_miss_is_only_shown(tmp_path: Path) -> None:
    assert main([targets(tmp_path, "speed = { at_least = 0.9 }\n")]) == 0


def test_a_miss_counts_only_if_it_stays(tmp_path: Path, group: list[dict[str, float]]) -> None:
    group.append({"speed": 0.95, "cost": 30.0})
    assert main(["--check", targets(tmp_path, "speed = { at_least = 0.9 }\ncost = { at_most = 20 }\n")]) == 0


def test_an_unknown_group_is_a_usage_error() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])


def test_what_is_populated_is_mapped_beside_what_is_touched() -> None:
    with populated(4 << 20) as lab:
        mm = lab.vm.board.process.mm
        before = sum(mm.rss)
        assert before >= 1024
        lab.write_pages(8)
        assert sum(mm.rss) == before + 8
        assert lab.vm.host.swap_out(gpa=GPA, pages=8) == 8
        assert sum(mm.rss[:2]) == before


def test_a_bracket_makes_every_page_of_the_lab_fault_again() -> None:
    with Lab() as lab:
        lab.write_pages(8)
        before = lab.vm.stat["pf_taken"]
        lab.read_pages(8)
        assert lab.vm.stat["pf_taken"] == before
        lab.bracket(8, GPA)
        lab.read_pages(8)
        assert lab.vm.stat["pf_taken"] == before + 8

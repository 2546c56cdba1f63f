"""refault compare: what it answers, and what it says of what is wrong, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refault.cli import main
from refault.scenarios.recordings import recorded_names, recording

HEAD = "from refault.scenarios import scenario\n\n@scenario()\ndef mine(s):\n"
GOOD = HEAD + "    s.st(0x3000, 1)\n"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["compare", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "name a scenario, or --all"), (["no_such"], "no scenario 'no_such'"),
        (["/nowhere/mine.py"], "No such file"), (["/nowhere/mine.py:one"], "No such file"),
        (["first_touch", "--all"], "--all takes no scenario"),
        (["first_touch", "--against", "/nowhere/x.txt"], "No such file"),
        (["first_touch", "--mmu", "tdp"], "invalid choice"),
    ],
)
def test_wrong_words_are_told_in_one_line(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert why in refused(words, capsys)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = 1 / 0\n", "line 1: ZeroDivisionError"), ("def f(:\n", "SyntaxError"),
        ("x = 1\n", "has 0 scenarios"), (GOOD + GOOD.replace("mine", "other"), "has 2 scenarios"),
        (HEAD + "    raise KeyError('k')\n", "line 5: KeyError"),
        (HEAD + "    s.no_such_step(1)\n", "line 5: AttributeError"),
        (HEAD + "    s.st('x', 1)\n", "line 5: "),
        (HEAD + "    s.madv(0, 4096, 'NO_SUCH')\n", "line 5: "),
        (HEAD.replace("scenario()\n", "scenario(no_such=1)\n") + "    pass\n", "no_such"),
    ],
)
def test_what_is_wrong_with_a_file_of_ones_own_is_told_with_its_line(
    text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, against = tmp_path / "mine.py", tmp_path / "mine.txt"
    mine.write_text(text)
    against.write_text(recording("first_touch").text())
    assert why in refused([str(mine), "--against", str(against)], capsys)


def test_the_list_has_every_recorded_scenario_with_its_claim(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "scenarios", "--json"]) == 0
    listed = {each["name"]: each for each in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(recorded_names()) <= {name for name, each in listed.items() if each["recorded"]}
    assert all(each["what"] for each in listed.values())


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("hello\n")
    assert "not a line of a recording" in refused(["first_touch", "--against", str(bad)], capsys)
    bad.write_bytes(b"\xff\xfe\x00")
    assert str(bad) in refused(["first_touch", "--against", str(bad)], capsys)


def test_a_recording_as_tracefs_gave_it_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, raw = tmp_path / "mine.py", tmp_path / "raw.txt"
    mine.write_text(GOOD)
    raw.write_text(
        "   0us >> guest st D+0x3000=0x1 \n 124us kvm_mmu_pagetable_walk: addr 10003000 pferr 6 W|U\n"
        " 209us << guest st D+0x3000=0x1 : ok 209us\n"
    )
    assert main(["compare", str(mine), "--against", str(raw), "--mmu", "ept"]) == 0
    assert capsys.readouterr().out.endswith("mine: equal\n")


def test_two_that_differ_are_shown_where_they_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, other = tmp_path / "mine.py", tmp_path / "other.txt"
    mine.write_text(GOOD)
    other.write_text(">> guest st D+0x3000=0x1\n<< guest st D+0x3000=0x1 : EFAULT\n")
    assert main(["compare", str(mine), "--against", str(other), "--mmu", "ept"]) == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if " ! " in line]
    assert out.endswith("mine: different\n")


def test_json_has_both_sides_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "pageout_noswap", "--mmu", "ept", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "equal"
    assert found["ours"] == found["recorded"]
    assert found["different"] == []


def test_a_scenario_of_ones_own_may_bear_the_name_of_one_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(GOOD.replace("mine", "first_touch"))
    assert main(["compare", str(mine), "--mmu", "ept"]) == 1
    assert main(["compare", "first_touch", "--mmu", "ept"]) == 0
    capsys.readouterr()

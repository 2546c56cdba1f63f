"""What can be said of the back end for a real KVM without one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from refault.cli import main
from refault.scenarios.emulator import EmulatorBackend
from refault.scenarios.live import machine, probe
from refault.scenarios.live.backend import KvmBackend

SCENARIO = """
from refault.scenarios import scenario

@scenario()
def {name}(s):
    s.st(0x3000, 1)
    s.madv(0x3000, 0x1000, "DONTNEED")
"""


def test_both_back_ends_have_the_same_steps() -> None:
    names = {name for name in vars(KvmBackend) if not name.startswith("_")}
    assert names - set(dir(EmulatorBackend)) == {"finish", "record"}


def test_without_kvm_the_comparison_is_skipped_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert probe.why_not() == "/dev/kvm cannot be read and written"
    assert main(["compare", "first_touch", "--against", "kvm"]) == 77
    assert capsys.readouterr().err == "refault: skipped: /dev/kvm cannot be read and written\n"


def test_with_the_tdp_mmu_it_is_skipped_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(probe, "TDP_MMU", tmp_path / "tdp_mmu")
    assert str(probe.why_not()).endswith("tdp_mmu cannot be read")
    (tmp_path / "tdp_mmu").write_text("Y\n")
    assert "reads Y" in str(probe.why_not())


def test_a_scenario_of_ones_own_is_compared_with_a_recording_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(SCENARIO.format(name="own_dontneed"))
    recording = tmp_path / "mine.txt"
    recording.write_text(
        "   0us >> guest st D+0x3000=0x1 \n   9us << guest st D+0x3000=0x1 : ok 9us\n"
        "  10us >> host madvise(D+0x3000,0x1000,DONTNEED)\n"
        "  11us kvm_unmap_hva_range: mmu notifier unmap range: 0x7f0000003000 -- 0x7f0000004000"
        "   [D+0x3000..D+0x4000]\n"
        "  12us << host madvise(D+0x3000,0x1000,DONTNEED): ok 2us\n"
    )
    words = ["compare", f"{mine}:own_dontneed", "--against", str(recording), "--mmu", "ept"]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("own_dontneed: equal\n")


def test_what_is_wrong_with_a_file_of_scenarios_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.py"
    for text, why in (
        ("x = 1 / 0\n", "line 1: ZeroDivisionError"), ("x = 1\n", "has 0 scenarios"),
        (SCENARIO.format(name="unrecorded"), "has no recording"),
    ):
        mine.write_text(text)
        assert main(["compare", str(mine)]) == 2
        err = capsys.readouterr().err
        assert why in err
        assert err.count("\n") == 1
    assert main(["compare", f"{mine}:other"]) == 2
    assert "has no function 'other'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_terminated_puts_the_machine_back(number: int, tmp_path: Path) -> None:
    switch = tmp_path / "switch"
    switch.write_text("never\n")
    before = signal.getsignal(number)

    def terminated() -> None:
        with machine.ending_in_order(), machine.setting(switch, "always"):
            assert switch.read_text() == "always"
            os.kill(os.getpid(), number)
            signal.pause()

    with pytest.raises(KeyboardInterrupt):
        terminated()
    assert switch.read_text() == "never"
    assert signal.getsignal(number) is before


def test_the_emulators_machine_reads_ahead_as_far_as_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = os.stat(machine.on_disk()).st_dev
    monkeypatch.setattr(machine, "BDI", tmp_path)
    assert machine.here() == {}
    (tmp_path / f"{os.major(disk)}:{os.minor(disk)}").mkdir()
    (tmp_path / f"{os.major(disk)}:{os.minor(disk)}" / "read_ahead_kb").write_text("8192\n")
    assert machine.here() == {"mm.read_ahead_kb": "8192"}


@pytest.mark.parametrize(("against", "window"), [("kvm", "64"), ("recorded", None)])
def test_a_comparison_with_this_machine_is_made_with_its_read_ahead(
    against: str, window: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refault.scenarios import emulator
    from refault.scenarios.live import backend
    from refault.scenarios.recordings import recording

    asked: list[dict[str, object]] = []
    run = emulator.run_on_emulator

    def noted(*args: object, **options: object) -> object:
        asked.append(options)
        return run(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "why_not", lambda: None)
    monkeypatch.setattr(machine, "here", lambda: {"mm.read_ahead_kb": "64"})
    monkeypatch.setattr(backend, "run_on_kvm", lambda *_, **__: recording("first_touch"))
    monkeypatch.setattr(emulator, "run_on_emulator", noted)
    assert main(["compare", "first_touch", "--against", against]) == 0
    params = asked[0].get("params", {})
    assert isinstance(params, dict)
    assert params.get("mm.read_ahead_kb") == window

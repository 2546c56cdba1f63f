"""The programs that the documents show run as they are written."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import refault

ROOT = Path(__file__).resolve().parents[2]

TEN_LINES = """
import refault
vm = refault.VM(memory="64M", mmu="ept", seed=1)
vm.load("swap-storm")                      # a payload by name, or a path
with vm.trace("kvm:*", "refault:*") as tr:
    vm.run(until=refault.HALT)
    vm.host.swap_out(gpa=0x200000, pages=16)
    vm.run()
print(vm.walk(gva=0x400000)); tr.refaults(); tr.save("t.ndjson")
"""


def readme_program() -> str:
    text = (ROOT / "README.md").read_text()
    found = re.search(r"^In Python:\n\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    assert found is not None
    return textwrap.dedent(found[1])


@pytest.mark.parametrize("program", [TEN_LINES, readme_program()], ids=["ten-lines", "README"])
def test_the_program_runs_as_it_is_written(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(program, "example", "exec"), scope)
    vm, recording = scope["vm"], scope["tr"]
    assert isinstance(vm, refault.VM)
    assert vm.serial.endswith("0 unexpected failures\n")
    assert "EPT PML4E at hpa" in capsys.readouterr().out
    assert recording.refaults()  # type: ignore[attr-defined]
    saved = refault.read_trace("t.ndjson")
    assert {event.args["op"] for event in saved.events if event.event == "refault:host_op"} >= {"swap_out"}
    vm.close()


def test_a_guest_that_halts_goes_on_after_the_host_has_acted(tmp_path: Path) -> None:
    source = tmp_path / "nap.s"
    source.write_text(
        '.include "runtime.inc"\nmain:\n    mov qword ptr [0x400000], 7\n    sti\n    hlt\n'
        "    cmp qword ptr [0x400000], 7\n    ret\n"
    )
    with refault.VM("8M", seed=1, check=True) as vm, vm.trace("kvm:*", "refault:*") as recording:
        vm.load(str(source))
        stop = vm.run(until=refault.HALT)
        assert stop.kind == "halt"
        assert vm.walk(gpa=0x400000).hpa is not None
        assert vm.host.swap_out(gpa=0x400000) == 1
        assert vm.walk(gpa=0x400000).hpa is None
        assert vm.run(until=refault.HALT).kind == "halt"
    assert any(event.event == "refault:spte_zap" for event in recording)

"""Every payload passes on QEMU, where nobody answers vmcalls: the payloads are right about the CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from guest_payloads.builder import build, payload_names

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")


def run(image: bytes, folder: Path, *words: str, memory: str = "128M") -> tuple[int, str]:
    path = folder / "payload.elf"
    path.write_bytes(image)
    assert QEMU is not None
    command = [QEMU, "-kernel", str(path), "-m", memory, "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
               "-serial", "stdio", "-display", "none", "-no-reboot", "-cpu", "max", "-accel", "tcg"]
    if words:
        command += ["-append", " ".join(words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.returncode >> 1, result.stdout


@pytest.mark.parametrize("name", payload_names())
def test_payload_passes(name: str, tmp_path: Path) -> None:
    status, text = run(build(name), tmp_path)
    assert status == 0, text
    assert "FAIL" not in text
    summary = re.search(r"^SUMMARY: (\d+) tests, 0 unexpected failures(, \d+ skipped)?$", text, re.MULTILINE)
    assert summary is not None, text
    assert text.count("PASS: ") + text.count("SKIP: ") == int(summary.group(1))


def own(tmp_path: Path, body: str) -> bytes:
    path = tmp_path / "mine.s"
    path.write_text(f'.include "runtime.inc"\nmain:\n{body}\n    ret\n')
    return build(path)


def test_a_wrong_value_fails_with_both_values(tmp_path: Path) -> None:
    status, text = run(own(tmp_path, 'mov eax, 3\nCHECK_EQ "three", rax, 4'), tmp_path)
    assert (status, text) == (1, "FAIL: three: got 0x3, want 0x4\nSUMMARY: 1 tests, 1 unexpected failures\n")


def test_an_unexpected_exception_is_reported(tmp_path: Path) -> None:
    status, text = run(own(tmp_path, "mov rdi, 1 << 40\nmov byte ptr [rdi + 5], 1"), tmp_path)
    assert status == 1
    assert re.match(r"FAIL: unexpected exception: #PF vector 14 error 0x2 rip 0x10\w+ cs 0x8 rsp 0x\w+ "
                    r"cr2 0x10000000005\nSUMMARY: 1 tests, 1 unexpected failures\n", text), text


def test_a_null_pointer_is_caught(tmp_path: Path) -> None:
    status, text = run(own(tmp_path, "xor eax, eax\nmov al, [rax]"), tmp_path)
    assert status == 1
    assert "cr2 0x0\n" in text


def test_text_is_not_writable_and_data_do_not_run(tmp_path: Path) -> None:
    body = """    TRY .a
    mov byte ptr [main], 1
.a: ENDTRY
    CHECK_EQ "text", qword ptr [caught_error], 3
    TRY .b
    call heap_next
.b: ENDTRY
    CHECK_EQ "data", qword ptr [caught_error], 0x11"""
    status, text = run(own(tmp_path, body), tmp_path)
    assert status == 0, text


def test_nothing_tested_is_not_a_pass(tmp_path: Path) -> None:
    assert run(own(tmp_path, ""), tmp_path)[0] == 1


def test_everything_skipped_is_status_77(tmp_path: Path) -> None:
    status, text = run(own(tmp_path, 'SKIP "it", "of no use"'), tmp_path)
    assert (status, text) == (77, "SKIP: it: of no use\nSUMMARY: 1 tests, 0 unexpected failures, 1 skipped\n")


PARAMS = """    PARAM rax, "seed", 1
    PRINT_DEC rax
    PRINT "\\n"
    PARAM rax, "mib", 40
    PRINT_HEX rax
    PRINT "\\n"
    PASS "params" """


@pytest.mark.parametrize(("words", "lines"), [
    ((), ["1", "0x28"]),
    (("seed=3", "mib=0x1F"), ["3", "0x1f"]),
    (("mib=7", "xseed=9", "seeds=8", "seed=18446744073709551615"), ["18446744073709551615", "0x7"]),
])
def test_params_come_from_the_command_line(tmp_path: Path, words: tuple[str, ...], lines: list[str]) -> None:
    status, text = run(own(tmp_path, PARAMS), tmp_path, *words)
    assert (status, text.splitlines()[:2]) == (0, lines)


@pytest.mark.parametrize("word", ["seed=", "seed=12a", "seed=abc", "seed=0x", "seed=-1"])
def test_a_param_that_is_no_number_is_refused(tmp_path: Path, word: str) -> None:
    status, text = run(own(tmp_path, PARAMS), tmp_path, word)
    assert status == 1
    assert text.startswith("FAIL: seed: the parameter's value is not a number\n")


@pytest.mark.parametrize("memory", ["4M", "16M", "3G"])
def test_small_and_large_memory(tmp_path: Path, memory: str) -> None:
    status, text = run(build("swap-storm"), tmp_path, "mib=8", memory=memory)
    assert status == 0, text


def test_the_seed_changes_the_storm_and_passes_lengthen_it(tmp_path: Path) -> None:
    status, text = run(build("swap-storm"), tmp_path, "seed=7", "passes=5", "mib=4")
    assert status == 0
    assert text.splitlines()[0] == "swap-storm: 1024 pages, 5 passes, seed 7"
    assert text.count("PASS: verify pass") == 2


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    status, text = run(build("first-touch"), tmp_path, "mib=100", memory="16M")
    assert status == 1
    assert "FAIL: memory: the guest's RAM is too small for this payload\n" in text

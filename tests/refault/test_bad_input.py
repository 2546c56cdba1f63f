"""What goes wrong as users meet it: one clear line on stderr, the right exit code, nothing half-written.

What may be mistyped is in test_cli.py, damaged payloads and parameters are in test_run.py too.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from guest_payloads.builder import build
from refault.cli import main
from trace_events.ndjson import read_trace

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "100"}
SMALL = ("--memory", "4M", "--host-ram", "8M")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`refault ARGS` in this process and an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Result:
        code = main([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def trace_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("trace") / "t"
    assert main(["run", "first-touch", "mib=1", *SMALL, "-q", "--trace", str(path)]) == 0
    return path.read_bytes()


def refused(result: Result, *words: str, code: int = 2) -> None:
    assert result.code == code, result
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("refault")
    for word in words:
        assert word in result.err


# -- payloads ---------------------------------------------------------------------------------------

ELF = build("first-touch")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty", b"", "empty"),
        ("half.elf", ELF[: len(ELF) // 2], "end"),
        ("head.elf", ELF[:60], "ELF"),
        ("big.bin", bytes(5 << 20), "outside guest memory"),
        ("no-symbol.s", b"mov eax, [nothing]\n", "no-symbol.s:1: unknown symbol 'nothing'"),
        ("no-mnemonic.s", b'.include "runtime.inc"\nmain:\n  frob rax\n', "no-mnemonic.s:3: invalid"),
        ("no-include.s", b'\n.include "nothing.inc"\n', "no-include.s:2: cannot find nothing.inc"),
        ("no-runtime.s", b"main:\n  ret\n", "runtime.inc"),
        ("binary.s", b"\xff\xfe\0", "not UTF-8"),
        ("loop.s", b'.include "loop.s"\n', "loop.s"),
    ],
)
def test_a_file_that_cannot_run_is_refused_before_anything_is_written(
    command: Command, tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(command("run", name, *SMALL, "--trace", "t"), name, why)
    assert os.listdir(tmp_path) == [name]


def test_what_is_no_file_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    refused(command("run", "missing.elf"), "missing.elf")
    refused(command("run", "dir"), "dir")
    refused(command("run", ""), "empty")
    refused(command("run", "/dev/zero"), "/dev/zero: a device, not a file")
    refused(command("run", "swap-strom"), "did you mean 'swap-storm'")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.elf").write_bytes(ELF)
    (tmp_path / "x.elf").chmod(0)
    refused(command("run", "x.elf"), "x.elf: cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("code", "args", "why"),
    [
        ("ebfe", ["--max-insns", "200000"], "the limit of 200000 instructions is reached"),
        ("ebfe", ["--timeout", "1"], "the limit of 1 s of real time is reached"),
        ("f4", [], "every vCPU halted with interrupts off"),
        ("fbf4", [], "every vCPU waits in HLT and no interrupt can come"),
        ("0f011c2500000000" + "0f0b", [], "triple fault on vCPU 0"),
        # CR4.PAE cleared in long mode is a #GP; without IDT that is a triple fault.
        ("0f20e0" + "4883e0df" + "0f22e0", [], "triple fault"),
        ("48b8" + "00000000ff000000" + "ffe0", [], "triple fault"),
    ],
)
def test_a_guest_that_does_not_finish_is_3_and_says_why(
    command: Command, tmp_path: Path, code: str, args: list[str], why: str
) -> None:
    (tmp_path / "x.bin").write_bytes(bytes.fromhex(code))
    began = time.monotonic()
    result = command("run", "x.bin", *SMALL, "--check", "--trace", "t", *args)
    assert result.code == 3, result
    assert why in result.err
    assert read_trace("t").end == ("interrupted" if "--timeout" in args else "complete")
    assert command("check", "t").code == 0
    assert time.monotonic() - began < 20


def test_a_limit_is_met_within_a_slice(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\xeb\xfe")
    result = command("run", "x.bin", *SMALL, "--max-insns", "1000", "--json")
    assert 1000 <= json.loads(result.out)["instructions"] < 3000


# -- the machine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--memory", "100000T"], "cannot make a host"),
        (["--swap", "4K"], "a swap file needs 8K at least"),
        (["--events", "kvm:kvm_exitt", "--trace", "t"], "did you mean 'kvm:kvm_exit'"),
        (["--events", "kvm:*,breakfast", "--trace", "t"], "no event matches 'breakfast'"),
        (["--events", "", "--trace", "t"], "no event matches ''"),
    ],
)
def test_what_cannot_be_built_or_watched_is_said(
    command: Command, tmp_path: Path, args: list[str], why: str
) -> None:
    refused(command("run", "first-touch", *args), why)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("swap", ["off", "1M"])
def test_more_guest_than_host_and_swap_ends_in_the_oom_killer(
    command: Command, tmp_path: Path, swap: str
) -> None:
    sizes = ("--memory", "8M", "--host-ram", "3M", "--swap", swap)
    result = command("run", "swap-storm", "mib=6", *sizes, "--trace", "t", "--check")
    refused(result, "Out of memory: Killed process", code=3)
    assert read_trace("t").end == "interrupted"
    assert os.listdir(tmp_path) == ["t"]


def test_the_python_api_refuses_in_the_same_words() -> None:
    import refault

    for options, why in (
        ({"memory": 5000}, "multiple of 4 KiB"),
        ({"memory": "many"}, "not a size"),
        ({"vcpus": 0}, "vcpus 0"),
        ({"mmu": "npt"}, "mmu 'npt'"),
        ({"profile": "linux-1"}, "no kernel 'linux-1'"),
        ({"breaks": {"no-flsh"}}, "no protocol switch 'no-flsh'"),
        ({"params": {"kvm.x": "1"}}, "no parameter 'kvm.x'"),
        ({"host_ram": "64K"}, "a host needs"),
    ):
        with pytest.raises(refault.UsageError, match=why):
            refault.VM(**options)  # type: ignore[arg-type]


# -- host scripts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("host.swap_out(gpa=1)", "line 3: KernelError: EINVAL: gpa 0x1 is not a multiple of 4096"),
        ("host.sleep('x')", "line 3: TypeError"),
        ("raise SystemExit(7)", "line 3: SystemExit: 7"),
        ("host.no_such_thing()", "line 3: AttributeError: no host operation named 'no_such_thing'"),
    ],
)
def test_a_host_script_that_fails_names_its_line(
    command: Command, tmp_path: Path, body: str, why: str
) -> None:
    (tmp_path / "h.py").write_text(f"def main(vm, host):\n    host.sleep(1000)\n    {body}\n")
    refused(command("run", "first-touch", "mib=1", *SMALL, "--host", "h.py", "-q", "--trace", "t"), why)
    assert read_trace("t").end == "interrupted"


# -- traces -----------------------------------------------------------------------------------------

READERS = ("report", "stat", "explain", "check", "walk", "diff")


def read(command: Command, verb: str, name: str) -> Result:
    return command(verb, name, *{"walk": ["0x100000"], "diff": [name]}.get(verb, []))


@pytest.mark.parametrize("verb", READERS)
def test_a_trace_cut_in_half_is_refused_by_all_that_read_it(
    command: Command, tmp_path: Path, trace_bytes: bytes, verb: str
) -> None:
    (tmp_path / "cut").write_bytes(trace_bytes[: len(trace_bytes) // 2])
    (tmp_path / "stub").write_bytes(trace_bytes[:30])
    (tmp_path / "twice").write_bytes(trace_bytes * 2)
    refused(read(command, verb, "cut"), "cut: the trace is cut off after")
    refused(read(command, verb, "stub"), "stub: not a refault trace")
    refused(read(command, verb, "twice"), "something follows the end record")
    refused(read(command, verb, "."), "is a directory")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"memory": "x"}, "Expected `int`, got `str` - at `$.memory`"),
        ({"memory": 4097}, "not a positive multiple of 4 KiB"),
        ({"vcpus": 0}, "vcpus 0"),
        ({"vcpus": 1000}, "vcpus 1000"),
        ({"mmu": "x"}, "mmu 'x'"),
        ({"profile": "linux-1"}, "no kernel 'linux-1'"),
        ({"params": {"a": "b"}}, "no parameter 'a'"),
        ({"breaks": ["x"]}, "no protocol switch 'x'"),
        ({"payload": 4}, "$.payload"),
        ({"payload": {}}, "names no payload"),
        ({"payload": {"name": 7}}, "$.payload.name"),
        ({"payload": {"name": "nothing", "sha256": ""}}, "no payload and no file 'nothing'"),
        ({"payload": {"name": "mmio", "sha256": ""}}, "not the payload of this trace any more"),
        ({"max_insns": "x"}, "$.max_insns"),
        ({"host_script": "x"}, "--host script, line 1: NameError"),
        ({"host_ram": 1 << 60}, "cannot make a host"),
        ({"swap": 1}, "a swap file needs"),
    ],
    ids=str,
)
def test_a_header_that_is_no_machine_is_refused(
    command: Command, tmp_path: Path, trace_bytes: bytes, change: dict[str, object], why: str
) -> None:
    head, _, rest = trace_bytes.partition(b"\n")
    header = json.loads(head)
    header["machine"].update(change)
    (tmp_path / "t").write_bytes(json.dumps(header).encode() + b"\n" + rest)
    refused(command("check", "t"), why)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["0x10000000000000000"], "more than 64 bits"),
        (["0x1000", "--vcpu", "1"], "no vCPU 1; the machine has 1"),
        (["0x1000", "--at", "99999999"], "no event 99999999"),
    ],
)
def test_a_walk_that_cannot_be_is_refused(
    command: Command, tmp_path: Path, trace_bytes: bytes, args: list[str], why: str
) -> None:
    (tmp_path / "t").write_bytes(trace_bytes)
    refused(command("walk", "t", *args), why)
    assert "not canonical" in command("walk", "t", "0x800000000000", "--at", "200").out


def test_a_glob_that_matches_nothing_is_said(
    command: Command, tmp_path: Path, trace_bytes: bytes
) -> None:
    (tmp_path / "t").write_bytes(trace_bytes)
    refused(command("report", "t", "--event", "kvm:kvm_exitt"), "did you mean 'kvm:kvm_exit'")
    result = command("report", "t", "--event", "kvm:kvm_mmio")
    assert (result.code, "none of the" in result.err) == (0, True)
    result = command("list", "events", "x*")
    assert (result.code, result.out, result.err) == (0, "", "no events match 'x*'\n")


def test_a_trace_is_not_run_as_a_guest_image(command: Command, tmp_path: Path, trace_bytes: bytes) -> None:
    (tmp_path / "t").write_bytes(trace_bytes)
    refused(command("stat", "--kvm", "t"), "t: a trace file, not a guest image")
    refused(command("run", "t", *SMALL), "t: a trace file, not a guest image")


@pytest.mark.parametrize(("verb", "missing"), [("run", "payload"), ("stat", "trace")])
def test_what_is_missing_is_said_and_nothing_that_may_be_left_out(
    command: Command, verb: str, missing: str
) -> None:
    refused(command(verb), f"the following arguments are required: {missing} (")


# -- places that cannot be written ------------------------------------------------------------------


def shell(text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text.replace("refault", f"{sys.executable} -m refault")],
        cwd=cwd, env=ENV, capture_output=True, text=True, timeout=60, check=False,
    )


def test_a_disk_that_fills_up_leaves_one_line_and_no_file(tmp_path: Path) -> None:
    # As root nothing may ever point at /dev/full itself: a wrong rename would take the device away.
    small = "--memory 4M --host-ram 8M --swap off -q"
    result = shell(f"ulimit -f 100; refault run first-touch mib=1 {small} --trace t > {os.devnull}", tmp_path)
    assert (result.returncode, result.stderr) == (2, "refault: cannot write trace t: File too large\n")
    result = shell("ulimit -f 4; refault build first-touch -o x.elf", tmp_path)
    assert (result.returncode, result.stderr) == (2, "refault: x.elf: File too large\n")
    assert os.listdir(tmp_path) == []


def test_a_trace_into_a_pipe_leaves_the_pipe_in_place(tmp_path: Path) -> None:
    run = "refault run first-touch mib=1 --memory 4M --host-ram 8M -q --trace pipe > serial"
    result = shell(f"mkfifo pipe; cat pipe > t & {run}; wait", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert read_trace(tmp_path / "t").end == "complete"


def test_a_trace_through_a_link_is_written_where_it_points(command: Command, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/t")
    assert command("run", "first-touch", "mib=1", *SMALL, "-q", "--trace", "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert read_trace("there/t").end == "complete"


def test_what_build_cannot_write_is_not_half_there(command: Command, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    refused(command("build", "first-touch", "-o", "nowhere/x.elf"), "nowhere/x.elf: No such file")
    refused(command("build", "first-touch", "-o", "dir"), "dir: Is a directory")
    assert os.listdir(tmp_path) == ["dir"]


def test_a_full_standard_output_is_one_line(tmp_path: Path, trace_bytes: bytes) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "t").write_bytes(trace_bytes)
    result = shell("refault report t > /dev/full", tmp_path)
    assert (result.returncode, result.stderr) == (2, "refault: cannot write: No space left on device\n")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path, trace_bytes: bytes) -> None:
    (tmp_path / "t").write_bytes(trace_bytes)
    result = shell("set -o pipefail; refault report t | head -1", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "cpus=1\n", "")


# -- Ctrl-C -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", ["swap-storm", "loop"])
def test_ctrl_c_in_the_middle_of_a_run_is_130_at_once_and_the_trace_says_interrupted(
    tmp_path: Path, payload: str
) -> None:
    # An endless loop never leaves the CPU by itself; a storm is somewhere inside the host's mm.
    image = tmp_path / "loop.bin"
    image.write_bytes(b"\xba\xf8\x03\x00\x00\xb0\x0a\xee\xeb\xfe")
    args = [str(image)] if payload == "loop" else ["swap-storm", "mib=24", "passes=1000", "weather=0"]
    args += ["--memory", "32M", "--host-ram", "16M", "--trace", "t"]
    with subprocess.Popen(
        [sys.executable, "-m", "refault", "run", *args], cwd=tmp_path, env=ENV, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(1)
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert time.monotonic() - began < 6  # two on an idle machine
    assert (run.returncode, err) == (130, "refault: interrupted\n")
    assert read_trace(tmp_path / "t").end == "interrupted"
    assert sorted(os.listdir(tmp_path)) == ["loop.bin", "t"]

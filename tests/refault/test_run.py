"""`refault run` and what reruns a machine, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trace_events.ndjson import read_trace

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--memory", "16M", "--host-ram", "32M")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One recorded run with refaults: more guest than host."""
    path = tmp_path_factory.mktemp("run") / "t.ndjson"
    command = [sys.executable, "-m", "refault", "run", "swap-storm", "mib=6", "--memory", "8M", "--check"]
    result = subprocess.run(
        [*command, "--host-ram", "6M", "--trace", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result
    assert "Traceback" not in result.stderr
    return path, result


def test_the_guest_speaks_on_stdout_and_the_summary_on_stderr(recorded):
    _, result = recorded
    assert result.stdout.splitlines()[-1] == "SUMMARY: 3 tests, 0 unexpected failures"
    assert "the guest passed" in result.stderr
    assert "truths" in result.stderr
    assert "the story of guest page" in result.stderr


def test_the_trace_is_whole_and_holds_refaults(recorded):
    from refault.analysis import Analysis

    trace = read_trace(recorded[0])
    assert trace.end == "complete"
    assert [event.seq for event in trace.events] == list(range(len(trace.events)))
    refaults = Analysis(trace.events).refaults()
    assert len(refaults) > 100
    assert all(refault.install is not None for refault in refaults[:50])


def test_a_recorded_run_repeats(recorded, refault):
    result = refault("check", recorded[0])
    assert result.returncode == 0, result
    assert result.stdout.startswith("PASS: ")


def test_a_changed_recording_does_not_and_the_difference_is_shown(recorded, refault, tmp_path):
    lines = recorded[0].read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "kvm:kvm_page_fault" in line)
    event = json.loads(lines[at])
    event["args"]["fault_address"] += 4096
    lines[at] = json.dumps(event) + "\n"
    changed = tmp_path / "changed.ndjson"
    changed.write_text("".join(lines))
    result = refault("check", changed)
    assert result.returncode == 1
    assert "fault_address differs" in result.stdout
    assert "FAIL: " in result.stdout


def test_update_writes_what_the_rerun_did(recorded, refault, tmp_path):
    golden = tmp_path / "golden.ndjson"
    lines = recorded[0].read_text().splitlines(keepends=True)
    head, end = lines[:101], json.loads(lines[-1])
    end["events"] = 100
    golden.write_text("".join(head) + json.dumps(end) + "\n")
    assert refault("check", golden).returncode == 1
    assert refault("check", golden, "--update").returncode == 0
    assert golden.read_bytes() == recorded[0].read_bytes()


def test_a_walk_shows_both_stages_at_any_event(recorded, refault):
    trace = read_trace(recorded[0])
    fault = next(event for event in trace.events if event.event == "kvm:kvm_page_fault")
    address = hex(fault.args["fault_address"])
    before = refault("walk", recorded[0], address, "--gpa", "--at", fault.seq)
    after = refault("walk", recorded[0], address, "--gpa", "--at", fault.seq + 60)
    assert before.returncode == after.returncode == 0, before
    assert before.stdout != after.stdout
    assert "EPT" in after.stdout
    tree = json.loads(refault("walk", recorded[0], address, "--json").stdout)
    assert tree["steps"]


def test_a_filtered_trace_keeps_the_ancestors_of_what_it_shows(refault, tmp_path):
    path = tmp_path / "zaps.ndjson"
    args = ("--memory", "8M", "--host-ram", "6M", "--trace", path, "--events", "refault:spte_zap", "-q")
    result = refault("run", "swap-storm", "mib=6", *args)
    assert (result.returncode, result.stderr) == (0, "")
    trace = read_trace(path)
    held = {event.seq for event in trace.events}
    zaps = [event for event in trace.events if event.event == "refault:spte_zap"]
    assert zaps
    assert all(event.cause is None or event.cause in held for event in trace.events)
    assert refault("check", path).returncode == 0


def test_another_seed_is_another_machine(refault, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        assert refault("run", "first-touch", *SMALL, "--seed", seed, "--trace", name).returncode == 0
    result = refault("diff", "a", "b")
    assert "machines differ in seed: 1 != 2" in result.stdout


def test_json_is_one_object_and_the_guest_moves_to_stderr(refault):
    result = refault("run", "first-touch", *SMALL, "--json")
    assert result.returncode == 0
    summary = json.loads(result.stdout)
    assert summary["payload"] == "first-touch"
    assert summary["exits"]["EPT_VIOLATION"] > 0
    assert "PASS" in result.stderr


def test_interpreted_and_compiled_give_the_same_trace(refault, tmp_path):
    for name, flags in (("a", []), ("b", ["--interpreted"])):
        result = refault("run", "first-touch", *SMALL, "--trace", name, *flags, timeout=200)
        assert result.returncode == 0, result
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_limit_of_instructions_is_exit_code_3(refault):
    result = refault("run", "swap-storm", "--max-insns", 1_000_000)
    assert result.returncode == 3
    assert "1000000 instructions" in result.stderr


def test_a_limit_of_time_is_exit_code_3(refault):
    result = refault("run", "swap-storm", "passes=1000", "--timeout", 1)
    assert result.returncode == 3
    assert "of real time" in result.stderr


def test_ctrl_c_is_130_and_leaves_a_trace_that_says_interrupted(tmp_path):
    path = tmp_path / "t.ndjson"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "refault", "run", "swap-storm", "passes=1000", "--trace", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("swap-storm:")
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err.splitlines()[-1] == "refault: interrupted"
    trace = read_trace(path)
    assert trace.end == "interrupted"
    assert os.listdir(tmp_path) == ["t.ndjson"]


NO_PAYLOADS = {
    "empty.elf": b"",
    "short.elf": b"\x7fELF",
    "noise.elf": b"\x7fELF" + bytes(range(200)),
    "bad.s": b"frobnicate\n",
}


@pytest.mark.parametrize("name", NO_PAYLOADS)
def test_a_file_that_is_no_payload_is_one_line(refault, tmp_path, name):
    content = NO_PAYLOADS[name]
    (tmp_path / name).write_bytes(content)
    result = refault("run", name)
    assert result.returncode == 2, result
    assert len(result.stderr.splitlines()) == 1
    assert name in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["no-such-payload"],
        ["first-touch", "--trace", "/proc/no/such/place"],
        ["first-touch", "--trace", "."],
        ["first-touch", "--host", "nothing.py"],
        ["first-touch", "--param", "kvm.no_such_parameter=1"],
        ["first-touch", "--param", "kvm_intel.eptad=perhaps"],
        ["first-touch", "--memory", "4K"],
        ["first-touch", "no_such_word=1"],
        ["first-touch", "--host-ram", "4K"],
    ],
    ids=" ".join,
)
def test_what_the_machine_refuses_is_one_line_and_exit_code_2(refault, tmp_path, args):
    result = refault("run", *args)
    assert result.returncode == 2, result
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("def main(vm, host:\n", "SyntaxError"),
        ("x = 1\n", "defines no function main"),
        ("def main(vm, host):\n    host.swap_ot(0)\n", "swap_ot"),
        ("def main(vm, host):\n    host.swap_out()\n", "swap_out"),
        ("1 // 0\n", "ZeroDivisionError"),
    ],
)
def test_a_wrong_host_script_is_one_line(refault, tmp_path, script, why):
    (tmp_path / "host.py").write_text(script)
    result = refault("run", "first-touch", *SMALL, "--host", "host.py")
    assert result.returncode == 2, result
    # The guest may have ended before the script's turn came: then its summary stands above.
    assert why in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_host_script_acts_beside_the_guest(refault, tmp_path):
    script = "def main(vm, host):\n    host.sleep(200_000)\n    host.swap_out(0x100000, 64)\n"
    (tmp_path / "host.py").write_text(script)
    args = ("--host", "host.py", "--check", "--trace", "t")
    assert refault("run", "swap-storm", "mib=4", "--memory", "8M", *args).returncode == 0
    assert "swap_out" in refault("explain", "t").stdout
    assert refault("check", "t").returncode == 0


def test_a_step_left_out_is_caught(refault):
    args = ("--memory", "8M", "--host-ram", "6M", "--check", "--break", "skip-start")
    result = refault("run", "swap-storm", "mib=6", *args)
    assert result.returncode == 4, result
    assert "a truth of the model is broken" in result.stderr.splitlines()[-1]


def test_what_build_writes_runs(refault, tmp_path):
    assert refault("build", "first-touch", "-o", "x.elf").returncode == 0
    assert refault("run", "x.elf", *SMALL).returncode == 0

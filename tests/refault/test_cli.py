"""The command as users meet it: what they may type wrong is one line on stderr, never a traceback."""

import json
import subprocess
import sys
import time

import pytest

from refault.cli import VERBS, main
from refault.errors import INPUT_ERRORS, exit_code_of


def check_refusal(result, code=2):
    assert result.returncode == code, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("refault")


@pytest.mark.parametrize(
    "args",
    [
        ["lst"],
        ["--frobnicate"],
        ["report"],
        ["report", "nothing.ndjson"],
        ["report", "."],
        ["report", "t.ndjson", "-F", "x : y =="],
        ["report", "t.ndjson", "--wrong"],
        ["stat", "nothing.ndjson"],
        ["stat", "t.ndjson", "--event", "breakfast"],
        ["explain", "nothing.ndjson"],
        ["explain", "t.ndjson", "99"],
        ["explain", "t.ndjson", "minus-one"],
        ["diff", "t.ndjson", "nothing.ndjson"],
        ["diff", "t.ndjson"],
        ["check", "nothing.ndjson"],
        ["walk", "t.ndjson", "0x1000", "--at", "99"],
        ["walk", "nothing.ndjson", "0x1000"],
        ["list", "breakfasts"],
        ["gaps", "no_such_package"],
        ["build", "no-such-payload"],
        ["build", "empty.s.missing.s"],
        ["run"],
        ["run", "swap-storm", "--memory", "64Q"],
        ["run", "swap-storm", "--memory", "0"],
        ["run", "swap-storm", "--swap", "some"],
        ["run", "swap-storm", "--vcpus", "0"],
        ["run", "swap-storm", "--param", "novalue"],
        ["run", "swap-storm", "--break", "no-flsh"],
        ["run", "swap-storm", "--profile", "linux-1.0"],
        ["run", "swap-storm", "--timeout", "-1"],
        ["run", "swap-storm", "word without equals"],
    ],
    ids=" ".join,
)
def test_what_is_typed_wrong_is_one_line_and_exit_code_2(refault, trace_file, args):
    check_refusal(refault(*args))


@pytest.mark.parametrize("verb", ["report", "stat", "explain", "diff", "check", "walk"])
@pytest.mark.parametrize("damage", [b"", b"\x7fELF\0\0", b"{}\n", None])
def test_a_damaged_trace_is_one_line_that_names_it(refault, trace_file, verb, damage):
    data = trace_file.read_bytes()
    trace_file.write_bytes(data[: len(data) // 2] if damage is None else damage)
    result = refault(verb, trace_file.name, *{"diff": [trace_file.name], "walk": ["0"]}.get(verb, []))
    check_refusal(result)
    assert trace_file.name in result.stderr


def test_help_lists_every_verb_and_every_verb_has_help(refault, capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert f"usage: refault {verb}" in capsys.readouterr().out


def test_no_arguments_show_the_usage_and_are_a_usage_error(refault):
    result = refault()
    assert result.returncode == 2
    assert result.stdout.startswith("usage:")


def test_a_near_miss_is_suggested(refault):
    assert "did you mean 'report'" in refault("repotr").stderr
    assert "did you mean 'no-flush'" in refault("run", "x", "--break", "no-flsh").stderr


def test_the_command_starts_fast_and_imports_no_machine():
    code = (
        "import sys, refault.cli; refault.cli.main(['report', '--help']);"
        "print(sorted({'numba', 'numpy', 'unicorn', 'rich', 'greenlet', 'capstone'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    # 0.1 s on an idle machine; the limit leaves room for a busy one.
    assert time.perf_counter() - start < 3


def test_report_prints_trace_cmds_lines(refault, trace_file):
    lines = refault("report", trace_file).stdout.splitlines()
    assert lines[0] == "cpus=1"
    assert len(lines) == 13
    assert lines[2].startswith("       CPU 0/KVM-1000  [000] .....     0.000001: kvm_page_fault:")


def test_report_filters_by_field_and_glob(refault, trace_file):
    result = refault("report", trace_file, "-F", "refault/spte_zap : gfn == 0x201", "--json")
    assert [json.loads(line)["seq"] for line in result.stdout.splitlines()] == [6]
    assert len(refault("report", trace_file, "--event", "kvm:kvm_e*").stdout.splitlines()) == 7


def test_stat_prints_perfs_table_and_json(refault, trace_file):
    assert "Total Samples:3, Total events handled time:81.50us." in refault("stat", trace_file).stdout
    first = json.loads(refault("stat", trace_file, "--json").stdout.splitlines()[0])
    assert (first["event"], first["samples"], first["time_ns"]) == ("EPT_VIOLATION", 2, 81_000)


def test_diff_of_a_trace_with_itself_is_0(refault, trace_file):
    result = refault("diff", trace_file, trace_file)
    assert (result.returncode, result.stdout) == (0, "the 12 events are the same\n")


def test_diff_shows_both_records_their_causes_and_how_to_see_it_again(refault, trace_file, tmp_path):
    other = tmp_path / "other.ndjson"
    other.write_text(trace_file.read_text().replace('"gfn":513', '"gfn":514'))
    result = refault("diff", trace_file.name, other.name)
    assert result.returncode == 1
    assert "the traces part at event 6 of 12 and 12: gfn differs" in result.stdout
    assert "\n- #6 " in result.stdout
    assert "\n+ #6 " in result.stdout
    assert "  #3 " in result.stdout[result.stdout.index("came about by") :]
    assert "refault check t.ndjson" in result.stdout
    assert json.loads(refault("diff", trace_file, other, "--json").stdout)["difference"]["field"] == "gfn"


def test_explain_tells_why_in_words_and_links(refault, trace_file):
    text = refault("explain", trace_file, 8).stdout
    assert "vCPU 0 wrote to guest page 0x200" in text.replace("\n", " ")
    assert "... 3.9 us later, its mapping gone:" in text
    assert "because of swap_out" in refault("explain", trace_file, "--gpa", "0x200000").stdout
    assert "1 refaults, 1 zaps not answered" in refault("explain", trace_file).stdout


def test_gaps_are_the_docstrings(refault):
    result = refault("gaps", "trace_events", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {"trace_events.text", "trace_events.ndjson"} <= {row["module"] for row in rows}
    assert all(row["not_modelled"] for row in rows)


def test_a_reader_that_leaves_early_is_no_error(trace_file):
    command = f"{sys.executable} -m refault report {trace_file} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_bug_is_one_line_and_exit_code_4(monkeypatch, capsys):
    import refault.commands.gaps as gaps

    monkeypatch.setattr(gaps, "main", lambda args: 1 // 0)
    assert main(["gaps"]) == 4
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "a bug in refault: ZeroDivisionError" in error


def test_ctrl_c_is_130(monkeypatch, capsys):
    import refault.commands.gaps as gaps

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gaps, "main", interrupt)
    assert main(["gaps"]) == 130
    assert capsys.readouterr().err == "refault: interrupted\n"


def test_a_broken_truth_is_4_and_names_it(monkeypatch, capsys):
    import refault.commands.gaps as gaps
    from host_mm.kernel.errors import BrokenTruth

    def broken(args):
        raise BrokenTruth("no-spte-in-bracket", "gfn 0x200", 17)

    monkeypatch.setattr(gaps, "main", broken)
    assert main(["gaps"]) == 4
    assert "no-spte-in-bracket: gfn 0x200 (event 17)" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "name"), INPUT_ERRORS)
def test_the_input_errors_of_the_rooms_below_exist(module, name):
    import importlib

    kind = getattr(importlib.import_module(module), name)
    assert exit_code_of(kind("x")) == 2

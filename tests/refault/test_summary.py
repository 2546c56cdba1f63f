import io

import msgspec
from rich.console import Console

from refault.summary import RunSummary, render


def summary(**changes):
    base = RunSummary(
        payload="swap-storm",
        outcome="the guest passed",
        exit_code=0,
        seed=1,
        instructions=2_000_000,
        logical_ns=1_500_000_000,
        wall_seconds=2.0,
        memory=64 << 20,
        host_ram=24 << 20,
        swap=64 << 20,
        exits={"EPT_VIOLATION": 10, "HLT": 1},
        host={"pswpin": 5, "pgfault": 0},
        refaults=7,
        top=[(0x200, 3)],
    )
    return msgspec.structs.replace(base, **changes)


def text(value):
    out = io.StringIO()
    Console(file=out, width=120, no_color=True, highlight=False).print(render(value))
    return out.getvalue()


def test_the_summary_names_machine_time_and_refaults():
    shown = text(summary())
    assert "64M guest on 24M host, 64M swap, seed 1" in shown
    assert "1.5 s on the machine's clock, 2,000,000 instructions, 2.0 s here (1.0 MIPS)" in shown
    assert "EPT_VIOLATION 10, HLT 1" in shown
    assert "7 faults on a page whose mapping had been taken away" in shown
    assert "gfn 0x200 3 times" in shown


def test_zero_counters_are_left_out():
    assert "pgfault" not in text(summary())


def test_truths_and_trace_are_shown_only_if_there_were_any():
    assert "truths" not in text(summary())
    shown = text(summary(truths={"points": 9}, trace="t.ndjson", trace_events=12))
    assert "all hold: points 9" in shown
    assert "t.ndjson, 12 events" in shown


def test_no_swap_and_no_time_are_said_plainly():
    assert "no swap" in text(summary(swap=None, wall_seconds=0.0))


def test_brackets_in_a_name_are_not_markup():
    assert "[odd]" in text(summary(payload="[odd]name"))


def test_the_summary_is_one_json_object():
    assert msgspec.json.decode(msgspec.json.encode(summary()))["refaults"] == 7

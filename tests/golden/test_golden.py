"""Every payload leaves the trace that was recorded of it, event for event.

A red test here says that the model changed. If it was meant to, `make golden` records anew, and the
difference is looked at before it is committed. No test and no CI run writes here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from refault.cli import main
from tests.golden.record import names
from trace_events.ndjson import read_trace

HERE = Path(__file__).resolve().parent
GOLDEN = sorted(HERE.glob("*.ndjson"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_payload_leaves_its_golden_trace(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    code = main(["check", str(path)])
    out, err = capsys.readouterr()
    assert code == 0, f"{out}{err}\nmeant? then: make golden"
    assert path.read_bytes() == before


def test_every_payload_has_a_small_golden_trace() -> None:
    assert sorted(path.stem for path in GOLDEN) == names()
    assert all(path.stat().st_size < 150_000 for path in GOLDEN)
    for path in GOLDEN:
        trace = read_trace(path)
        assert trace.end == "complete"
        assert trace.machine["checks"] is True
        assert trace.events

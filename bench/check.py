"""Compare a benchmark run with the recorded one, in units of this machine's own speed.

    python bench/check.py out/bench.json             exit 1 if anything became much slower
    python bench/check.py --update out/bench.json    record

Times are divided by that of a fixed loop of pure Python measured here and now, so that a recording
made on one machine can be held against another. FACTOR is wide: this catches a fill that fell back to
Python, not a few percent.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BASELINE = Path(__file__).with_name("baseline.json")
FACTOR = 2.5


def unit() -> float:
    """Seconds that the fixed loop takes: the best of several tries."""

    def loop() -> float:
        began = time.perf_counter()
        total = 0
        for i in range(300_000):
            total ^= i * 3 & 0xFFFF
        return time.perf_counter() - began

    return min(loop() for _ in range(7))


def main(arguments: list[str]) -> int:
    """Compare or record; 0, 1 or 2 as exit code."""
    update = "--update" in arguments
    files = [argument for argument in arguments if not argument.startswith("-")]
    if len(files) != 1:
        print("usage: check.py [--update] BENCH.json", file=sys.stderr)
        return 2
    one = unit()
    report = json.loads(Path(files[0]).read_text())
    measured = {bench["name"]: bench["stats"]["min"] / one for bench in report["benchmarks"]}
    if update:
        rounded = {name: round(value, 4) for name, value in sorted(measured.items())}
        BASELINE.write_text(json.dumps(rounded, indent=1) + "\n")
        print(f"{BASELINE.name}: {len(measured)} recorded")
        return 0
    baseline = json.loads(BASELINE.read_text())
    slow = 0
    for name, value in sorted(measured.items()):
        known = baseline.get(name)
        ratio = value / known if known else None
        verdict = "new" if ratio is None else "SLOW" if ratio > FACTOR else "ok"
        slow += verdict == "SLOW"
        print(f"{verdict:<5} {name:<40} {value:10.3f} units" + (f"  x{ratio:.2f}" if ratio else ""))
    for name in sorted(baseline.keys() - measured.keys()):
        print(f"GONE  {name}")
        slow += 1
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""After `make matrix`: the matrix as a table."""

from __future__ import annotations

import os
import re

import pytest

CELL = re.compile(r"test_matrix\.py::test_the_payload_passes\[([\w-]+?)-(tdp|direct|shadow)-(.+)-(\d+)\]")
MARKS = {"passed": "+", "failed": "F", "error": "F", "skipped": "s"}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One row a payload, one column an MMU and a kernel, in it a mark for each number of vCPUs."""
    if "REFAULT_MATRIX" not in os.environ:
        return
    marks: dict[str, dict[tuple[str, str], dict[int, str]]] = {}
    for kind, mark in MARKS.items():
        for report in terminalreporter.stats.get(kind, []):
            found = CELL.search(getattr(report, "nodeid", ""))
            if found:
                name, mmu, profile, vcpus = found.groups()
                marks.setdefault(name, {}).setdefault((mmu, profile), {})[int(vcpus)] = mark
    columns = sorted({column for row in marks.values() for column in row}, reverse=True)
    if not columns:
        return
    vcpus = sorted({n for row in marks.values() for cell in row.values() for n in cell})
    heads = [f"{mmu} {profile.removeprefix('linux-')}" for mmu, profile in columns]
    width = max(*map(len, heads), len(" ".join(map(str, vcpus)))) + 2
    write = terminalreporter.write_line
    write("")
    write(f"{'payload':<14}" + "".join(f"{head:<{width}}" for head in heads))
    write(f"{'vCPUs':<14}" + f"{' '.join(map(str, vcpus)):<{width}}" * len(heads))
    for name, row in sorted(marks.items()):
        cells = (" ".join(row.get(column, {}).get(n, ".") for n in vcpus) for column in columns)
        write(f"{name:<14}" + "".join(f"{cell:<{width}}" for cell in cells).rstrip())

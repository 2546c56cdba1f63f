"""docs/seed.md: runs the commands in it, and writes their output there anew (`make seed-doc`).

An indented block whose first line begins with `$ ` is a session: each line with `$ ` a command, what follows
it its output. The sessions of one `## ` section run one after the other in one folder, which has the
repository's docs and an empty out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

__all__ = ["DOCUMENT", "EVENTS", "Step", "run_section", "sections", "with_outputs"]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "seed.md"
EVENTS = 'events() { refault report "$@" | tail -n +2 | cut -c50-; }'
"""What the document says `events` is."""
_INDENT = "    "


class Step(NamedTuple):
    """A command and the output that the document gives for it."""

    command: str
    output: tuple[str, ...]


def sections(text: str) -> dict[str, list[Step]]:
    """Title -> the steps of the section's sessions, in order."""
    found: dict[str, list[Step]] = {}
    title = ""
    inside = False
    for line in text.splitlines():
        if line.startswith("## "):
            title, inside = line[3:], False
            found[title] = []
        elif line.startswith(_INDENT + "$ "):
            inside = True
            found[title].append(Step(line[len(_INDENT) + 2 :], ()))
        elif inside and line.startswith(_INDENT):
            step = found[title][-1]
            found[title][-1] = step._replace(output=(*step.output, line[len(_INDENT) :]))
        elif line.strip():
            inside = False
    return found


def run_section(steps: list[Step]) -> list[list[str]]:
    """The real output of each step, line by line."""
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "100", "PYTHON": sys.executable,
    }
    shell = 'refault() { "$PYTHON" -m refault "$@"; }; python() { "$PYTHON" "$@"; }; ' + EVENTS + "; "
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "docs").symlink_to(ROOT / "docs")
        (Path(folder) / "out").mkdir()
        for step in steps:
            done = subprocess.run(
                ["bash", "-c", shell + step.command], cwd=folder, env=env, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, timeout=300, check=False,
            )
            outputs.append([line.rstrip() for line in done.stdout.splitlines()])
    return outputs


def with_outputs(text: str, outputs: dict[str, list[list[str]]]) -> str:
    """The document with these outputs instead of those in it."""
    lines: list[str] = []
    title = ""
    number = 0
    skipping = False
    for line in text.splitlines():
        if line.startswith("## "):
            title, number, skipping = line[3:], 0, False
        if line.startswith(_INDENT + "$ "):
            lines.append(line)
            lines += [(_INDENT + out).rstrip() for out in outputs[title][number]]
            number += 1
            skipping = True
            continue
        if skipping and (line.startswith(_INDENT) or not line.strip()):
            if not line.strip():
                lines.append("")
            continue
        if skipping:
            skipping = False
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


if __name__ == "__main__":
    written = DOCUMENT.read_text()
    wanted = sys.argv[1:]
    given = sections(written)
    made = {
        title: run_section(steps) if not wanted or any(w in title for w in wanted)
        else [list(step.output) for step in steps]
        for title, steps in given.items()
    }
    DOCUMENT.write_text(with_outputs(written, made))

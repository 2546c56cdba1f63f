"""How the commands print: NDJSON on request, paragraphs in the terminal's width."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any

import msgspec

__all__ = ["add_json_flag", "columns", "print_json", "wrapped"]


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """`--json`, the same on every verb."""
    parser.add_argument("--json", action="store_true", help="NDJSON on stdout: one object a line")


def print_json(value: Any) -> None:
    """One value as one line of JSON."""
    print(msgspec.json.encode(value).decode())


def columns() -> int:
    """The width to write prose in."""
    return max(40, min(shutil.get_terminal_size((100, 24)).columns, 110))


def wrapped(text: str, *, indent: int = 0) -> str:
    """`text` as a paragraph of the terminal's width."""
    space = " " * indent
    return textwrap.fill(
        text,
        columns(),
        initial_indent=space,
        subsequent_indent=space,
        break_long_words=False,
        break_on_hyphens=False,
    )

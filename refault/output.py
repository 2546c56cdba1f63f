"""How the commands print: NDJSON on request, paragraphs in the terminal's width."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["add_json_flag", "columns", "print_json", "wrapped", "write_whole"]


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """`--json`, the same on every verb."""
    parser.add_argument("--json", action="store_true", help="NDJSON on stdout: one object a line")


def print_json(value: Any) -> None:
    """One value as one line of JSON."""
    print(msgspec.json.encode(value).decode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all; a device takes the bytes as they come."""
    in_place = path.exists() and not path.is_file()
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if in_place:
            path.write_bytes(data)
        else:
            temporary.write_bytes(data)
            os.replace(temporary, target)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise OSError(exc.errno, exc.strerror, str(path)) from None


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

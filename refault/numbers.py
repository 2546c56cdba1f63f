"""Numbers and sizes as people type them."""

from __future__ import annotations

import argparse
import re

__all__ = ["number", "size"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def number(text: str) -> int:
    """`42`, `0x2a`, `1_000`."""
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return value


def size(text: str) -> int:
    """Bytes: `64M`, `1GiB`, `4096`; a multiple of 4 KiB greater than 0."""
    found = re.fullmatch(r"([0-9]+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 24M, 1G or a number of bytes")
    value = int(found[1]) * _UNITS[found[2].upper()]
    if value == 0 or value % 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive multiple of 4 KiB")
    return value

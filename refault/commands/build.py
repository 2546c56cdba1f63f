"""Assemble a guest payload, by name or from FILE.s, into a Multiboot image that refault and QEMU
(-kernel) run."""

from __future__ import annotations

import argparse
import sys

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("payload", help="see refault list payloads, or a .s file")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where to write it (default: NAME.elf; - is stdout)"
    )


def main(args: argparse.Namespace) -> int:
    """Build."""
    from pathlib import Path

    from guest_payloads.builder import build
    from refault.output import write_whole

    image = build(args.payload)
    if args.output == "-":
        sys.stdout.buffer.write(image)
        return 0
    path = Path(args.output or f"{Path(args.payload).stem}.elf")
    write_whole(path, image)
    print(f"{path}: {len(image)} bytes", file=sys.stderr)
    return 0

"""What is not modelled, module by module, as the modules themselves say it."""

from __future__ import annotations

import argparse
import sys

from refault.output import add_json_flag, print_json, wrapped

__all__ = ["configure", "main"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("package", nargs="?", default="", help="only this package or module, e.g. host_mm")
    add_json_flag(parser)


def main(args: argparse.Namespace) -> int:
    """Print the gaps."""
    from refault.errors import UsageError
    from refault.registry import gaps

    found = [gap for gap in gaps() if f"{gap.module}.".startswith(f"{args.package}." if args.package else "")]
    if not found:
        raise UsageError(f"no module {args.package!r} with a list of what it does not model")
    for gap in found:
        if args.json:
            print_json({"module": gap.module, "not_modelled": gap.text})
        else:
            print(gap.module)
            print(wrapped(gap.text, indent=4))
    if not args.json:
        print(f"{len(found)} modules say what they leave out", file=sys.stderr)
    return 0

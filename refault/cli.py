"""The `refault` command: finds the verb, imports only its module, and turns errors into exit codes.

A verb is a module of `refault.commands` with `configure(parser)` and `main(args) -> int`. Data goes
to stdout, talk to stderr; an error is one line on stderr and never a traceback, unless
REFAULT_TRACEBACK is set.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["VERBS", "main"]

LONGEST_TEXT = 400
"""Characters of an error: some quote what a file holds."""

VERBS: dict[str, str] = {
    "run": "run a guest on a host that swaps, migrates and copies behind its back",
    "report": "print a trace as trace-cmd report does",
    "stat": "VM exits of a trace in the table of perf kvm stat report; KVM's own statistics of a run",
    "explain": "why an event happened: back to the host operation, forward to the refault",
    "walk": "translate an address through both stages at some point of a trace",
    "diff": "the first place where two traces part",
    "check": "run a recorded trace again and compare",
    "compare": "a scenario here beside what a real kernel did",
    "build": "assemble a guest payload into an image that refault and QEMU run",
    "list": "payloads, host operations, events, scenarios, switches, parameters",
    "gaps": "what is not modelled",
}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments and exit with 2."""
        from refault.errors import EXIT_USAGE

        first = message.splitlines()[0] if message else "bad arguments"
        self.exit(EXIT_USAGE, f"{self.prog}: {first} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _dispatch(arguments)
        finally:
            # A closed pipe must show here, not in the interpreter's own flush after us.
            sys.stdout.flush()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0
    except BrokenPipeError:
        # The reader has seen enough, as with `refault report | head`.
        _drop_stdout()
        return 0
    except BaseException as exc:
        if isinstance(exc, OSError) and exc.filename is None:
            _drop_stdout()
        return _fail(exc)


def _drop_stdout() -> None:
    # What could not be written would be tried again, and complained of, when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0 if arguments else 2
    if verb in ("-V", "--version"):
        import refault

        print(f"refault {refault.__version__}")
        return 0
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; see refault --help"
        print(f"refault: no command {verb!r}{hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"refault.commands.{verb}")
    parser = Parser(
        prog=f"refault {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.configure(parser)
    code: int = module.main(parser.parse_args(arguments[1:]))
    return code


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [
        "usage: refault COMMAND [ARGUMENTS]   (refault COMMAND --help tells more)",
        "",
        *(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()),
        "",
        "exit codes: 0 ok, 1 a check, a diff or the guest failed, 2 usage or input, 3 the guest died",
        "or met a limit, 4 the model broke one of its truths, 77 skipped, 130 interrupted",
    ]
    return "\n".join(lines) + "\n"


def _fail(error: BaseException) -> int:
    from refault.errors import EXIT_BROKEN, EXIT_INTERRUPTED, WRITE_ERRORS, exit_code_of

    if os.environ.get("REFAULT_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    code = exit_code_of(error)
    if code == EXIT_INTERRUPTED:
        print("refault: interrupted", file=sys.stderr)
        return code
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        text = f"cannot write: {error.strerror}"
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} ..."
    if code is None:
        code = EXIT_BROKEN
        text = f"a bug in refault: {type(error).__name__}: {text} (set REFAULT_TRACEBACK=1 to see where)"
    elif code == EXIT_BROKEN:
        text = f"a truth of the model is broken: {text}"
    print(f"refault: {text}", file=sys.stderr)
    return code

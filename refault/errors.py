"""How the command ends: exit codes, and the errors that carry one.

Any exception may carry an `exit_code`; `exit_code_of` knows the rest. Every such error is one line.
"""

from __future__ import annotations

import errno
import sys

from host_mm.kernel.errors import BrokenTruth, KernelError, OutOfMemory

__all__ = [
    "EXIT_BROKEN",
    "EXIT_DIED",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_SKIPPED",
    "EXIT_USAGE",
    "WRITE_ERRORS",
    "UsageError",
    "exit_code_of",
]

EXIT_OK = 0
"""All well."""
EXIT_FAILED = 1
"""A check failed, two traces differ, or the guest reported FAIL."""
EXIT_USAGE = 2
"""The arguments or an input are wrong."""
EXIT_DIED = 3
"""The guest died or met a limit."""
EXIT_BROKEN = 4
"""The model broke one of its truths, or refault has a bug."""
EXIT_SKIPPED = 77
"""Everything asked for was skipped."""
EXIT_INTERRUPTED = 130
"""Ctrl-C."""


# Errors about an input, by where they are declared: rooms below do not know exit codes, and none of
# these modules may be imported just because something else failed.
INPUT_ERRORS = (
    ("emu.cpu.memory", "GuestNotSupported"),
    ("emu.loaders.image", "LoaderError"),
    ("guest_payloads.builder", "PayloadError"),
    ("guest_payloads.preprocess", "AssemblyError"),
)


WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a write may meet that no argument check foresees."""


class UsageError(Exception):
    """What was asked for cannot be done as asked; the text says what to do instead, in one line."""

    exit_code = EXIT_USAGE


def exit_code_of(error: BaseException) -> int | None:
    """The exit code an error stands for, or None where it is a bug of refault."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenTruth):
        return EXIT_BROKEN
    if isinstance(error, OutOfMemory):
        return EXIT_DIED
    if isinstance(error, KernelError):
        return EXIT_USAGE
    if isinstance(error, OSError) and (error.filename is not None or error.errno in WRITE_ERRORS):
        return EXIT_USAGE
    for module, name in INPUT_ERRORS:
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], name)):
            return EXIT_USAGE
    return None

"""The user's own Python: host scripts and scenarios. What is wrong with it is told in one line."""

from __future__ import annotations

from traceback import walk_tb
from typing import Any

from refault.errors import UsageError

__all__ = ["execute", "user_error"]


def user_error(name: str, error: BaseException) -> UsageError:
    """The error with the last line of the user's file that led to it."""
    # A SyntaxError names its line itself.
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == name]
    place = f"{name}, line {lines[-1]}" if lines else name
    return UsageError(f"{place}: {type(error).__name__}: {error}")


def execute(name: str, text: str, module: str) -> dict[str, Any]:
    """Run a file's text as module `module`; its names. UsageError."""
    scope: dict[str, Any] = {"__name__": module}
    try:
        exec(compile(text, name, "exec"), scope)
    except (Exception, SystemExit) as exc:
        raise user_error(name, exc) from None
    return scope

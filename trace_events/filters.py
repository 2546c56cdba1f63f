"""Which events somebody wants: globs over `system:name`.

A glob without a colon matches the event's name in any system; `kvm` alone, without any glob
character, also matches a whole system, as `trace-cmd record -e kvm` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

__all__ = ["compile_globs"]


def compile_globs(globs: Iterable[str]) -> Callable[[str], bool]:
    """A predicate over full event names. No globs match nothing; a glob may be a comma list."""
    patterns: list[str] = []
    for glob in globs:
        for part in glob.split(","):
            part = part.strip()
            if not part:
                continue
            if ":" in part:
                patterns.append(part)
            else:
                patterns.append(f"*:{part}")
                patterns.append(f"{part}:*")

    def match(full_name: str) -> bool:
        return any(fnmatchcase(full_name, p) for p in patterns)

    return match

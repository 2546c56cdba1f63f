"""What exists in this copy of refault, found in its sources without importing them.

Tracepoints are declared beside the code that fires them, so that printing one trace would import
the whole machine. The index here is read from the sources' text, and only the modules are imported
whose events are asked for.

Not modelled: packages that a user adds; only our own are searched.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import msgspec

from refault.errors import UsageError
from trace_events.filters import compile_globs
from trace_events.tracepoint import Tracepoint

__all__ = [
    "PACKAGES",
    "Gap",
    "all_tracepoints",
    "check_globs",
    "find_tracepoint",
    "gaps",
    "modules",
    "profiles",
    "switches",
    "tracepoint_index",
]

PACKAGES = ("trace_events", "host_mm", "kvm_model", "emu", "refault", "guest_payloads")

_DECLARATION = re.compile(r'\bTracepoint\(\s*"(\w+)",\s*"(\w+)"')
_TRACEPOINTS = re.compile(r"^TRACEPOINTS\b.*=", re.MULTILINE)


class Gap(msgspec.Struct, frozen=True):
    """One module's "Not modelled:" paragraph, as one line."""

    module: str
    text: str


@cache
def modules() -> tuple[tuple[str, Path], ...]:
    """Every module of ours with its file, sorted within each package, ground floor first."""
    found: list[tuple[str, Path]] = []
    for package in PACKAGES:
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            root = Path(place)
            for path in sorted(root.rglob("*.py")):
                parts = (package, *path.relative_to(root).with_suffix("").parts)
                found.append((".".join(parts).removesuffix(".__init__"), path))
    return tuple(found)


@cache
def _declaring() -> tuple[tuple[str, str], ...]:
    """(module, source text) of the modules that declare tracepoints."""
    texts = ((module, path.read_text(encoding="utf-8")) for module, path in modules())
    return tuple((module, text) for module, text in texts if _TRACEPOINTS.search(text))


@cache
def tracepoint_index() -> dict[str, str]:
    """Full event name -> the module that declares it."""
    return {
        f"{system}:{name}": module
        for module, text in _declaring()
        for system, name in _DECLARATION.findall(text)
    }


def _import_tracepoints(module: str) -> dict[str, Tracepoint]:
    return {tp.full_name: tp for tp in importlib.import_module(module).TRACEPOINTS}


@cache
def find_tracepoint(full_name: str) -> Tracepoint | None:
    """The tracepoint of that name, or None; imports only the module that declares it."""
    module = tracepoint_index().get(full_name)
    if module is not None:
        return _import_tracepoints(module).get(full_name)
    # Declared by way of a helper function, or not ours: the modules that the index says nothing of.
    indexed = set(tracepoint_index().values())
    for other, _ in _declaring():
        if other not in indexed and full_name in (found := _import_tracepoints(other)):
            return found[full_name]
    return None


def all_tracepoints() -> list[Tracepoint]:
    """Every tracepoint that can fire, by name. Imports the modules that declare them."""
    found: dict[str, Tracepoint] = {}
    for module, _ in _declaring():
        found.update(_import_tracepoints(module))
    return [found[name] for name in sorted(found)]


def check_globs(globs: Iterable[str], names: Iterable[str] = ()) -> None:
    """UsageError for a glob that matches no event that can fire, and none of `names`."""
    from difflib import get_close_matches

    here = set(names)
    for part in (part.strip() for glob in globs for part in glob.split(",")):
        if part in ("*", "*:*") or any(map(compile_globs([part]), here)):
            continue
        known = [tracepoint.full_name for tracepoint in all_tracepoints()]
        if not any(map(compile_globs([part]), known)):
            near = get_close_matches(part, [*known, *(name.partition(":")[2] for name in known)], 1)
            hint = f"did you mean {near[0]!r}?" if near else "see refault list events"
            raise UsageError(f"no event matches {part!r}; {hint}")


def gaps() -> list[Gap]:
    """The "Not modelled:" paragraph of every module docstring that has one."""
    found: list[Gap] = []
    for module, path in modules():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for paragraph in doc.split("\n\n"):
            head, marker, text = " ".join(paragraph.split()).partition("Not modelled:")
            if marker and not head:
                found.append(Gap(module, text.strip()))
    return found


def switches() -> dict[str, str]:
    """Every protocol switch that `--break` takes, with what it leaves out."""
    from host_mm.breaks import BREAKS as HOST_BREAKS
    from kvm_model.breaks import BREAKS as KVM_BREAKS

    return dict(sorted({**HOST_BREAKS, **KVM_BREAKS}.items()))


def profiles() -> list[str]:
    """The kernel generations that both models know, the default first."""
    import host_mm.profile
    import kvm_model.profile

    return [name for name in host_mm.profile.PROFILES if name in kvm_model.profile.PROFILES]

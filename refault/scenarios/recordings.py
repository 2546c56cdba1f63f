"""The recordings of the real kernel, as package data."""

from __future__ import annotations

from importlib.resources import files

from refault.scenarios.normal import Recording, parse_recording

__all__ = ["recorded_names", "recording"]


def _folder(kernel: str):  # type: ignore[no-untyped-def]
    return files("refault.scenarios") / "recorded" / kernel


def recorded_names(kernel: str = "linux-6.18") -> list[str]:
    """The scenarios that were recorded on `kernel`."""
    names = (entry.name for entry in _folder(kernel).iterdir())
    return sorted(name.removesuffix(".txt") for name in names if name.endswith(".txt"))


def recording(name: str, kernel: str = "linux-6.18") -> Recording:
    """One recording. Raises FileNotFoundError."""
    return parse_recording((_folder(kernel) / f"{name}.txt").read_text())

"""What is measured, and how it is told."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

__all__ = ["TARGETS", "Group", "Measure", "Target", "misses", "print_report", "read_targets"]

TARGETS = Path(__file__).with_name("targets.toml")


class Measure(msgspec.Struct, frozen=True):
    """One number: its name, its unit ("" for a ratio) and what it says."""

    name: str
    unit: str
    doc: str
    higher_is_better: bool = False


class Group(msgspec.Struct, frozen=True):
    """Numbers that are taken together: `run()` gives all of `measures` by name."""

    name: str
    measures: tuple[Measure, ...]
    run: Callable[[], dict[str, float]]

    def better(self, a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
        """The better of two runs, number by number."""
        return {
            m.name: (max if m.higher_is_better else min)(a[m.name], b[m.name]) for m in self.measures
        }


class Target(msgspec.Struct, frozen=True):
    """What a number must be."""

    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether `value` is good enough."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


def read_targets(path: Path = TARGETS) -> dict[str, Target]:
    """The targets by measure; msgspec.ValidationError if the file is not one."""
    return msgspec.convert(tomllib.loads(path.read_text()), dict[str, Target])


def misses(values: dict[str, float], targets: dict[str, Target]) -> list[str]:
    """The measures among `values` that miss their target."""
    return [name for name, value in values.items() if name in targets and not targets[name].holds(value)]


def print_report(groups: list[Group], values: dict[str, float], targets: dict[str, Target]) -> None:
    """A table, and all numbers as one line of JSON."""
    table = Table(box=None, pad_edge=False)
    for heading in ("measure", "value", "", "target", ""):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for group in groups:
        for measure in group.measures:
            value = values[measure.name]
            target = targets.get(measure.name)
            colour = "" if target is None else "green" if target.holds(value) else "red"
            shown = f"{value:,.3g}" if colour or value < 1000 else f"{value:,.0f}"
            if colour:
                shown = f"[{colour}]{shown}[/]"
            table.add_row(measure.name, shown, measure.unit, str(target or ""), measure.doc)
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(table)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in values.items()}))

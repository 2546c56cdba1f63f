"""Whether a scenario did the same on two machines: equal, explained or different."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import SequenceMatcher

import msgspec

from refault.scenarios.explained import Difference, Explanation, differences, explain, in_their_order
from refault.scenarios.invariants import INVARIANTS
from refault.scenarios.normal import Recording, host_side

__all__ = ["COMPARED_STATS", "Comparison", "compare"]

COMPARED_STATS = (
    "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "mmu_unsync", "mmu_shadow_zapped", "pages_4k",
    "pages_2m",
)
"""The statistics that repeat."""

_FRAME = re.compile(r"\bP\d+\b")
_SLOT0 = re.compile(r"kvm_mmu_(?:set_spte|spte_requested): gfn 1?[0-9a-f]{1,2} |kvm_\w+ \[D\+0x[ab]\w{5}\.\.")


class Comparison(msgspec.Struct, frozen=True):
    """The two sequences as they were compared, and what was found.

    `unneeded`: explanations that explain nothing; `broken`: invariants that do not hold, of scenarios that
    are compared by those.
    """

    scenario: str
    ours: list[str]
    theirs: list[str]
    excused: list[tuple[Difference, Explanation]]
    unexplained: list[Difference]
    unneeded: list[Explanation]
    broken: list[str]

    @property
    def verdict(self) -> str:
        """equal, explained or different."""
        if self.unexplained or self.unneeded or self.broken:
            return "different"
        return "explained" if self.excused else "equal"


def compare(
    name: str, ours: Recording, theirs: Recording, *, repeats: str = "exactly", whole: bool = True,
    stats: bool = True,
) -> Comparison:
    """Compare two runs of the scenario `name`.

    `repeats` says what a real machine repeats: "exactly"; "but for frames", whose numbers are then masked;
    "but for slot 0", whose lines are then left out; "by chance", where only invariants are asked.
    `whole`: with KVM's own lines, not the host's alone; `stats`: with the statistics.
    """
    mine, other = _prepared(ours, repeats, whole), _prepared(theirs, repeats, whole)
    if repeats == "by chance":
        return Comparison(name, mine, other, [], [], [], _broken(name, mine, other))
    if whole and stats and repeats != "but for slot 0":
        mine, other = _with_stats(mine, ours, theirs), _with_stats(other, theirs, ours)
    renamed, moved = in_their_order(_same_names(mine, other, ours.freed), other)
    excused, unexplained, unneeded = explain(name, differences(renamed, other))
    return Comparison(name, mine, other, [*moved, *excused], unexplained, unneeded if whole else [], [])


def _prepared(recording: Recording, repeats: str, whole: bool) -> list[str]:
    lines = recording.lines if whole else host_side(recording.lines)
    if repeats == "but for frames":
        return [_FRAME.sub("P", line) for line in lines]
    if repeats == "but for slot 0":
        return _renumbered([line for line in lines if not _SLOT0.match(line)])
    return list(lines)


def _renumbered(lines: list[str]) -> list[str]:
    """Frames numbered anew, where lines that named some are gone."""
    frames: dict[str, str] = {}
    return [_FRAME.sub(lambda m: frames.setdefault(m[0], f"P{len(frames)}"), line) for line in lines]


class _Names:
    """Which frame of theirs each of ours is, by where both were named."""

    def __init__(self, freed: dict[str, int]) -> None:
        self._freed = freed
        self._theirs: dict[str, str] = {}
        self._ours: dict[str, str] = {}

    def of(self, mine: str, other: str, at: int) -> str:
        """What our frame is called in line `at`, in whose place they name `other`, or nothing."""
        if not other:
            return self._theirs.get(mine, f"{mine}'")
        known = self._ours.get(other)
        if mine not in self._theirs and (known is None or self._freed.get(known, at + 1) <= at):
            self._bind(mine, other)
        name = self._theirs.get(mine, f"{mine}'")
        # A difference is told once; from here on it is the frame in that place.
        self._bind(mine, other)
        return name

    def _bind(self, mine: str, other: str) -> None:
        self._theirs[mine] = other
        self._ours[other] = mine


def _same_names(ours: list[str], theirs: list[str], freed: dict[str, int]) -> list[str]:
    """Our lines with the other side's names of frames.

    What a line says is whether its frame is one that was seen before, and which. So each of our frames bears
    the name of the one that stood in its place, from where that place names a new one.
    Without this a frame more or less would make every line behind it differ.

    A frame that was freed may be handed out again, and is another one then. A real machine's names cannot
    tell, so a fresh frame of ours may stand where theirs is one of which we know that it was freed before.
    """
    masked, other_masked = ([_FRAME.sub("P", line) for line in lines] for lines in (ours, theirs))
    found, names = list(ours), _Names(freed)
    opcodes = SequenceMatcher(None, masked, other_masked, autojunk=False).get_opcodes()
    for tag, a1, a2, b1, _ in opcodes:
        for n in range(a1, a2):
            mine = _FRAME.search(ours[n])
            if mine is not None:
                other = _FRAME.search(theirs[b1 + n - a1]) if tag == "equal" else None
                name = names.of(mine[0], other[0] if other else "", n)
                found[n] = _FRAME.sub(name, ours[n], count=1)
    return found


def _with_stats(lines: list[str], recording: Recording, other: Recording) -> list[str]:
    if not recording.stats or not other.stats:
        return lines
    return [*lines, *(f"stats {name}: {recording.stats.get(name, 0)}" for name in COMPARED_STATS)]


Invariant = Callable[[list[str]], str]


def _broken(name: str, ours: list[str], theirs: list[str]) -> list[str]:
    found: list[str] = []
    for side, lines in (("here", ours), ("there", theirs)):
        for invariant in INVARIANTS[name]:
            why = invariant(lines)
            if why:
                found.append(f"{side}: {why}")
    return found

"""Why a scenario here may differ from what was recorded: typed records, each of which must match exactly.

A record excuses one line that one side has and the other has not, or one field of a line that both have. It
names the kernel function, or the quirk of the module that the recordings were made with. A record that
matched nothing is a difference itself: what is no longer needed must go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

import msgspec

__all__ = ["EXPLANATIONS", "QUIRKS", "Difference", "Explanation", "differences", "explain"]


class Explanation(msgspec.Struct, frozen=True):
    """One excused difference.

    `step`: the title of the step, or its beginning up to `*`. `event`: the event that differs, `walk`, a
    mark's `<<`, or `stats`. `field`: the field that differs; `line` where only one side has the event.
    `ours`, `theirs`: the field's values, or the lines, "" for none. `because`: the function or the quirk.
    `times`: how often it must happen; 0: as often as it does.
    """

    scenario: str
    step: str
    event: str
    field: str
    ours: str
    theirs: str
    because: str
    times: int = 1


class Difference(msgspec.Struct, frozen=True):
    """A line of either side without its like on the other; "" for none."""

    step: str
    ours: str
    theirs: str

    @property
    def event(self) -> str:
        """The event's name."""
        return (self.ours or self.theirs).split(" ", 1)[0].rstrip(":")

    def fields(self) -> list[tuple[str, str, str]]:
        """(field, ours, theirs) of what differs."""
        if not self.ours or not self.theirs:
            return [("line", self.ours, self.theirs)]
        mine, other = _fields(self.ours), _fields(self.theirs)
        if mine.keys() != other.keys() or mine["event"] != other["event"]:
            return [("line", self.ours, self.theirs)]
        found = [(name, mine[name], other[name]) for name in mine if mine[name] != other[name]]
        # The letters say again what some of the low bits mean, but for the right to execute.
        if "low" in (one[0] for one in found) and mine["rights"][2] == other["rights"][2]:
            found = [one for one in found if one[0] != "rights"]
        return found


_CLFLUSH = (
    "CLFLUSH faults as a load (SDM vol. 2A); Unicorn's translator (gen_lea_modrm) computes its address and "
    "accesses nothing"
)

EXPLANATIONS: tuple[Explanation, ...] = (
    *(
        Explanation(
            "guest_rmw_faults", "guest clflush D+0xd0000 unpopulated", line.split(" ")[0].rstrip(":"), "line",
            "", line, _CLFLUSH,
        )
        for line in (
            "walk addr 100d0000 pferr 4 U", "kvm_mmu_spte_requested: gfn 100d0 pfn P1 level 1",
            "kvm_mmu_set_spte: gfn 100d0 spte P1|825 (r-xu) level 1",
        )
    ),
)

QUIRKS: tuple[Explanation, ...] = (
    *(
        Explanation(
            "*", "guest fetch *", "walk", "line", "", f"walk addr * pferr {pferr}",
            "kvm_pvm emulates `out` (kvm_emulate_instruction): its decoder reads the instruction through "
            "gva_to_gpa, which walks the guest's tables; hardware reports the port in the exit",
            times=0,
        )
        for pferr in ("4 U", "14 U|F")
    ),
)
"""Of every scenario that meets them."""

_SPTE = re.compile(
    r"(?P<event>kvm_mmu_set_spte): gfn (?P<gfn>\w+) spte (?P<pfn>[\w']+)\|(?P<low>\w+) \((?P<rights>.*)\) "
    r"level (?P<level>\d+)"
)
_REQUESTED = re.compile(
    r"(?P<event>kvm_mmu_spte_requested): gfn (?P<gfn>\w+) pfn (?P<pfn>[\w']+) level (?P<level>\d+)"
)
_WALK = re.compile(r"(?P<event>walk) addr (?P<addr>\w+) pferr (?P<pferr>.*)")
_RANGE = re.compile(r"(?P<event>kvm_\w+) \[(?P<range>.*)\]")
_RESULT = re.compile(r"(?P<event><<) (?P<title>.*): (?P<result>.*)")
_STATS = re.compile(r"(?P<event>stats) (?P<name>\w+): (?P<count>-?\d+)")
_OTHER = re.compile(r"(?P<event>\S+) (?P<text>.*)")
_SHAPES = (_SPTE, _REQUESTED, _WALK, _RANGE, _RESULT, _STATS, _OTHER)


def _fields(line: str) -> dict[str, str]:
    for shape in _SHAPES:
        found = shape.fullmatch(line)
        if found is not None:
            return found.groupdict()
    return {"event": line}


def differences(ours: list[str], theirs: list[str]) -> list[Difference]:
    """Where two sequences differ, line by line, with the step that each difference is in."""
    steps = _steps(ours)
    found: list[Difference] = []
    for tag, a1, a2, b1, b2 in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        left, right = ours[a1:a2], theirs[b1:b2]
        paired = len(left) == len(right)
        for n in range(len(left) if paired else 0):
            found.append(Difference(steps[a1 + n], left[n], right[n]))
        if not paired:
            step = steps[a1] if a1 < len(steps) else steps[-1] if steps else ""
            found += [Difference(steps[a1 + n], line, "") for n, line in enumerate(left)]
            found += [Difference(step, "", line) for line in right]
    return found


def _steps(lines: list[str]) -> list[str]:
    """The title of the step that each line is in; a step's end is in it."""
    title, titles = "", []
    for line in lines:
        if line.startswith(">> "):
            title = line[3:]
        titles.append(title)
    return titles


def explain(
    scenario: str, found: Iterable[Difference], records: Iterable[Explanation] | None = None
) -> tuple[list[tuple[Difference, Explanation]], list[Difference], list[Explanation]]:
    """(differences with the record that excuses each, differences without one, records not needed)."""
    if records is None:
        records = (*EXPLANATIONS, *QUIRKS)
    mine = [record for record in records if record.scenario in (scenario, "*")]
    left = {id(record): record.times for record in mine}
    excused: list[tuple[Difference, Explanation]] = []
    open_: list[Difference] = []
    for difference in found:
        record = next((r for r in mine if (not r.times or left[id(r)]) and _matches(r, difference)), None)
        if record is None:
            open_.append(difference)
            continue
        left[id(record)] -= 1
        excused.append((difference, record))
    return excused, open_, [record for record in mine if record.times and left[id(record)]]


def _matches(record: Explanation, difference: Difference) -> bool:
    fields = difference.fields()
    if len(fields) != 1 or record.event != difference.event or not _like(record.step, difference.step):
        return False
    name, ours, theirs = fields[0]
    return name == record.field and _like(record.ours, ours) and _like(record.theirs, theirs)


def _like(pattern: str, text: str) -> bool:
    parts = map(re.escape, pattern.split("*"))
    return re.fullmatch("[^\n]*".join(parts), text) is not None

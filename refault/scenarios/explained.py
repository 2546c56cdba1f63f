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

__all__ = [
    "EXPLANATIONS", "OUT_OF_ORDER", "QUIRKS", "Difference", "Explanation", "differences", "explain",
    "in_their_order",
]


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

OUT_OF_ORDER = Explanation(
    "*", "*", "kvm_mmu_zap_all_fast", "order", "", "",
    "the recordings' kernel zaps an obsolete root without its unsync children, which come in their turn, the "
    "oldest page first; mmu_zap_unsync_children of Linux 6.18 has them right behind the root",
    times=0,
)
"""Behind this event. The same pages must be zapped, and those that are in sync in the same order."""
_ZAPS = ("kvm_mmu_prepare_zap_page: ", "kvm_mmu_sync_page: ")

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
    Explanation(
        "*", "guest *", "kvm_mmu_walker_error", "line", "", "kvm_mmu_walker_error: pferr 0",
        "kvm_pvm delivers exceptions itself and reads the IDT through the guest's tables, for #PF and then "
        "for #DF; where they do not map it, each read is a walk that fails",
        times=0,
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


def in_their_order(
    ours: list[str], theirs: list[str]
) -> tuple[list[str], list[tuple[Difference, Explanation]]]:
    """Our lines with unsync pages zapped where theirs are, as OUT_OF_ORDER has it, and where that was."""
    mine, other = _zap_blocks(ours), _zap_blocks(theirs)
    found, moved, steps = list(ours), [], _steps(ours)
    for (first, last), (begin, end) in zip(mine, other, strict=False) if len(mine) == len(other) else ():
        left, right = ours[first:last], theirs[begin:end]
        if left != right and sorted(left) == sorted(right) and _in_sync(left) == _in_sync(right):
            found[first:last] = right
            at = next(n for n, line in enumerate(left) if line != right[n])
            moved.append((Difference(steps[first], left[at], right[at]), OUT_OF_ORDER))
    return found, moved


def _zap_blocks(lines: list[str]) -> list[tuple[int, int]]:
    """Where the zaps behind each event of OUT_OF_ORDER begin and end."""
    blocks: list[tuple[int, int]] = []
    for first, line in enumerate(lines, 1):
        if line.startswith(f"{OUT_OF_ORDER.event}: "):
            last = first
            while last < len(lines) and lines[last].startswith(_ZAPS):
                last += 1
            blocks.append((first, last))
    return blocks


def _in_sync(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.endswith(" unsync")]


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

"""What holds in every run of a scenario that chance is in.

An invariant takes the normalised lines and answers what is wrong, or nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

__all__ = ["INVARIANTS"]

_RANGE = re.compile(r"(kvm_\w+) \[D\+0x([0-9a-f]+)\.\.D\+0x([0-9a-f]+)\]")
_SPTE = re.compile(r"kvm_mmu_set_spte: gfn ([0-9a-f]+) spte P\d+\|([0-9a-f]+) ")
_WALK = re.compile(r"walk addr ([0-9a-f]+) ")
_PAGE = 4096
_DATA_GFN = 0x10000


def _ranges(lines: list[str], event: str) -> Iterator[tuple[int, int, int]]:
    """(line number, first, last) of each range of an event."""
    for at, line in enumerate(lines):
        found = _RANGE.match(line)
        if found is not None and found[1] == event:
            yield at, int(found[2], 16), int(found[3], 16)


def _mapped(lines: list[str]) -> Iterator[tuple[int, int]]:
    """(line number, offset of the page) of each SPTE."""
    for at, line in enumerate(lines):
        found = _SPTE.match(line)
        if found is not None:
            yield at, int(found[1], 16) - _DATA_GFN << 12


# -- race: a loop of stores against madvise(DONTNEED) of another thread -----------------------------


def _race_unmaps_one_page(lines: list[str]) -> str:
    for _, first, last in _ranges(lines, "kvm_unmap_hva_range"):
        if (first, last) != (0x3000, 0x4000):
            return f"a range of another page was unmapped: {first:#x}..{last:#x}"
    return ""


def _race_faults_only_what_was_unmapped(lines: list[str]) -> str:
    """Each page faults once, and the one that is taken away once more for each time, at most."""
    unmapped = sum(1 for _ in _ranges(lines, "kvm_unmap_hva_range"))
    if not unmapped:
        return "nothing was unmapped"
    walks = [int(m[1], 16) & 0xFFFFF for line in lines if (m := _WALK.match(line))]
    if any(at & ~0xFFF not in (0x3000, 0x4000) for at in walks):
        return "another page faulted"
    if walks.count(0x4000) != 1:
        return f"the page that nobody takes away faulted {walks.count(0x4000)} times"
    if not unmapped // 2 <= walks.count(0x3000) <= unmapped + 1:
        return f"{walks.count(0x3000)} faults after {unmapped} times DONTNEED"
    return ""


def _race_never_two_mappings_between_unmaps(lines: list[str]) -> str:
    mapped = False
    for line in lines:
        if line.startswith("kvm_unmap_hva_range"):
            mapped = False
        elif line.startswith("kvm_mmu_set_spte: gfn 10003 "):
            if mapped:
                return "the page was mapped twice without being unmapped"
            mapped = True
    return ""


def _race_each_mapping_is_a_fresh_frame(lines: list[str]) -> str:
    found = re.findall(r"kvm_mmu_set_spte: gfn 10003 spte (P\d+)\|(\w+)", "\n".join(lines))
    if any(low != "e67" for _, low in found):
        return "a store mapped the page without the right to write"
    if any(one == other for (one, _), (other, _) in itertools.pairwise(found)):
        return "DONTNEED, and the same frame again"
    return ""


# -- memcg_age: reclaim in the group of the process ------------------------------------------------


def _in_limit_steps(lines: list[str]) -> list[str]:
    inside, found = False, []
    for line in lines:
        if line.startswith((">> ", "<< ")):
            inside = line.startswith(">> limit")
        elif inside:
            found.append(line)
    return found


def _age_is_by_page(lines: list[str]) -> str:
    for event in ("kvm_age_hva", "kvm_unmap_hva_range"):
        for _, first, last in _ranges(_in_limit_steps(lines), event):
            if last - first != _PAGE:
                return f"{event} of {first:#x}..{last:#x}, not of a page"
    return ""


def _age_comes_before_unmap(lines: list[str]) -> str:
    aged: set[int] = set()
    inside = _in_limit_steps(lines)
    for line in inside:
        found = _RANGE.match(line)
        if found is None:
            continue
        first = int(found[2], 16)
        if found[1] == "kvm_age_hva":
            aged.add(first)
        elif first not in aged:
            return f"D+{first:#x} was reclaimed and never asked about"
    return "" if aged else "no page was aged"


def _first_faults_map_their_group(lines: list[str]) -> str:
    """The host wrote all of D before, so that each of the first two faults maps the aligned eight."""
    end = next((at for at, line in enumerate(lines) if line.startswith(">> limit")), len(lines))
    pages = sorted(at >> 12 for line, at in _mapped(lines) if line < end)
    return "" if pages == list(range(16)) else f"before the first limit these pages were mapped: {pages}"


INVARIANTS: dict[str, tuple[Callable[[list[str]], str], ...]] = {
    "race": (
        _race_unmaps_one_page, _race_faults_only_what_was_unmapped, _race_never_two_mappings_between_unmaps,
        _race_each_mapping_is_a_fresh_frame,
    ),
    "memcg_age": (_age_is_by_page, _age_comes_before_unmap, _first_faults_map_their_group),
}

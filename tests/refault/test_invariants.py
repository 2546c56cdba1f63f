"""What holds in every run of a scenario with chance in it, and in no other sequence."""

from __future__ import annotations

import pytest

from refault.scenarios.comparison import compare
from refault.scenarios.invariants import INVARIANTS
from refault.scenarios.normal import Recording
from refault.scenarios.recordings import recording


def broken(name: str, lines: list[str]) -> list[str]:
    comparison = compare(name, Recording(lines, {}), recording(name), repeats="by chance")
    assert (comparison.verdict == "different") == bool(comparison.broken)
    return comparison.broken


@pytest.mark.parametrize("name", INVARIANTS)
def test_they_hold_in_the_recordings(name: str) -> None:
    assert broken(name, recording(name).lines) == []


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("unmap_hva_range [D+0x3000..D+0x4000]", "unmap_hva_range [D+0x3000..D+0x5000]", "another page"),
        ("walk addr 10003000", "walk addr 10007000", "another page faulted"),
        ("P5|e67", "P5|825", "without the right"), ("P5|e67", "P4|e67", "the same frame"),
        ("kvm_unmap_hva_range", "kvm_age_hva", "nothing was unmapped"),
        ("walk addr 10004000", "walk addr 10003000", "faulted 0 times"),
    ],
)
def test_race_what_breaks_one_is_found(old: str, new: str, why: str) -> None:
    assert any(why in one for one in broken("race", [x.replace(old, new) for x in recording("race").lines]))


def test_race_a_page_mapped_twice_is_found() -> None:
    lines = [line for line in recording("race").lines if not line.startswith("kvm_unmap")]
    assert any("twice" in one for one in broken("race", lines))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("kvm_age_hva [D+0x10000..D+0x11000]", "kvm_age_hva [D+0x10000..D+0x12000]", "not of a page"),
        ("kvm_age_hva [D+0x11000..D+0x12000]", "kvm_unmap_hva_range [D+0x11000..D+0x12000]", "never asked"),
        ("gfn 10005 spte", "gfn 10025 spte", "these pages were mapped"),
    ],
)
def test_memcg_age_what_breaks_one_is_found(old: str, new: str, why: str) -> None:
    lines = [line.replace(old, new) for line in recording("memcg_age").lines]
    assert any(why in one for one in broken("memcg_age", lines))

"""equal, explained, different."""

from __future__ import annotations

from refault.scenarios.comparison import compare
from refault.scenarios.normal import Recording

LINES = [
    ">> guest ld D+0x3000", "kvm_mmu_spte_requested: gfn 10003 pfn P0 level 1",
    "kvm_unmap_hva_range [D+0xa00000..D+0xa01000]", "kvm_mmu_set_spte: gfn 1 spte P1|e67 (rwxu) level 1",
    "kvm_mmu_set_spte: gfn 10003 spte P2|e67 (rwxu) level 1", "<< guest ld D+0x3000 : 0",
]
ONE = Recording(LINES, {"pf_taken": 1, "exits": 3})


def changed(old: str, new: str) -> Recording:
    return Recording([line.replace(old, new) for line in LINES], ONE.stats)


def test_what_is_the_same_is_equal() -> None:
    assert compare("s", ONE, ONE).verdict == "equal"


def test_any_line_that_differs_makes_it_different() -> None:
    for old, new in (("P2", "P0"), ("e67", "e47"), ("level 1", "level 2"), (": 0", ": 1")):
        assert compare("s", ONE, changed(old, new)).verdict == "different", old


def test_frames_may_differ_where_a_real_machine_does_not_repeat_them() -> None:
    assert compare("s", ONE, changed("P2", "P0"), repeats="but for frames").verdict == "equal"
    assert compare("s", ONE, changed("e67", "e47"), repeats="but for frames").verdict == "different"


def test_lines_of_slot_0_may_differ_where_its_pages_move() -> None:
    without = Recording([LINES[0], LINES[1], LINES[4].replace("P2", "P1"), LINES[5]], ONE.stats)
    assert compare("s", ONE, without, repeats="but for slot 0").verdict == "equal"
    assert compare("s", ONE, without).verdict == "different"


def test_statistics_that_repeat_are_compared_and_others_are_not() -> None:
    assert compare("s", ONE, Recording(LINES, {"pf_taken": 2})).verdict == "different"
    assert compare("s", ONE, Recording(LINES, {"pf_taken": 1, "exits": 9})).verdict == "equal"
    assert compare("s", ONE, Recording(LINES, {})).verdict == "equal"


def test_of_the_hosts_side_nothing_else_is_compared() -> None:
    other = Recording([line for line in LINES if "spte" not in line], {"pf_taken": 9})
    assert compare("s", ONE, other, whole=False).verdict == "equal"

"""A difference is excused by a record that matches exactly, and by nothing else."""

from __future__ import annotations

import pytest

from refault.scenarios.explained import (
    EXPLANATIONS,
    OUT_OF_ORDER,
    QUIRKS,
    Explanation,
    differences,
    explain,
    in_their_order,
)

OURS = [
    ">> guest ld D+0x3000", "walk addr 10003000 pferr 4 U",
    "kvm_mmu_set_spte: gfn 10003 spte P0|825 (r-xu) level 1", "<< guest ld D+0x3000 : 0",
]
THEIRS = [*OURS[:2], "kvm_mmu_set_spte: gfn 10003 spte P0|a25 (r-xu) level 1", OURS[3]]
RECORD = Explanation(
    "s", "guest ld D+0x3000", "kvm_mmu_set_spte", "low", "825", "a25", "make_spte: as an example"
)


def test_a_field_that_differs_is_named() -> None:
    (found,) = differences(OURS, THEIRS)
    assert found.step == "guest ld D+0x3000"
    assert found.event == "kvm_mmu_set_spte"
    assert found.fields() == [("low", "825", "a25")]


def test_a_record_excuses_just_that() -> None:
    excused, open_, unneeded = explain("s", differences(OURS, THEIRS), [RECORD])
    assert [record for _, record in excused] == [RECORD]
    assert (open_, unneeded) == ([], [])


@pytest.mark.parametrize(
    "change",
    [{"step": "guest ld D+0x4000"}, {"event": "walk"}, {"field": "rights"}, {"ours": "824"}, {"theirs": "a2"},
     {"field": "line"}],
)
def test_a_record_of_another_difference_excuses_nothing_and_is_not_needed(change: dict[str, str]) -> None:
    fields = {name: getattr(RECORD, name) for name in RECORD.__struct_fields__} | change
    record = Explanation(**fields)
    excused, open_, unneeded = explain("s", differences(OURS, THEIRS), [record])
    assert excused == []
    assert len(open_) == 1
    assert unneeded == [record]


def test_a_record_excuses_as_often_as_it_says() -> None:
    twice = differences(OURS + OURS, THEIRS + THEIRS)
    _, open_, _ = explain("s", twice, [RECORD])
    assert len(open_) == 1


def test_a_record_of_another_scenario_is_not_asked() -> None:
    assert explain("other", [], [RECORD]) == ([], [], [])


def test_a_line_that_only_one_side_has_is_a_difference_of_its_own() -> None:
    found = differences(OURS, [*OURS[:2], *OURS[3:]])
    assert [(one.ours, one.theirs) for one in found] == [(OURS[2], "")]
    assert found[0].fields()[0][0] == "line"


def test_two_fields_that_differ_are_not_excused_by_a_record_of_one() -> None:
    other = [*OURS[:2], "kvm_mmu_set_spte: gfn 10003 spte P0|a25 (r--u) level 1", OURS[3]]
    _, open_, _ = explain("s", differences(OURS, other), [RECORD])
    assert len(open_) == 1


def test_every_record_names_a_function_or_a_quirk() -> None:
    for record in (*EXPLANATIONS, *QUIRKS):
        assert len(record.because) > 40, record
        assert "_" in record.because, record


ZAP = "kvm_mmu_prepare_zap_page: sp gen 0 gfn {} 8-byte q0 wux nxe ad root 0 {}"
ROOT, UPPER, LOWER = ZAP.format("2 l4", "sync"), ZAP.format("3 l3", "sync"), ZAP.format("4 l2", "sync")
LEAF = ZAP.format("10 l1", "unsync")
UNSYNC = [LEAF, LEAF.replace("prepare_zap", "sync")]
FAST = [">> del", "kvm_mmu_zap_all_fast: kvm-mmu-valid-gen 0 used_pages 4"]


def test_unsync_pages_may_be_zapped_in_their_turn() -> None:
    ours, theirs = [*FAST, ROOT, *UNSYNC, UPPER, LOWER], [*FAST, ROOT, UPPER, LOWER, *UNSYNC]
    found, moved = in_their_order(ours, theirs)
    assert found == theirs
    assert [record for _, record in moved] == [OUT_OF_ORDER]
    assert in_their_order(theirs, theirs) == (theirs, [])


@pytest.mark.parametrize(
    "other",
    [
        [*FAST, ROOT, LOWER, UPPER, *UNSYNC], [*FAST, ROOT, UPPER, *UNSYNC],
        [*FAST, ROOT, UPPER, LOWER, LEAF], [*FAST, ROOT, UPPER, LOWER, LEAF, LEAF],
        [FAST[0], ROOT, UPPER, LOWER, *UNSYNC],
    ],
)
def test_other_pages_and_another_order_of_those_in_sync_stay_different(other: list[str]) -> None:
    ours = [*FAST, ROOT, *UNSYNC, UPPER, LOWER]
    assert in_their_order(ours, other) == (ours, [])

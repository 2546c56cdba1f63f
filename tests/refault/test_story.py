import pytest

from refault.analysis import Analysis
from refault.story import STORY_LINES, duration, explain, sentence, story
from trace_events.event import Event


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1000, "1 us"),
        (3_900, "3.9 us"),
        (999_900, "1000 us"),
        (2_500_000_000, "2.5 s"),
    ],
)
def test_durations_have_three_figures(ns, text):
    assert duration(ns) == text


def test_the_story_of_a_page_names_the_operation_and_the_gap(events):
    lines = story(Analysis(events), 0x200)
    assert len(lines) == 4
    assert "because of swap_out." in lines[1]
    assert "wrote to guest page 0x200" in lines[2]
    assert "lost 3.9 us before, at #5." in lines[2]
    assert lines[-1].startswith("In all: 1 refault of guest page 0x200")


def test_a_long_story_keeps_its_beginning_and_its_end_in_ten_lines(events):
    zaps = [
        Event(20 + n, 100_000 + n, "refault:spte_zap", "kswapd0", args={"gfn": 0x200, "level": 1, "why": "x"})
        for n in range(50)
    ]
    lines = story(Analysis([*events, *zaps]), 0x200)
    assert len(lines) == STORY_LINES
    assert "#1 " in lines[0]
    assert "more like these" in lines[6]
    assert "#69 " in lines[8]


def test_a_page_nobody_touched_has_no_story(events):
    assert story(Analysis(events), 0x999) == ["Nothing in this trace is about guest page 0x999."]


def test_a_refault_is_explained_back_to_the_operation(events):
    analysis = Analysis(events)
    text = "\n".join(explain(analysis, analysis.by_seq[8]))
    assert "The host was asked to swap_out(0x200000, 2)" not in text
    assert "it began with #3" in text.lower()
    back = text[text.index("Back to") :]
    assert back.index("#3 ") < back.index("#4 ") < back.index("#5 ") < back.index("#8 ")


def test_an_operation_is_explained_forward_to_the_refault(events):
    analysis = Analysis(events)
    text = "\n".join(explain(analysis, analysis.by_seq[3]))
    assert "refault of zap #5 3.9 us later: #8" in text
    assert "2 zaps, 1 answered by a refault" in text


def test_a_first_touch_says_so(events):
    analysis = Analysis(events)
    assert "a first touch" in "\n".join(explain(analysis, analysis.by_seq[1]))


def test_a_zap_that_nobody_missed_says_so(events):
    analysis = Analysis(events)
    assert "Nobody has touched the page since." in "\n".join(explain(analysis, analysis.by_seq[6]))


def test_an_event_with_strange_fields_is_still_told():
    strange = Event(0, 0, "kvm:kvm_page_fault", "t", args={"fault_address": "x", "error_code": "y"})
    assert "fault_address=x" in sentence(strange)

"""docs/seed.md says what its commands print. `make seed-doc` writes the outputs anew."""

from __future__ import annotations

import pytest

from tests.refault.seed_doc import DOCUMENT, EVENTS, run_section, sections, with_outputs

SECTIONS = sections(DOCUMENT.read_text())
SHOWN = [title for title, steps in SECTIONS.items() if steps]


@pytest.mark.slow
@pytest.mark.parametrize("title", SHOWN)
def test_the_commands_print_what_the_document_shows(title: str) -> None:
    steps = SECTIONS[title]
    for step, output in zip(steps, run_section(steps), strict=True):
        assert output == list(step.output), step.command


def test_the_document_says_what_events_is() -> None:
    assert f"\n    {EVENTS}\n" in DOCUMENT.read_text()


def test_every_answer_has_a_command() -> None:
    assert [title for title, steps in SECTIONS.items() if title[:1].isdigit() and not steps] == []
    assert len(SHOWN) > 15


def test_every_command_prints_something_but_those_that_make_a_trace() -> None:
    silent = [
        step.command for steps in SECTIONS.values() for step in steps
        if not step.output and "--trace" not in step.command
    ]
    assert silent == []


def test_writing_the_outputs_that_are_there_changes_nothing() -> None:
    text = DOCUMENT.read_text()
    same = {title: [list(step.output) for step in steps] for title, steps in SECTIONS.items()}
    assert with_outputs(text, same) == text

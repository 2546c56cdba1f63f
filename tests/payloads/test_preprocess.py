"""Comments, includes, macros, repetition, conditions, equates."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest_payloads.preprocess import AssemblyError, Preprocessor, split_arguments, strip_comment


def lines_of(tmp_path: Path, text: str, **constants: int) -> list[str]:
    source = tmp_path / "a.s"
    source.write_text(text)
    return [s.text for s in Preprocessor(tmp_path / "library", constants).run(source)]


def error_of(tmp_path: Path, text: str) -> str:
    with pytest.raises(AssemblyError) as caught:
        lines_of(tmp_path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_comments_end_lines_but_not_strings() -> None:
    assert strip_comment('.asciz "a;b#c" ; d') == '.asciz "a;b#c" '
    assert strip_comment("cmp al, ';' # x") == "cmp al, ';' "
    assert strip_comment('.ascii "\\";" ; x') == '.ascii "\\";" '


def test_arguments_split_outside_brackets_and_quotes() -> None:
    assert split_arguments('rax, [rbx + f(1, 2)], "a,b", \',\'') == ["rax", "[rbx + f(1, 2)]", '"a,b"', "','"]
    assert split_arguments("") == []


def test_macro_arguments_and_unique_numbers(tmp_path: Path) -> None:
    text = ".macro m a, b\nx\\@: mov \\a, \\b\n.endm\nm rax, 1\nm rbx, [rcx]\n"
    assert lines_of(tmp_path, text) == ["x1:", "mov rax, 1", "x2:", "mov rbx, [rcx]"]


def test_repetition_counts_from_zero(tmp_path: Path) -> None:
    assert lines_of(tmp_path, ".rept 3\npush \\+\n.endr\n") == ["push 0", "push 1", "push 2"]


def test_conditions_choose_by_constants(tmp_path: Path) -> None:
    text = ".equ N, 4\n.if N == 4\na\n.if 0\nb\n.else\nc\n.endif\n.else\nd\n.endif\n"
    assert lines_of(tmp_path, text) == ["a", "c"]


def test_a_file_is_included_once_and_its_own_folder_is_first(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "b.inc").write_text("library\n")
    (tmp_path / "library" / "c.inc").write_text("from_library\n")
    (tmp_path / "b.inc").write_text("own\n")
    text = '.include "b.inc"\n.include "b.inc"\n.include "c.inc"\n'
    assert lines_of(tmp_path, text) == ["own", "from_library"]


def test_several_labels_may_share_a_line_with_an_instruction(tmp_path: Path) -> None:
    assert lines_of(tmp_path, "a: .b: ret\n") == ["a:", ".b:", "ret"]


@pytest.mark.parametrize(("text", "message"), [
    (".macro m a\n.endm\n\nm 1, 2\n", "a.s:4: m takes 1 arguments, got 2"),
    (".macro m\nnop\n", "a.s:1: .macro without .endm"),
    ("nop\n.endif\n", "a.s:2: .endif without its beginning"),
    (".rept nothing\n.endr\n", "a.s:1: unknown symbol 'nothing'"),
    (".equ A, 1\n.equ A, 2\n", "a.s:2: A is defined twice"),
    (".include 5\n", 'a.s:1: .include needs "file"'),
    (".macro m\nm\n.endm\nm\n", "a.s:4: includes and macros nest too deeply"),
    (".equ A, B\n.equ B, A\n.if A\n.endif\n", "a.s:2: 'A' is defined by itself"),
])
def test_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    assert error_of(tmp_path, text).startswith(message)


def test_a_missing_include_says_where_it_looked(tmp_path: Path) -> None:
    message = error_of(tmp_path, 'nop\n.include "gone.inc"\n')
    assert message.startswith("a.s:2: cannot find gone.inc (looked in ")

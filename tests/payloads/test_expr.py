"""Constant expressions of the assembler (guest_payloads/expr.py)."""

from __future__ import annotations

import pytest

from guest_payloads.expr import ExpressionError, evaluate, register_bits, substitute


@pytest.mark.parametrize(("text", "value"), [
    ("1 + 2 * 3", 7), ("(1 + 2) * 3", 9), ("0x10 | 010", 0x18), ("1 << 12 >> 4", 256), ("-1 & 0xff", 255),
    ("7 / 2", 3), ("7 % 4", 3), ("~0", -1), ("'A'", 65), ("'\\n'", 10), ("3 == 3", 1), ("2 > 3", 0),
    ("6 ^ 3", 5),
])
def test_the_value_of_an_expression(text: str, value: int) -> None:
    assert evaluate(text, {}) == value


def test_symbols_may_be_negative_and_keep_their_place_in_the_precedence() -> None:
    assert evaluate("2 * N", {"N": -3}) == -6
    assert evaluate("-N", {"N": -3}) == 3


@pytest.mark.parametrize(("text", "reason"), [
    ("", "missing"), ("1 +", "bad expression"), ("1 / 0", "bad expression"),
    ("NOBODY", "unknown symbol 'NOBODY'"),
    ("1.5", "not a constant"), ("f(1)", "unknown symbol"), ("'\\q'", "unknown escape"),
    ("1 < 2 < 3", "not a constant"),
    ("1 << (1 << 70)", "bad expression"),
])
def test_what_has_no_value_says_why_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError, match=reason) as error:
        evaluate(text, {})
    assert "\n" not in str(error.value)


def test_registers_and_size_words_are_no_symbols() -> None:
    symbols = {"rax": 1, "BASE": 0x1000, "ptr": 2}
    assert substitute("qword ptr [rax + BASE]", symbols.get) == "qword ptr [rax + 0x1000]"


def test_the_place_of_the_statement_is_a_dollar() -> None:
    assert evaluate("$ + 4", {"$": 0x100}) == 0x104


@pytest.mark.parametrize(("word", "bits"), [
    ("al", 8), ("r9b", 8), ("ax", 16), ("r10w", 16), ("eax", 32), ("r11d", 32), ("RAX", 64), ("r15", 64),
    ("dword", 32), ("xmm0", 0), ("cr3", 0), ("label", 0),
])
def test_the_width_of_a_register(word: str, bits: int) -> None:
    assert register_bits(word) == bits

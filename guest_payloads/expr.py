"""Constant expressions and symbol substitution of the payload assembler.

Numbers are Python's plus C octal (`010`), character constants are `'A'`; operators + - * / % << >> & |
^ ~, comparisons, and parentheses. `/` is integer division. Values are unbounded until they are stored.

Not modelled: relocations; every symbol is a plain int because an image has one fixed base.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping

__all__ = ["IDENTIFIER", "RESERVED", "ExpressionError", "evaluate", "register_bits", "substitute"]

IDENTIFIER = re.compile(r"(?<![\w.$\\])\.?[A-Za-z_][\w.]*")
_CHARACTER = re.compile(r"'(\\.|[^\\'])'")
_OCTAL = re.compile(r"(?<![\w.])0([0-7]+)(?![\w.])")
_ESCAPES = {"n": 10, "t": 9, "r": 13, "0": 0, "\\": 92, "'": 39, '"': 34}

_SIZES = "byte word dword qword xmmword tbyte fword oword ptr offset short near far st"
_GENERAL = "ax bx cx dx si di bp sp"
_BYTES = "al ah bl bh cl ch dl dh sil dil bpl spl"
_OTHERS = "cs ds es fs gs ss rip eip riz eiz"


def _register_names() -> frozenset[str]:
    names = set(_SIZES.split()) | set(_BYTES.split())
    for name in _GENERAL.split():
        names |= {name, "e" + name, "r" + name}
    for number in range(8, 16):
        names |= {f"r{number}{suffix}" for suffix in ("", "b", "w", "d")}
    names |= {f"{kind}{number}" for kind in ("cr", "dr", "xmm") for number in range(16)}
    names |= set(_OTHERS.split())
    return frozenset(names)


RESERVED = _register_names()
"""Words that stay in an operand as they are and cannot be symbols."""


def register_bits(word: str) -> int:
    """The width of a general register or of a size word (`dword`), 0 for anything else."""
    word = word.lower()
    if word in ("byte", "word", "dword", "qword"):
        return {"byte": 8, "word": 16, "dword": 32, "qword": 64}[word]
    if word in _BYTES.split():
        return 8
    if word in _GENERAL.split():
        return 16
    if word[:1] in ("e", "r") and word[1:] in _GENERAL.split():
        return 32 if word[0] == "e" else 64
    number = word[1:].rstrip("bwd")
    if word[:1] == "r" and number.isdigit() and 8 <= int(number) <= 15:
        return {"b": 8, "w": 16, "d": 32}.get(word[-1], 64)
    return 0


class ExpressionError(ValueError):
    """The expression has no value: a syntax error or an unknown symbol."""


_BINARY: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.BitXor: operator.xor, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.Gt: operator.gt, ast.LtE: operator.le, ast.GtE: operator.ge,
}
_UNARY: dict[type[ast.AST], Callable[[int], int]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
}


def _characters(text: str) -> str:
    def code(match: re.Match[str]) -> str:
        body = match.group(1)
        if body.startswith("\\"):
            if body[1] not in _ESCAPES:
                raise ExpressionError(f"unknown escape {body}")
            return str(_ESCAPES[body[1]])
        return str(ord(body))

    return _CHARACTER.sub(code, text)


def substitute(text: str, lookup: Callable[[str], int | None]) -> str:
    """`text` with every symbol replaced by its value; reserved words stay. Raises ExpressionError."""

    def value(match: re.Match[str]) -> str:
        name = match.group(0)
        if name.lower() in RESERVED:
            return name
        found = lookup(name)
        if found is None:
            raise ExpressionError(f"unknown symbol '{name}'")
        return hex(found) if found >= 0 else f"({found})"

    plain = _characters(text)
    if "$" in plain:
        plain = plain.replace("$", hex(lookup("$") or 0))
    return _OCTAL.sub(lambda match: str(int(match.group(1), 8)), IDENTIFIER.sub(value, plain))


def _compute(node: ast.AST) -> int:
    if isinstance(node, ast.Expression):
        return _compute(node.body)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_compute(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return int(_BINARY[type(node.op)](_compute(node.left), _compute(node.right)))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        compare = _BINARY.get(type(node.ops[0]))
        if compare is not None:
            return int(compare(_compute(node.left), _compute(node.comparators[0])))
    raise ExpressionError("not a constant expression")


def evaluate(text: str, lookup: Callable[[str], int | None] | Mapping[str, int]) -> int:
    """The value of a constant expression. Raises ExpressionError with one line of reason."""
    get = lookup if callable(lookup) else lookup.get
    replaced = substitute(text, get).strip()
    if not replaced:
        raise ExpressionError("an expression is missing")
    try:
        return _compute(ast.parse(replaced, mode="eval"))
    except (SyntaxError, ZeroDivisionError, OverflowError, MemoryError, RecursionError) as error:
        raise ExpressionError(f"bad expression '{text.strip()}'") from error

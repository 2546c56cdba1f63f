"""Which events somebody wants: globs over `system:name`, and filters over fields.

A glob without a colon matches the event's name in any system; `kvm` alone, without any glob
character, also matches a whole system, as `trace-cmd record -e kvm` does.

A field filter has the shape of `trace-cmd report -F`:

    events : expression
    kvm/kvm_page_fault : fault_address >= 0x200000 && error_code != 4
    refault/spte_zap : gfn == 0x200..0x2ff || why ~ "mmu*"

    expression := and { '||' and }          and := unary { '&&' unary }
    unary      := '!' unary | '(' expression ')' | field op value | field '&' NUMBER
    op         := == != < <= > >= ~ !~      value := NUMBER | NUMBER '..' NUMBER | word | "string"

`~` matches a glob. `==` with a range means within it, both ends included. A field that the event
does not have makes its comparison false, as in trace-cmd. Besides the event's own fields there are
`COMM` (the task), `CPU` (the vCPU), `seq`, `ts`, `cause` and `killed_by`. An event that no filter
names is not shown; of several filters that name it one must hold.

Not modelled: trace-cmd's arithmetic, comparisons of one field with another, and `-v`. Events are
chosen by globs, not by regular expressions.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from trace_events.event import Event

__all__ = ["FilterError", "compile_filter", "compile_globs"]

Predicate = Callable[[Event], bool]


class FilterError(ValueError):
    """A filter that does not parse; the text says where, in one line."""

    exit_code = 2


def compile_globs(globs: Iterable[str]) -> Callable[[str], bool]:
    """A predicate over full event names. No globs match nothing; a glob may be a comma list."""
    patterns: list[str] = []
    for glob in globs:
        for part in glob.split(","):
            part = part.strip()
            if not part:
                continue
            if ":" in part:
                patterns.append(part)
            else:
                patterns.append(f"*:{part}")
                patterns.append(f"{part}:*")

    def match(full_name: str) -> bool:
        return any(fnmatchcase(full_name, p) for p in patterns)

    return match


def compile_filter(texts: Iterable[str]) -> Predicate:
    """A predicate over events that holds where one of the filters does."""
    clauses = [_compile_one(text) for text in texts]

    def match(event: Event) -> bool:
        return any(names(event.event) and holds(event) for names, holds in clauses)

    return match


def _compile_one(text: str) -> tuple[Callable[[str], bool], Predicate]:
    events, colon, expression = text.partition(":")
    globs = [part.strip().replace("/", ":") for part in events.split(",") if part.strip()]
    if not globs:
        raise FilterError(
            f"filter {text!r}: it must begin with the events it applies to, as in 'kvm/kvm_exit : ...'"
        )
    if not colon or not expression.strip():
        return compile_globs(globs), lambda event: True
    return compile_globs(globs), _Parser(text, expression).parse()


_TOKEN = re.compile(
    r"""\s*(?:
        (?P<op>&&|\|\||==|!=|!~|>=|<=|\.\.|[<>~&!()])
      | (?P<number>-?(?:0[xX][0-9a-fA-F]+|[0-9]+)(?![\w]))
      | (?P<string>"[^"]*"|'[^']*')
      | (?P<word>[A-Za-z_*?][\w\-*?:/\[\]]*)
    )""",
    re.VERBOSE,
)

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_COMMON: dict[str, Callable[[Event], Any]] = {
    "COMM": lambda event: event.task,
    "CPU": lambda event: event.vcpu,
    "seq": lambda event: event.seq,
    "ts": lambda event: event.ts,
    "cause": lambda event: event.cause,
    "killed_by": lambda event: event.killed_by,
}


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str, expression: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str]] = []
        at, end = 0, len(expression.rstrip())
        while at < end:
            found = _TOKEN.match(expression, at)
            if found is None or found.lastgroup is None:
                raise FilterError(f"filter {text!r}: cannot read {expression[at:].strip()[:20]!r}")
            self.tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        self.at = 0

    def parse(self) -> Predicate:
        """The whole expression as a predicate."""
        predicate = self._or()
        if self.at < len(self.tokens):
            raise self._error("'&&', '||' or the end")
        return predicate

    def _error(self, wanted: str) -> FilterError:
        found = repr(self.tokens[self.at][1]) if self.at < len(self.tokens) else "the end"
        return FilterError(f"filter {self.text!r}: expected {wanted}, found {found}")

    def _accept(self, *ops: str) -> str | None:
        if self.at < len(self.tokens):
            kind, token = self.tokens[self.at]
            if kind == "op" and token in ops:
                self.at += 1
                return token
        return None

    def _or(self) -> Predicate:
        terms = [self._and()]
        while self._accept("||"):
            terms.append(self._and())
        return terms[0] if len(terms) == 1 else lambda event: any(term(event) for term in terms)

    def _and(self) -> Predicate:
        terms = [self._unary()]
        while self._accept("&&"):
            terms.append(self._unary())
        return terms[0] if len(terms) == 1 else lambda event: all(term(event) for term in terms)

    def _unary(self) -> Predicate:
        if self._accept("!"):
            inner = self._unary()
            return lambda event: not inner(event)
        if self._accept("("):
            predicate = self._or()
            if not self._accept(")"):
                raise self._error("')'")
            return predicate
        return self._comparison()

    def _comparison(self) -> Predicate:
        if self.at >= len(self.tokens) or self.tokens[self.at][0] != "word":
            raise self._error("a field name")
        get = _getter(self.tokens[self.at][1])
        self.at += 1
        op = self._accept("==", "!=", "<", "<=", ">", ">=", "~", "!~", "&")
        if op is None:
            raise self._error("a comparison")
        value = self._value()
        if op == "&":
            if not isinstance(value, int):
                raise FilterError(f"filter {self.text!r}: '&' needs a number")
            return _has_bits(get, value)
        if op in ("~", "!~"):
            return _globbed(get, str(value), op == "~")
        if self._accept(".."):
            last = self._value()
            if op not in ("==", "!=") or not isinstance(value, int) or not isinstance(last, int):
                raise FilterError(f"filter {self.text!r}: a range needs == or != and two numbers")
            return _within(get, value, last, op == "==")
        return _compared(get, _COMPARE[op], value)

    def _value(self) -> int | str:
        if self.at >= len(self.tokens) or self.tokens[self.at][0] == "op":
            raise self._error("a value")
        kind, token = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            # int(..., 0) refuses leading zeros, which the kernel's own print formats produce.
            return int(token, 16) if "x" in token.lower() else int(token, 10)
        return token[1:-1] if kind == "string" else token


def _getter(field: str) -> Callable[[Event], Any]:
    common = _COMMON.get(field)
    return common if common is not None else lambda event: event.args.get(field)


def _compared(
    get: Callable[[Event], Any], compare: Callable[[Any, Any], bool], wanted: int | str
) -> Predicate:
    def holds(event: Event) -> bool:
        value = get(event)
        if value is None:
            return False
        if isinstance(wanted, int) != isinstance(value, int):
            return bool(compare(str(value), str(wanted)))
        return bool(compare(value, wanted))

    return holds


def _within(get: Callable[[Event], Any], first: int, last: int, inside: bool) -> Predicate:
    def holds(event: Event) -> bool:
        value = get(event)
        return isinstance(value, int) and (first <= value <= last) == inside

    return holds


def _has_bits(get: Callable[[Event], Any], mask: int) -> Predicate:
    def holds(event: Event) -> bool:
        value = get(event)
        return isinstance(value, int) and value & mask != 0

    return holds


def _globbed(get: Callable[[Event], Any], pattern: str, wanted: bool) -> Predicate:
    def holds(event: Event) -> bool:
        value = get(event)
        return value is not None and fnmatchcase(str(value), pattern) == wanted

    return holds

"""From source files to statements: comments, includes, macros, repetition, conditions, equates.

The dialect (Intel syntax for keystone; directives after the GNU assembler's):

    ; comment, # comment             .include "file.inc"      once per image, own folder first
    name:   .local:                  .equ NAME, expression    may use labels and $ (here)
    .macro NAME a, b ... .endm       \\a is an argument, \\@ a number unique to the expansion
    .rept N ... .endr                \\+ is the round, from 0
    .if expression ... .else ... .endif    constants only

Everything else is a statement for assemble.py. `.local` labels belong to the last plain label.

Not modelled: macro default arguments, nested macro definitions, .set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from guest_payloads.expr import ExpressionError, evaluate

__all__ = ["AssemblyError", "Equate", "Preprocessor", "Statement", "split_arguments", "strip_comment"]

_MAX_DEPTH = 32
_MAX_STATEMENTS = 200_000
_DIRECTIVE = re.compile(r"\.(\w+)(?:\s+(.*))?$", re.DOTALL)
_LABEL = re.compile(r"(\.?[A-Za-z_][\w.]*):\s*")
_MACRO_NAME = re.compile(r"[A-Za-z_]\w*$")


class AssemblyError(ValueError):
    """The source cannot become an image. The message is one line that starts with file:line."""


class Statement(NamedTuple):
    """One line of source after preprocessing; `where` is file:line of the innermost source line."""

    where: str
    text: str


class Equate(NamedTuple):
    """A named expression, evaluated where it is used."""

    where: str
    text: str


class _Macro(NamedTuple):
    parameters: tuple[str, ...]
    body: tuple[Statement, ...]


def _unquoted(text: str) -> Iterator[tuple[int, str]]:
    """Position and character of what stands outside quotes."""
    quote = ""
    skip = False
    for position, char in enumerate(text):
        if skip:
            skip = False
        elif quote:
            if char == "\\":
                skip = True
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        else:
            yield position, char


def strip_comment(line: str) -> str:
    """`line` without its comment; ; and # inside quotes are text."""
    for position, char in _unquoted(line):
        if char in ";#":
            return line[:position]
    return line


def split_arguments(text: str) -> list[str]:
    """`text` split at commas outside quotes, brackets and parentheses."""
    parts: list[str] = []
    depth = 0
    start = 0
    for position, char in _unquoted(text):
        if char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    if last or parts:
        parts.append(last)
    return parts


class Preprocessor:
    """Expands one source file. `constants` are the symbols that exist before the first line."""

    def __init__(self, library: Path, constants: Mapping[str, int]) -> None:
        self.library = library
        self.constants = dict(constants)
        self.equates: dict[str, Equate] = {}
        self.statements: list[Statement] = []
        self._macros: dict[str, _Macro] = {}
        self._included: set[Path] = set()
        self._expansions = 0

    def run(self, path: Path) -> list[Statement]:
        """All statements of `path` and what it includes. Raises AssemblyError."""
        self._file(path, path.name, 0)
        return self.statements

    def _file(self, path: Path, where: str, depth: int) -> None:
        real = path.resolve()
        if real in self._included:
            return
        self._included.add(real)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise AssemblyError(f"{where}: cannot read {path}: {reason}") from error
        lines = [Statement(f"{path.name}:{number}", strip_comment(line).strip())
                 for number, line in enumerate(text.splitlines(), 1)]
        self._expand([line for line in lines if line.text], path.parent, depth)

    def _expand(self, lines: list[Statement], folder: Path, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise AssemblyError(f"{lines[0].where}: includes and macros nest too deeply")
        position = 0
        while position < len(lines):
            line = lines[position]
            match = _DIRECTIVE.match(line.text)
            name = match.group(1) if match and not line.text.endswith(":") else ""
            rest = (match.group(2) if match else None) or ""
            if name in ("macro", "rept", "if"):
                end = self._block_end(lines, position, name)
                self._block(name, rest, lines, position, end, folder, depth)
                position = end + 1
                continue
            self._line(line, name, rest, folder, depth)
            position += 1

    @staticmethod
    def _block_end(lines: list[Statement], start: int, name: str) -> int:
        close = {"macro": "endm", "rept": "endr", "if": "endif"}[name]
        level = 0
        for position in range(start, len(lines)):
            word = lines[position].text.split(None, 1)[0]
            if word == "." + name:
                level += 1
            elif word == "." + close:
                level -= 1
                if level == 0:
                    return position
        raise AssemblyError(f"{lines[start].where}: .{name} without .{close}")

    def _block(self, name: str, rest: str, lines: list[Statement], start: int, end: int,
               folder: Path, depth: int) -> None:
        body = lines[start + 1:end]
        where = lines[start].where
        if name == "macro":
            self._define_macro(where, rest, body)
        elif name == "rept":
            for turn in range(self._constant(where, rest)):
                self._expand([Statement(s.where, s.text.replace("\\+", str(turn))) for s in body],
                             folder, depth + 1)
        else:
            middle = self._else_position(body)
            chosen = body[:middle] if self._constant(where, rest) else body[middle + 1:]
            if chosen:
                self._expand(chosen, folder, depth + 1)

    @staticmethod
    def _else_position(body: list[Statement]) -> int:
        level = 0
        for position, line in enumerate(body):
            word = line.text.split(None, 1)[0]
            level += (word == ".if") - (word == ".endif")
            if word == ".else" and level == 0:
                return position
        return len(body)

    def _define_macro(self, where: str, rest: str, body: list[Statement]) -> None:
        name, parameters = [*rest.split(None, 1), "", ""][:2]
        if not _MACRO_NAME.match(name):
            raise AssemblyError(f"{where}: .macro needs a name")
        if name in self._macros:
            raise AssemblyError(f"{where}: macro {name} is defined twice")
        self._macros[name] = _Macro(tuple(split_arguments(parameters)), tuple(body))

    def _line(self, line: Statement, name: str, rest: str, folder: Path, depth: int) -> None:
        if name in ("endm", "endr", "else", "endif"):
            raise AssemblyError(f"{line.where}: .{name} without its beginning")
        if name == "include":
            self._include(line.where, rest, folder, depth)
        elif name in ("equ", "set"):
            self._equate(line.where, rest)
        else:
            self._statement(line, folder, depth)

    def _statement(self, line: Statement, folder: Path, depth: int) -> None:
        label = _LABEL.match(line.text)
        if label is not None:
            self._append(Statement(line.where, label.group(1) + ":"))
            rest = line.text[label.end():]
            if rest:
                self._expand([Statement(line.where, rest)], folder, depth)
            return
        word, *arguments = line.text.split(None, 1)
        macro = self._macros.get(word)
        if macro is not None:
            self._call(line.where, word, macro, arguments[0] if arguments else "", folder, depth)
        else:
            self._append(line)

    def _append(self, line: Statement) -> None:
        self.statements.append(line)
        if len(self.statements) > _MAX_STATEMENTS:
            raise AssemblyError(f"{line.where}: more than {_MAX_STATEMENTS} statements")

    def _include(self, where: str, rest: str, folder: Path, depth: int) -> None:
        wanted = rest.strip()
        if len(wanted) < 3 or wanted[0] != '"' or wanted[-1] != '"':
            raise AssemblyError(f'{where}: .include needs "file"')
        for place in (folder, self.library):
            path = place / wanted[1:-1]
            if path.is_file():
                self._file(path, where, depth + 1)
                return
        raise AssemblyError(f"{where}: cannot find {wanted[1:-1]} (looked in {folder} and {self.library})")

    def _equate(self, where: str, rest: str) -> None:
        parts = split_arguments(rest)
        if len(parts) != 2 or not _MACRO_NAME.match(parts[0]):
            raise AssemblyError(f"{where}: .equ needs NAME, expression")
        name, text = parts
        if name in self.equates or name in self.constants:
            raise AssemblyError(f"{where}: {name} is defined twice")
        if "$" in text:
            here = f"__here_{len(self.equates)}"
            self.statements.append(Statement(where, here + ":"))
            text = text.replace("$", here)
        self.equates[name] = Equate(where, text)

    def _call(self, where: str, name: str, macro: _Macro, arguments: str, folder: Path,
              depth: int) -> None:
        values = split_arguments(arguments)
        if len(values) != len(macro.parameters):
            raise AssemblyError(f"{where}: {name} takes {len(macro.parameters)} arguments, got {len(values)}")
        self._expansions += 1
        table = dict(zip(macro.parameters, values, strict=True))
        unique = str(self._expansions)

        def fill(match: re.Match[str]) -> str:
            word = match.group(1)
            return unique if word == "@" else table.get(word, match.group(0))

        body = [Statement(where, re.sub(r"\\(@|\w+)", fill, line.text)) for line in macro.body]
        if body:
            self._expand(body, folder, depth + 1)

    def _constant(self, where: str, text: str, using: tuple[str, ...] = ()) -> int:
        """The value of `text`, which stands in the definitions of `using`, outermost first."""

        def lookup(name: str) -> int | None:
            if name in self.constants:
                return self.constants[name]
            if name in using:
                raise ExpressionError(f"'{name}' is defined by itself")
            equate = self.equates.get(name)
            return None if equate is None else self._constant(equate.where, equate.text, (*using, name))

        try:
            return evaluate(text, lookup)
        except ExpressionError as error:
            raise AssemblyError(f"{where}: {error}") from error
        except RecursionError as error:
            raise AssemblyError(f"{where}: definitions nest too deeply") from error

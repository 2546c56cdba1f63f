"""From statements to the bytes of four sections at fixed addresses.

Keystone assembles one instruction at a time, with every symbol already a number; labels, branches,
data and layout are done here. So each error has its line, and keystone's traps are closed in one place:

- `[0x101000]` becomes RIP-relative or moffs, and `[riz + x]` becomes [rsp + x]: rewritten to [riz*1 + x];
- displacements from 2^31 and constants wider than the other operand are cut silently: refused;
- `push` of a constant from 0xff80 on pushes another one: encoded here;
- `iret`, `pushf`, `popf` are the 16-bit forms in 64-bit code: refused (iretq, pushfq, popfq);
- a high byte register (ah) with a REX prefix ends the whole process: refused;
- it drops `;` and what follows: the preprocessor has taken comments out before;
- `lgdt`, `ljmp` in 32-bit code get a 16-bit operand size: encoded here; so is `movsd` (string).

Sections, in this order, each from a page boundary: text (RX; the part `.section multiboot` first),
rodata (R), data (RW), bss (RW, no bytes). A label that begins with __ opens no scope for .local ones.
`__NAME_start`, `__NAME_end` and `__image_end` are symbols.

Not modelled: sections of other names, relocatable output, AVX.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from keystone import KS_ARCH_X86, KS_MODE_32, KS_MODE_64, Ks, KsError

from guest_payloads.expr import IDENTIFIER, RESERVED, ExpressionError, evaluate, register_bits, substitute
from guest_payloads.preprocess import AssemblyError, Equate, Statement, split_arguments

__all__ = ["SECTIONS", "Assembler", "Line", "Program"]

SECTIONS = ("text", "rodata", "data", "bss")
_PARTS = ("multiboot", *SECTIONS)
_PAGE = 4096
_MAX_IMAGE = 1 << 28
_MAX_PASSES = 50
_PREFIXES = frozenset(["lock", "rep", "repe", "repne", "repz", "repnz"])
_SIZES = {"byte": 1, "word": 2, "long": 4, "dword": 4, "quad": 8, "qword": 8}
_CONDITIONS = {name: code for code, names in enumerate(
    ("o", "no", "b c nae", "ae nb nc", "e z", "ne nz", "be na", "a nbe", "s", "ns", "p pe", "np po",
     "l nge", "ge nl", "le ng", "g nle")) for name in names.split()}
_SHORT_ONLY = {"loop": b"\xe2", "jrcxz": b"\xe3", "loope": b"\xe1", "loopne": b"\xe0"}
_WRONG_SIZE = {"iret": "iretq", "pushf": "pushfq", "popf": "popfq"}
_HIGH_BYTE = re.compile(r"\b[abcd]h\b", re.IGNORECASE)
_NEEDS_REX = re.compile(r"\b(r(8|9|1[0-5])[bwd]?|sil|dil|bpl|spl)\b|^r\w+\s*,", re.IGNORECASE)
_MEMORY = re.compile(r"\[([^\]]*)\]")
_WORD = re.compile(r"[A-Za-z]\w*")


class Line(NamedTuple):
    """One assembled statement, for listings: address, bytes, mode and source."""

    address: int
    code: bytes
    bits: int
    where: str
    text: str


@dataclass(slots=True)
class Program:
    """What an image is written from: section name -> (address, size in memory, bytes), and symbols."""

    entry: int
    sections: dict[str, tuple[int, int, bytes]]
    symbols: dict[str, int]
    listing: list[Line]


@dataclass(slots=True)
class _Item:
    """A piece of a section; `kind` is label, insn, branch, data, ascii, align or skip."""

    kind: str
    where: str
    text: str
    bits: int
    parent: str
    width: int = 0
    length: int = 0
    address: int = 0
    fixed: bytes | None = None
    name: str = ""
    operands: list[str] = field(default_factory=list)


class Assembler:
    """Assembles one image. `constants` are the ABI's symbols, `equates` those of the source."""

    def __init__(self, constants: Mapping[str, int], equates: Mapping[str, Equate], base: int) -> None:
        self._constants = constants
        self._equates = equates
        self._base = base
        self._parts: dict[str, list[_Item]] = {name: [] for name in _PARTS}
        self._labels: dict[str, _Item] = {}
        self._bounds: dict[str, int] = {}
        self._engines = {32: Ks(KS_ARCH_X86, KS_MODE_32), 64: Ks(KS_ARCH_X86, KS_MODE_64)}
        self._cache: dict[tuple[int, str], bytes] = {}
        self._guessing = True
        self._used_label = False

    def assemble(self, statements: list[Statement], entry: str, source: str) -> Program:
        """The program of file `source` whose entry point is the label `entry`. Raises AssemblyError."""
        self._collect(statements)
        self._prepare()
        self._relax()
        return self._finish(entry, source)

    # -- first pass: statements to items -------------------------------------------------------------

    def _collect(self, statements: list[Statement]) -> None:
        section, bits, parent = "text", 64, ""
        saved: list[str] = []
        for where, text in statements:
            word, *rest = text.split(None, 1)
            argument = rest[0] if rest else ""
            if text.endswith(":") and " " not in text:
                parent = self._label(where, text[:-1], section, bits, parent)
            elif word in (".section", ".pushsection"):
                if argument not in _PARTS:
                    raise AssemblyError(f"{where}: no section '{argument}' (there are {', '.join(_PARTS)})")
                if word == ".pushsection":
                    saved.append(section)
                section = argument
            elif word == ".popsection":
                if not saved:
                    raise AssemblyError(f"{where}: .popsection without .pushsection")
                section = saved.pop()
            elif word == ".bits":
                if argument not in ("32", "64"):
                    raise AssemblyError(f"{where}: .bits is 32 or 64")
                bits = int(argument)
            else:
                self._parts[section].append(self._item(where, text, word, argument, bits, parent, section))

    def _label(self, where: str, name: str, section: str, bits: int, parent: str) -> str:
        full = parent + name if name.startswith(".") else name
        other = self._labels.get(full)
        if other is not None:
            raise AssemblyError(f"{where}: {full} is defined twice (first at {other.where})")
        if full in self._constants or full in self._equates or full.lower() in RESERVED:
            raise AssemblyError(f"{where}: {full} is already the name of something else")
        item = _Item("label", where, full, bits, parent, address=self._base)
        self._labels[full] = item
        self._parts[section].append(item)
        return parent if name.startswith((".", "__")) else name

    def _item(self, where: str, text: str, word: str, argument: str, bits: int, parent: str,
              section: str) -> _Item:
        name = word[1:].lower()
        operands = split_arguments(argument)
        if not word.startswith("."):
            kind = "branch" if self._is_branch(word.lower(), argument) else "insn"
            item = _Item(kind, where, text, bits, parent, name=word.lower(), operands=operands)
        elif name in _SIZES:
            item = _Item("data", where, text, bits, parent, _SIZES[name], operands=operands)
            item.length = item.width * len(operands)
        elif name in ("ascii", "asciz"):
            item = _Item("ascii", where, text, bits, parent)
            end = b"\0" if name == "asciz" else b""
            item.fixed = b"".join(self._string(where, text) + end for text in operands)
            item.length = len(item.fixed)
        elif name in ("align", "skip", "space") and len(operands) == 1:
            item = _Item("align" if name == "align" else "skip", where, text, bits, parent, operands=operands)
        else:
            raise AssemblyError(f"{where}: unknown directive '{text}'")
        if section == "bss" and item.kind not in ("align", "skip"):
            raise AssemblyError(f"{where}: .bss has no bytes: only .skip and .align")
        return item

    @staticmethod
    def _string(where: str, text: str) -> bytes:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise AssemblyError(f"{where}: bad string {text}") from error
        if not isinstance(value, str):
            raise AssemblyError(f"{where}: bad string {text}")
        return value.encode("utf-8")

    @staticmethod
    def _is_branch(name: str, argument: str) -> bool:
        conditional = name[:1] == "j" and name[1:] in _CONDITIONS
        direct = name in ("jmp", "call") or name in _SHORT_ONLY or conditional
        first = argument.split(None, 1)[0].lower() if argument else ""
        return direct and "[" not in argument and first not in RESERVED

    # -- symbols -------------------------------------------------------------------------------------

    def _lookup(self, item: _Item) -> Callable[[str], int | None]:
        def lookup(name: str, depth: int = 0) -> int | None:
            if name == "$":
                self._used_label = True
                return item.address
            if name.startswith("."):
                name = item.parent + name
            if name in self._constants:
                return self._constants[name]
            label = self._labels.get(name)
            if label is not None:
                self._used_label = True
                return label.address
            if name in self._bounds or name.startswith("__"):
                self._used_label = True
                return self._bounds.get(name, self._base if self._guessing else None)
            equate = self._equates.get(name)
            if equate is None:
                return None
            if depth > 64:
                raise ExpressionError(f"{name} is defined by itself")
            return evaluate(equate.text, lambda inner: lookup(inner, depth + 1))

        return lookup

    def _fail(self, item: _Item, error: Exception) -> AssemblyError:
        message = str(error)
        if message.startswith("unknown symbol '"):
            wanted = message.split("'")[1]
            known = [*self._labels, *self._constants, *self._equates, *RESERVED]
            close = difflib.get_close_matches(wanted, known, n=2, cutoff=0.7)
            if close:
                message += f", did you mean {' or '.join(close)}?"
        return AssemblyError(f"{item.where}: {message}: {item.text}")

    def _value(self, item: _Item, text: str) -> int:
        try:
            return evaluate(text, self._lookup(item))
        except ExpressionError as error:
            raise self._fail(item, error) from error

    # -- lengths -------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        for items in self._parts.values():
            for item in items:
                if item.kind == "skip":
                    item.length = self._value(item, item.operands[0])
                    if not 0 <= item.length <= _MAX_IMAGE:
                        raise AssemblyError(f"{item.where}: bad size: {item.text}")
                elif item.kind == "insn":
                    self._used_label = False
                    code = self._encode(item)
                    item.length = len(code)
                    if not self._used_label:
                        item.fixed = code
                elif item.kind == "branch":
                    item.length = 5 if item.name == "call" else 2

    def _relax(self) -> None:
        for _ in range(_MAX_PASSES):
            self._layout()
            self._guessing = False
            if not self._grow():
                return
        raise AssemblyError(f"{next(iter(self._labels.values())).where}: the layout does not settle")

    def _layout(self) -> None:
        address = self._base
        for name, items in self._parts.items():
            if name != "text":
                address = -(-address // _PAGE) * _PAGE
                if name != "multiboot":
                    self._bounds[f"__{name}_start"] = address
            else:
                self._bounds["__text_start"] = self._base
            for item in items:
                item.address = address
                if item.kind == "align":
                    step = self._value(item, item.operands[0])
                    if step < 1 or step & (step - 1):
                        raise AssemblyError(f"{item.where}: alignment is not a power of two: {item.text}")
                    item.length = -address % step
                address += item.length
            self._bounds[f"__{name}_end"] = address
        self._bounds["__image_end"] = address
        if address - self._base > _MAX_IMAGE:
            raise AssemblyError(f"{self._parts['bss'][-1].where}: the image is too large")

    def _grow(self) -> bool:
        changed = False
        for items in self._parts.values():
            for item in items:
                if item.kind == "branch" and item.length == 2:
                    distance = self._value(item, item.operands[0]) - item.address - 2
                    if not -128 <= distance <= 127:
                        if item.name in _SHORT_ONLY:
                            raise AssemblyError(f"{item.where}: target too far: {item.text}")
                        item.length = 5 if item.name == "jmp" else 6
                        changed = True
                elif item.kind == "insn" and item.fixed is None:
                    length = len(self._encode(item))
                    if length > item.length:
                        item.length = length
                        changed = True
        return changed

    # -- encoding ------------------------------------------------------------------------------------

    def _encode(self, item: _Item) -> bytes:
        """One instruction at its present address with the present values of its symbols."""
        words = item.text.split()
        start = 0
        while start < len(words) - 1 and words[start].lower() in _PREFIXES:
            start += 1
        mnemonic = words[start].lower()
        operands = " ".join(words[start + 1:])
        if item.bits == 64 and mnemonic in _WRONG_SIZE:
            raise AssemblyError(f"{item.where}: write {_WRONG_SIZE[mnemonic]}: {item.text}")
        if item.bits == 32 and mnemonic in ("lgdt", "ljmp"):
            return self._far32(item, mnemonic, operands)
        try:
            parts = [self._operand(item, text) for text in split_arguments(operands)]
            self._check_width(parts)
        except ExpressionError as error:
            raise self._fail(item, error) from error
        replaced = ", ".join(parts)
        if _HIGH_BYTE.search(operands) and _NEEDS_REX.search(operands):
            raise AssemblyError(f"{item.where}: a high byte register cannot be used with REX: {item.text}")
        if mnemonic == "movsd" and not operands:
            return (b"\xf3" if start else b"") + b"\xa5"
        if mnemonic == "push" and re.fullmatch(r"-?[0-9]+", replaced):
            return self._push(item, int(replaced))
        return self._keystone(item, " ".join((*words[:start], mnemonic, replaced)))

    def _operand(self, item: _Item, text: str) -> str:
        """One operand as keystone takes it: constants computed here, no symbols left."""
        replaced = substitute(text, self._lookup(item))
        if "[" in text:
            return _MEMORY.sub(self._absolute, replaced) if item.bits == 64 else replaced
        if any(word.lower() in RESERVED for word in IDENTIFIER.findall(text)):
            return replaced
        return str(evaluate(replaced, {}))

    @staticmethod
    def _check_width(parts: list[str]) -> None:
        if len(parts) == 2 and parts[0] and re.fullmatch(r"-?[0-9]+", parts[1]):
            bits = register_bits(parts[0].split()[0])
            if bits and not -(1 << (bits - 1)) <= int(parts[1]) < 1 << bits:
                raise ExpressionError(f"{int(parts[1]):#x} does not fit {bits} bits")

    @staticmethod
    def _push(item: _Item, value: int) -> bytes:
        if -128 <= value <= 127:
            return b"\x6a" + value.to_bytes(1, "little", signed=True)
        if not -(1 << 31) <= value < 1 << 31:
            raise AssemblyError(f"{item.where}: push takes 32 signed bits: {item.text}")
        return b"\x68" + value.to_bytes(4, "little", signed=True)

    @staticmethod
    def _absolute(match: re.Match[str]) -> str:
        inside = match.group(1)
        decimal = re.sub(r"0[xX][0-9a-fA-F]+", lambda m: str(int(m.group(0), 16)), inside)
        registers = _WORD.findall(decimal)
        offset = evaluate(re.sub(r"[A-Za-z]\w*(\s*\*\s*[1248])?", "0", decimal), {})
        if not -(1 << 31) <= offset < 1 << 31:
            raise ExpressionError("a displacement has 32 signed bits (use a register)")
        return f"[riz*1 + {offset}]" if not registers else match.group(0)

    def _far32(self, item: _Item, mnemonic: str, operands: str) -> bytes:
        if mnemonic == "lgdt":
            address = self._value(item, operands.strip().strip("[]"))
            return b"\x0f\x01\x15" + address.to_bytes(4, "little")
        selector, _, offset = operands.partition(":")
        return (b"\xea" + self._value(item, offset).to_bytes(4, "little")
                + self._value(item, selector).to_bytes(2, "little"))

    def _keystone(self, item: _Item, text: str) -> bytes:
        key = (item.bits, text)
        found = self._cache.get(key)
        if found is None:
            try:
                code, _ = self._engines[item.bits].asm(text, item.address)
            except KsError as error:
                reason = str(error).split(" (KS_ERR")[0].lower()
                raise AssemblyError(f"{item.where}: {reason}: {item.text}") from error
            if not code:
                raise AssemblyError(f"{item.where}: no instruction: {item.text}")
            found = self._cache[key] = bytes(code)
        return found

    def _bytes(self, item: _Item) -> bytes:
        if item.fixed is not None:
            return item.fixed
        if item.kind == "branch":
            return self._branch(item)
        if item.kind == "insn":
            code = self._encode(item)
            return code + b"\x90" * (item.length - len(code))
        if item.kind == "data":
            return b"".join(self._datum(item, text) for text in item.operands)
        return bytes(item.length)

    def _datum(self, item: _Item, text: str) -> bytes:
        value = self._value(item, text)
        bits = item.width * 8
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise AssemblyError(f"{item.where}: {value:#x} does not fit {item.width} bytes: {item.text}")
        return (value & ((1 << bits) - 1)).to_bytes(item.width, "little")

    def _branch(self, item: _Item) -> bytes:
        if len(item.operands) != 1:
            raise AssemblyError(f"{item.where}: one target expected: {item.text}")
        distance = self._value(item, item.operands[0]) - item.address - item.length
        condition = _CONDITIONS.get(item.name[1:], 0)
        if item.length == 2:
            opcode = _SHORT_ONLY.get(item.name) or (
                b"\xeb" if item.name == "jmp" else bytes([0x70 + condition]))
            return opcode + distance.to_bytes(1, "little", signed=True)
        opcode = {"jmp": b"\xe9", "call": b"\xe8"}.get(item.name, bytes([0x0F, 0x80 + condition]))
        return opcode + distance.to_bytes(4, "little", signed=True)

    # -- result --------------------------------------------------------------------------------------

    def _finish(self, entry: str, source: str) -> Program:
        if entry not in self._labels:
            raise AssemblyError(f"{source}:1: no '{entry}': a payload needs .include \"runtime.inc\"")
        listing: list[Line] = []
        blobs: dict[str, bytes] = {}
        for name, items in self._parts.items():
            blob = bytearray()
            for item in items:
                code = b"" if item.kind == "label" or name == "bss" else self._bytes(item)
                if item.kind == "align" and name in ("multiboot", "text"):
                    code = b"\xcc" * item.length
                blob += code
                listing.append(Line(item.address, code, item.bits, item.where, item.text))
            blobs[name] = bytes(blob)
        blobs["text"] = blobs.pop("multiboot") + blobs["text"]
        sections = {name: (self._bounds[f"__{name}_start"],
                           self._bounds[f"__{name}_end"] - self._bounds[f"__{name}_start"], blobs[name])
                    for name in SECTIONS}
        symbols = {name: item.address for name, item in self._labels.items()
                   if not name.startswith("__here_")}
        return Program(self._labels[entry].address, sections, symbols, listing)

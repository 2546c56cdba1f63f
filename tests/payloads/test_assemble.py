"""Layout, branches, data, and keystone's traps."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest_payloads.assemble import Assembler, Program
from guest_payloads.preprocess import AssemblyError, Preprocessor

BASE = 0x100000


def program_of(tmp_path: Path, text: str, **constants: int) -> Program:
    path = tmp_path / "a.s"
    path.write_text("start:\n" + text)
    source = Preprocessor(tmp_path, constants)
    statements = source.run(path)
    return Assembler(constants, source.equates, BASE).assemble(statements, "start", path.name)


def code_of(tmp_path: Path, text: str, **constants: int) -> bytes:
    return program_of(tmp_path, text, **constants).sections["text"][2]


def error_of(tmp_path: Path, text: str) -> str:
    with pytest.raises(AssemblyError) as caught:
        program_of(tmp_path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_absolute_address_is_neither_rip_relative_nor_rsp(tmp_path: Path) -> None:
    assert code_of(tmp_path, "mov rax, [0x101000]").hex() == "488b042500101000"
    assert code_of(tmp_path, "mov qword ptr [0x101000], 5").hex() == "48c704250010100005000000"
    assert code_of(tmp_path, "mov rax, [v + 8]", v=0x101000).hex() == "488b042508101000"
    assert code_of(tmp_path, "call qword ptr [rax*8 + v]", v=0x103000).hex() == "ff14c500301000"


def test_displacements_and_pushes_that_would_be_cut_are_refused(tmp_path: Path) -> None:
    for text in ("mov rax, [rbx + 0xfee00000]", "mov eax, [0xfee00000]"):
        assert error_of(tmp_path, text).startswith("a.s:2: a displacement has 32 signed bits")
    assert error_of(tmp_path, "push 0x80000000").startswith("a.s:2: push takes 32 signed bits")


@pytest.mark.parametrize("text", ["iret", "pushf", "popf"])
def test_sixteen_bit_forms_are_refused(tmp_path: Path, text: str) -> None:
    assert error_of(tmp_path, text) == f"a.s:2: write {text}q: {text}"


def test_a_high_byte_with_rex_does_not_end_the_process(tmp_path: Path) -> None:
    assert "cannot be used with REX" in error_of(tmp_path, "mov [r13], dh")
    assert code_of(tmp_path, "mov [rsi], dh").hex() == "8836"


def test_32_bit_far_jump_and_lgdt_have_32_bit_operands(tmp_path: Path) -> None:
    code = code_of(tmp_path, ".bits 32\nlgdt [0x101000]\nljmp 8:0x100100")
    assert code.hex() == "0f011500101000" "ea000110000800"


def test_a_pushed_constant_is_the_one_that_was_written(tmp_path: Path) -> None:
    assert code_of(tmp_path, "push 0xffff").hex() == "68ffff0000"
    assert code_of(tmp_path, "push -128").hex() == "6a80"
    assert code_of(tmp_path, "push 128").hex() == "6880000000"
    assert code_of(tmp_path, "push v", v=0x101000).hex() == "6800101000"


def test_branches_are_short_where_they_reach(tmp_path: Path) -> None:
    assert code_of(tmp_path, "jmp a\n.skip 127\na: ret")[:1] == b"\xeb"
    assert code_of(tmp_path, "jmp a\n.skip 128\na: ret")[:1] == b"\xe9"
    assert code_of(tmp_path, "back: .skip 126\njne back")[-2:] == b"\x75\x80"
    assert code_of(tmp_path, "back: .skip 127\njne back")[-6:-4] == b"\x0f\x85"
    assert code_of(tmp_path, "call start") == b"\xe8\xfb\xff\xff\xff"
    assert error_of(tmp_path, "back: .skip 200\nloop back").startswith("a.s:3: target too far")


def test_growing_branches_settle(tmp_path: Path) -> None:
    text = "".join(f"l{i}: jne l{(i + 40) % 80}\n.skip 1\n" for i in range(80))
    program = program_of(tmp_path, text)
    assert program.sections["text"][1] == len(program.sections["text"][2])


def test_local_labels_belong_to_the_last_plain_one(tmp_path: Path) -> None:
    code = code_of(tmp_path, "a: .x: jmp .x\nb: .x: jmp .x\njmp a.x")
    assert code.hex() == "ebfeebfeebfa"


def test_sections_begin_on_pages_in_order(tmp_path: Path) -> None:
    text = ("ret\n.section data\nd: .quad b, __image_end, $\n.section bss\nb: .skip 5000\n"
            ".section rodata\nr: .asciz \"x\", \"yz\"\n.byte 'A', -1\n")
    sections = program_of(tmp_path, text).sections
    assert sections["text"] == (BASE, 1, b"\xc3")
    assert sections["rodata"] == (BASE + 0x1000, 7, b"x\0yz\0A\xff")
    address, _, data = sections["data"]
    words = [int.from_bytes(data[i:i + 8], "little") for i in (0, 8, 16)]
    assert words == [BASE + 0x3000, BASE + 0x3000 + 5000, address]
    assert sections["bss"] == (BASE + 0x3000, 5000, b"")


def test_constants_use_every_operator(tmp_path: Path) -> None:
    code = code_of(tmp_path, "mov eax, ~(A | 2) & 0xff\nmov al, 'B' - 'A' + 010\nmov ecx, A << 4 == 16", A=1)
    assert code.hex() == "b8fc000000" "b009" "b901000000"


@pytest.mark.parametrize(("text", "message"), [
    ("nop\nfrobnicate rax\n", "a.s:3: invalid mnemonic: frobnicate rax"),
    ("mov al, 256\n", "a.s:2: 0x100 does not fit 8 bits: mov al, 256"),
    ("mov qword ptr [rax], 1 << 64\n", "a.s:2: 0x10000000000000000 does not fit 64 bits"),
    ("mov al, conter\ncounter: ret\n", "a.s:2: unknown symbol 'conter', did you mean counter?: mov al, "),
    ("a: ret\na: ret\n", "a.s:3: a is defined twice (first at a.s:2)"),
    ("rax: ret\n", "a.s:2: rax is already the name of something else"),
    (".section stack\n", "a.s:2: no section 'stack' (there are multiboot, text, rodata, data, bss)"),
    (".byte 256\n", "a.s:2: 0x100 does not fit 1 bytes: .byte 256"),
    (".frob 1\n", "a.s:2: unknown directive '.frob 1'"),
    (".section bss\nx: .quad 1\n", "a.s:3: .bss has no bytes: only .skip and .align"),
    (".align 3\n", "a.s:2: alignment is not a power of two: .align 3"),
    ('.ascii "open\n', 'a.s:2: bad string "open'),
    ("mov rax, (1\n", "a.s:2: "),
])
def test_errors_are_one_line_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    assert error_of(tmp_path, text).startswith(message)

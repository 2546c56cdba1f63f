"""Payloads by name and by path, their documentation, and what keystone made of every line."""

from __future__ import annotations

import re
from pathlib import Path

import capstone
import pytest

from emu import abi
from guest_payloads.builder import (
    LIBRARY,
    AssemblyError,
    PayloadError,
    assemble,
    build,
    payload_info,
    payload_names,
    payloads,
)

MINE = """; mine: adds
.include "runtime.inc"
main:
    mov eax, 2
    add eax, 2
    CHECK_EQ "two and two", rax, 4
    ret
"""
SAME_MNEMONIC = {
    "jz": "je", "jnz": "jne", "jc": "jb", "jnc": "jae", "setc": "setb", "setz": "sete", "sysret": "sysretq",
    "retfq": "retfq", "movabs": "mov", "jnae": "jb", "sal": "shl", "xlatb": "xlatb",
}


def test_every_payload_of_the_list_is_there() -> None:
    assert set(payload_names()) >= {
        "aging", "dirty-log", "ept-access", "first-touch", "flash", "fork-cow", "guest-paging", "gvt",
        "idt-swapped",
        "kvmclock", "migrate", "mmio", "paging-32bit", "paging-5level", "paging-pae", "protect",
        "race", "selfmod", "slots", "smm", "smp", "swap-storm", "syscalls", "timer",
    }


@pytest.mark.parametrize("name", payload_names())
def test_the_same_bytes_every_time(name: str) -> None:
    assert build(name) == build(LIBRARY / f"{name}.s")


def test_every_payload_documents_itself() -> None:
    for info in payloads():
        assert info.title, info.name
        assert info.doc, info.name
        assert all(param.default.isdigit() and param.doc for param in info.params), info.name
        for call in info.vmcalls:
            abi.vmcall_by_name(call)


@pytest.mark.parametrize("name", payload_names())
def test_the_header_names_the_params_and_vmcalls_of_the_source(name: str) -> None:
    text = (LIBRARY / f"{name}.s").read_text()
    # The runtime, which all have, says for itself what it asks for.
    own = re.findall(r'^\.include "((?!runtime)[\w-]+\.inc)"', text, re.M)
    text += "".join((LIBRARY / file).read_text() for file in own)
    info = payload_info(name)
    assert {p.name for p in info.params} == set(re.findall(r'PARAM \w+, "(\w+)"', text))
    used = {match.lower() for match in re.findall(r"VMCALL_(\w+)", text)}
    assert set(info.vmcalls) == used
    for param in info.params:
        default = re.search(rf'PARAM \w+, "{param.name}", (\w+)', text)
        assert default is not None
        constant = re.search(rf"^\.equ {default.group(1)}, (\w+)", text, re.M)
        word = constant.group(1) if constant else default.group(1)
        assert word in (param.default, "MAX_CPUS")


def test_an_unknown_name_gets_close_ones() -> None:
    with pytest.raises(PayloadError, match=r"^no payload 'swap-strom'; did you mean swap-storm"):
        build("swap-strom")
    with pytest.raises(PayloadError, match=r"^no payload 'zzzzzz'; there are aging, "):
        build("zzzzzz")
    with pytest.raises(PayloadError, match=r"^gone\.s: no such file$"):
        build("gone.s")


def test_the_users_own_file_has_the_same_runtime(tmp_path: Path) -> None:
    path = tmp_path / "mine.s"
    path.write_text(MINE)
    image = build(path)
    assert image == build(str(path))
    assert b"two and two\0" in image
    assert payload_info(path).title == "adds"


def test_the_bytes_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.s").write_text(MINE)
    assert build(tmp_path / "a" / "mine.s") == build(tmp_path / "b" / "mine.s")


@pytest.mark.parametrize(("text", "message"), [
    (MINE.replace("add eax, 2", "ad eax, 2"), "mine.s:5: invalid mnemonic: ad eax, 2"),
    (MINE.replace("main:", "mian:"), "boot.inc:"),
    ("nop\n", "mine.s:1: no 'multiboot_entry': a payload needs .include \"runtime.inc\""),
    (MINE + ".section bss\n.skip 0x200000\n", "mine.s:1: the image ends at "),
])
def test_bad_source_is_one_line_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.s"
    path.write_text(text)
    with pytest.raises(AssemblyError) as caught:
        build(path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", payload_names())
def test_a_disassembler_reads_back_every_mnemonic(name: str) -> None:
    decoders = {32: capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32),
                64: capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)}
    for line in assemble(name).listing:
        if not line.code or line.text.endswith(":") or line.text.startswith("."):
            continue
        decoded = list(decoders[line.bits].disasm(line.code, line.address))
        first = decoded[0]
        assert [i.size for i in decoded] == [len(line.code)], line
        words = line.text.lower().split()
        if words[0] in ("lock", "rep", "repe"):
            words = words[1:]
        got = first.mnemonic.split()[-1]
        assert SAME_MNEMONIC.get(got, got) == SAME_MNEMONIC.get(words[0], words[0]), (line, first)


@pytest.mark.parametrize("name", payload_names())
def test_code_and_data_are_on_pages_of_their_own(name: str) -> None:
    sections = assemble(name).sections
    pages = [set(range(a >> 12, (a + size + 4095) >> 12)) for a, size, _ in sections.values()]
    assert sum(len(p) for p in pages) == len(set().union(*pages))

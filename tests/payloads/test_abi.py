"""The ABI is consistent with itself."""

from __future__ import annotations

import ast
from pathlib import Path

from emu import abi


def test_every_vmcall_constant_has_its_record() -> None:
    constants = {name[7:].lower(): value for name, value in vars(abi).items()
                 if name.startswith("VMCALL_") and isinstance(value, int)}
    assert {call.name: call.nr for call in abi.VMCALLS} == constants
    assert len({call.nr for call in abi.VMCALLS}) == len(abi.VMCALLS)
    assert all(len(call.args) <= 4 and call.doc for call in abi.VMCALLS)


def test_lookup_by_name_and_number() -> None:
    call = abi.vmcall_by_name("swap_out")
    assert abi.vmcall_by_number(call.nr) is call
    assert abi.vmcall_by_number(1) is None


def test_the_signature_leaf_spells_the_name() -> None:
    highest, ebx, ecx, edx = abi.cpuid_signature_leaf()
    assert highest == abi.CPUID_KERNEL_LEAF
    assert b"".join(word.to_bytes(4, "little") for word in (ebx, ecx, edx)) == b"refault\0\0\0\0\0"


def test_it_imports_nothing_of_the_machine() -> None:
    tree = ast.parse(Path(abi.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules <= {"__future__", "typing"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]

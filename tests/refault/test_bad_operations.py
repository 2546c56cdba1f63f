"""Ranges that no operation takes: refused with the errno by Python and by vmcall, and nothing is done."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

import emu.operations  # noqa: F401  (fills the registry)
import refault
from emu.hostops import OPERATIONS

MEMORY = 8 << 20
RANGES = {
    "unaligned": (0x200001, 1, errno.EINVAL),
    "negative": (-4096, 1, errno.EINVAL),
    "of nothing": (0x200000, 0, errno.EINVAL),
    "less than nothing": (0x200000, -1, errno.EINVAL),
    "outside every slot": (0x9000_0000, 1, errno.EFAULT),
    "beyond the slot's end": (MEMORY - 4096, 2, errno.EFAULT),
    "of more pages than there are": (0x200000, 1 << 52, errno.EFAULT),
    "beyond every address": ((1 << 64) - 4096, 2, errno.EFAULT),
}
TAKERS = sorted(
    name for name, operation in OPERATIONS.items()
    # What makes its range takes any that is free.
    if operation.takes_a_range and not name.endswith("_create")
)
PLAIN = ("emu.operations.memory", "emu.operations.mapping", "emu.operations.ksm")
"""Operations on any guest memory; others may know of more that is wrong, and then EINVAL comes first."""


@pytest.fixture(scope="module")
def vm() -> Iterator[refault.VM]:
    with refault.VM(MEMORY, check=True) as vm:
        vm.host.host_write(0x200000, 7)
        yield vm


@pytest.mark.parametrize("which", RANGES)
@pytest.mark.parametrize("name", TAKERS)
def test_a_bad_range_is_refused_and_nothing_is_done(vm: refault.VM, name: str, which: str) -> None:
    gpa, pages, expected = RANGES[which]
    allowed = {expected} if OPERATIONS[name].run.__module__ in PLAIN else {expected, errno.EINVAL}
    operation = getattr(vm.host, name)
    regions = [(region.gpa, region.size, region.flags) for region in vm.board.memory.regions]
    with vm.trace("refault:mmu_notifier_start") as brackets, pytest.raises(refault.KernelError) as refused:
        operation(gpa=gpa, pages=pages)
    assert refused.value.errno in allowed, refused.value
    assert str(refused.value).startswith(f"{errno.errorcode[refused.value.errno]}: ")
    assert [(region.gpa, region.size, region.flags) for region in vm.board.memory.regions] == regions
    assert not len(brackets)
    assert vm.host.host_read(0x200000) == 7


def test_what_is_no_number_is_refused(vm: refault.VM) -> None:
    with pytest.raises(refault.KernelError, match=r"EINVAL: swap_out: gpa='x' is not a number"):
        vm.host.swap_out("x")  # type: ignore[arg-type]


def test_a_guest_gets_the_errno_as_a_negative_number(tmp_path: Path) -> None:
    calls = "".join(
        f"    mov rdi, {gpa & (1 << 64) - 1}\n    mov rsi, {pages & (1 << 64) - 1}\n"
        f'    HOST4 VMCALL_{name.upper()}, rdi, rsi, 0, 0\n    CHECK_EQ "{name}", rax, -{expected}\n'
        for name in ("swap_out", "migrate", "mlock", "cold", "mremap")
        for gpa, pages, expected in (RANGES["unaligned"], RANGES["of nothing"], RANGES["outside every slot"])
    )
    path = tmp_path / "bad.s"
    path.write_text(f'; bad: ranges\n.include "runtime.inc"\n\nmain:\n{calls}    ret\n')
    with refault.VM(MEMORY) as vm:
        vm.load(str(path))
        assert vm.run().status == 0, vm.serial
        assert vm.serial.count("PASS") == 15

"""Moves of a process's memory to one far address, and what is found there."""

from __future__ import annotations

from host_mm.arch.x86.pgtable import walk_lockless
from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from tests.host_mm.machine import PAGE, Vmm

M2 = 2 << 20


G1 = 1 << 30


AWAY = 0x600000000000


MOVE = MREMAP_MAYMOVE | MREMAP_FIXED


BREAK = "mremap-flush-after-unlock"


def move(vm: Vmm, offset: int, length: int, to: int, flags: int = MOVE) -> int:
    return do_mremap(vm.mm, vm.base + offset, length, length, flags, to)


def entry(vm: Vmm, address: int) -> int:
    value, level = walk_lockless(vm.host.ram, vm.mm.pgd, address)
    return value if level == 1 else 0


def written(vm: Vmm, pages: int, first: int = 0) -> None:
    for page in range(first, first + pages):
        vm.host_write(page * PAGE, page + 1)
    vm.host.lru.lru_add_drain_all()
    vm.brackets()


def read(vm: Vmm, address: int) -> int:
    return vm.host_read(address - vm.base)

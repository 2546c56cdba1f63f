"""Scenarios of memory slots, as they were run on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios import scenario
from refault.scenarios.api import KVM_MEM_READONLY, PAGE, Scenario

__all__: list[str] = []


@scenario()
def memslot(s: Scenario) -> None:
    """Deleting or moving a slot zaps everything at once; where no slot is, every access is MMIO."""
    s.st(0x3000, 1)
    s.st(0x4000, 2)
    s.delete_slot("delete slot 1")
    s.ld(0x3000, "no slot: MMIO")
    s.complete("complete mmio")
    s.set_slot("recreate slot 1")
    s.ld(0x3000)
    s.set_slot("MOVE slot 1 to gpa +0x20000000", offset=0x2000_0000)
    s.ld(0x3000)
    s.complete("complete mmio")
    s.set_slot("move back")
    s.ld(0x3000)
    s.set_slot("overlap slot 2 (expect EEXIST)", 2, 0x1000, PAGE)
    s.set_slot("slot 1 new hva (expect EINVAL)", memory=PAGE)
    s.set_slot("slot 1 ro flag toggle (expect EINVAL)", flags=KVM_MEM_READONLY)


@scenario(slot_flags=KVM_MEM_READONLY)
def readonly_slot(s: Scenario) -> None:
    """A read-only slot is mapped for reading; a store to it is MMIO, and nothing of it reaches memory."""
    s.hw(0x3000, 0x77)
    s.ld(0x3000)
    s.st(0x3000, 1, "ro slot")
    s.complete()
    s.ld(0x3000)
    s.ld(0x4000, "unpopulated")


@scenario()
def mmio(s: Scenario) -> None:
    """What no slot shows is MMIO each time; a slot made there is memory from the next access on."""
    for _ in range(2):
        s.ld(0x1000_0000, "unbacked gpa")
        s.complete()
    s.st(0x1000_0000, 5, "unbacked gpa")
    s.complete()
    memory = s.memory_for_slot(0x20_0000)
    s.set_slot("add slot 3 there", 3, 0x1000_0000, 0x20_0000, memory)
    s.st(0x1000_0000, 6)
    s.ld(0x1000_0000)


@scenario(repeats="but for frames")
def gmem(s: Scenario) -> None:
    """A guest_memfd that starts shared is the guest's and the VMM's memory; a hole in it unmaps both."""
    s.guest_memfd(0x20_0000, 3, "KVM_CREATE_GUEST_MEMFD flags=MMAP|INIT_SHARED")
    s.mmap_guest_memfd("mmap gmem")
    s.set_guest_memfd_slot(4, 0x100_0000, "SET_USER_MEMORY_REGION2 slot4 gmem")
    s.st(0x100_3000, 0x99)
    s.read_guest_memfd(0x3000, "host read via mmap")
    s.punch_guest_memfd(0x3000, PAGE, "fallocate PUNCH_HOLE")
    s.ld(0x100_3000)

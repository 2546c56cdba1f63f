"""What a machine must do to run scenarios: the contract of the two back ends.

Offsets count from D, the data slot; see api.py. Every method returns what the step's mark shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Backend"]


class Backend(Protocol):
    """A machine that does what a scenario asks. Every method returns what the step's mark shows."""

    def mark(self, text: str) -> None:
        """Put a line into the event sequence."""
        ...

    def load(self, offset: int) -> Any:
        """A guest load of 8 bytes at D + offset: the value, or the exit that came instead."""
        ...

    def store(self, offset: int, value: int) -> Any:
        """A guest store of 8 bytes."""
        ...

    def read_modify_write(self, offset: int) -> Any:
        """A guest `inc qword`."""
        ...

    def instruction(self, code: str, offset: int, **registers: int) -> Any:
        """One guest instruction, by a name of guest.INSTRUCTIONS or in hex; RSI and RDI are at D + offset."""
        ...

    def fetch(self, offset: int) -> Any:
        """The guest executes what is at D + offset, which must end in `out 0xf4, al` (hex e6f4)."""
        ...

    def complete(self, value: int) -> Any:
        """KVM_RUN after an MMIO exit; a load gets `value`."""
        ...

    def loop(self, offset: int, count: int, beside: Sequence[tuple[int, str, tuple[Any, ...]]]) -> Any:
        """A guest loop of `count` turns that stores to the page at D + offset and to the one after it.

        Meanwhile another thread of the VMM does `beside`: (ns to sleep before, method of this, arguments).
        """
        ...

    def use_vcpu(self, number: int) -> None:
        """What the guest does from now on, this vCPU does."""
        ...

    def poke(self, offset: int, data: bytes) -> Any:
        """The VMM stores bytes."""
        ...

    def poke_pte(self, offset: int, entry: int) -> Any:
        """The VMM stores the guest's PTE of D + offset."""
        ...

    def store_pte(self, offset: int, entry: int) -> Any:
        """The guest stores its PTE of D + offset."""
        ...

    def load_cr3(self, root: int) -> Any:
        """KVM_SET_SREGS with another CR3, or the same."""
        ...

    def host_write(self, offset: int, value: int) -> Any:
        """The VMM stores 8 bytes."""
        ...

    def host_read(self, offset: int) -> Any:
        """The VMM loads 8 bytes."""
        ...

    def madvise(self, offset: int, length: int, advice: str) -> Any:
        """madvise(2) with MADV_<advice>."""
        ...

    def mprotect(self, offset: int, length: int, prot: int) -> Any:
        """mprotect(2)."""
        ...

    def munmap(self, offset: int, length: int) -> Any:
        """munmap(2)."""
        ...

    def mmap_fixed(self, offset: int, length: int) -> Any:
        """Fresh private anonymous memory at D + offset."""
        ...

    def mlock(self, offset: int, length: int) -> Any:
        """mlock(2)."""
        ...

    def munlock(self, offset: int, length: int) -> Any:
        """munlock(2)."""
        ...

    def fork(self) -> Any:
        """fork(2); the child sleeps."""
        ...

    def child_exit(self) -> Any:
        """The child exits and is reaped."""
        ...

    def clear_refs(self, kind: int) -> Any:
        """Write to /proc/self/clear_refs."""
        ...

    def pin(self, offset: int) -> Any:
        """A long-term pin for writing of the page at D + offset, as an io_uring fixed buffer takes."""
        ...

    def unpin(self) -> Any:
        """Give every pin back."""
        ...

    def fill(self, offset: int, byte: int) -> Any:
        """The VMM fills the page at D + offset."""
        ...

    def mergeable(self, offset: int, length: int) -> Any:
        """madvise(2) with MADV_MERGEABLE; 0."""
        ...

    def ksmd(self, use_zero_pages: bool) -> Any:
        """ksmd runs until there is nothing left to merge, then stops."""
        ...

    def operation(self, name: str, *args: int) -> Any:
        """A host operation of the registry; a `gpa` is given as an offset from D. Emulator only."""
        ...

    def begin(self) -> None:
        """What was before is no part of the event sequence."""
        ...

    def arrange(self, blocks: Sequence[Sequence[int]]) -> None:
        """Put the pages of each list into a page block near the bottom of memory, the first highest, and
        every other page of both slots near the top. Offsets from D."""
        ...

    def bring_in(self, offset: int, byte: int) -> None:
        """A page of another mapping, filled, is moved to D + offset (mremap)."""
        ...

    def frames(self, offsets: Sequence[int]) -> list[int]:
        """Which frame each page is in."""
        ...

    def compact_memory(self) -> Any:
        """A write to /proc/sys/vm/compact_memory."""
        ...

    def move_pages(self, offset: int, node: int) -> Any:
        """move_pages(2) of one page with MPOL_MF_MOVE_ALL."""
        ...

    def mbind(self, offset: int, length: int, node: int) -> Any:
        """mbind(2) with MPOL_BIND and MPOL_MF_MOVE."""
        ...

    def nothing(self) -> Any:
        """A step that only says what was found."""
        ...

    def slow_load(self, offset: int, ns: int) -> Any:
        """A guest load after which the VMM's thread loses the CPU for `ns`."""
        ...

    def settle(self) -> None:
        """Empty the LRU's batches (lru_add_drain), whose references let pages be copied or kept."""
        ...

    def idle(self, ns: int) -> Any:
        """The VMM sleeps."""
        ...

    def punch_hole(self, offset: int, length: int) -> Any:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE in the file that D shows."""
        ...

    def ftruncate(self, size: int) -> Any:
        """ftruncate(2) of that file."""
        ...

    def fsync(self) -> Any:
        """fsync(2) of that file."""
        ...

    def pwrite(self, offset: int, data: bytes) -> Any:
        """pwrite(2) into that file."""
        ...

    def damon_on(self, offset: int) -> Any:
        """kdamond watches the frame behind D + offset, by physical address, a sample every 5 ms."""
        ...

    def damon_off(self) -> Any:
        """kdamond ends."""
        ...

    def memcg_enter(self) -> Any:
        """The VMM's process moves to a memory cgroup of its own."""
        ...

    def memcg_leave(self) -> Any:
        """It moves back to the root; what it has stays charged."""
        ...

    def memcg_limit(self, pages: int) -> Any:
        """memory.limit_in_bytes of the group becomes `pages` less than its usage."""
        ...

    def memcg_squeeze(self, pages: int) -> Any:
        """The limit becomes `pages` less than the usage, then none."""
        ...

    def own_pages(self, pages: int) -> Any:
        """The VMM writes so many fresh pages of its own, of no slot."""
        ...

    def pages_gone(self, pages: int) -> Any:
        """Whether any of the first pages of D has no frame."""
        ...

    def uffd_api(self) -> Any:
        """userfaultfd(2) and UFFDIO_API; 0."""
        ...

    def uffd_register(self, mode: int) -> Any:
        """UFFDIO_REGISTER of the data slot."""
        ...

    def uffd_answer(self, kind: str) -> None:
        """From now on a thread of the VMM answers faults by UFFDIO_COPY ("copy") or _ZEROPAGE ("zero")."""
        ...

    def uffd_copy(self, offset: int) -> Any:
        """UFFDIO_COPY of the page that the thread copies, too; 0."""
        ...

    def mremap(self, offset: int, length: int, to: int) -> Any:
        """mremap(2) with MREMAP_MAYMOVE | MREMAP_FIXED to D + `to`: the offset it is at."""
        ...

    def memory_for_slot(self, size: int) -> int:
        """Fresh private memory of the VMM's that no slot shows; its offset from D."""
        ...

    def set_slot(self, slot: int, offset: int, size: int, memory: int, flags: int) -> Any:
        """KVM_SET_USER_MEMORY_REGION: the VMM's memory at D + `memory` is the guest's at D + `offset`."""
        ...

    def create_guest_memfd(self, size: int, flags: int) -> Any:
        """KVM_CREATE_GUEST_MEMFD."""
        ...

    def mmap_guest_memfd(self) -> Any:
        """The VMM maps that file."""
        ...

    def set_guest_memfd_slot(self, slot: int, offset: int) -> Any:
        """KVM_SET_USER_MEMORY_REGION2 of that file, with its mapping."""
        ...

    def read_guest_memfd(self, offset: int) -> Any:
        """The VMM loads 8 bytes through its mapping of that file, in hex."""
        ...

    def punch_guest_memfd(self, offset: int, length: int) -> Any:
        """A hole in that file."""
        ...

    def log_dirty(self, on: bool) -> Any:
        """KVM_SET_USER_MEMORY_REGION of the data slot with KVM_MEM_LOG_DIRTY_PAGES set or clear."""
        ...

    def get_dirty_log(self) -> Any:
        """KVM_GET_DIRTY_LOG of the data slot: the dirty pages' numbers."""
        ...

    def count_dirty_log(self) -> Any:
        """The same; how many they are, and the first six."""
        ...

    def enable_manual_protect(self, value: int) -> Any:
        """KVM_ENABLE_CAP of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; 0."""
        ...

    def clear_dirty_log(self, first: int, count: int, pages: Sequence[int]) -> Any:
        """KVM_CLEAR_DIRTY_LOG of `count` pages from `first` with a mask of `pages`; 0."""
        ...

    def dirty_ring(self) -> Any:
        """(flags, slot, offset) of the first six entries of vCPU 0's dirty ring."""
        ...

    def reset_dirty_rings(self) -> Any:
        """Harvest what the first eight entries have and KVM_RESET_DIRTY_RINGS; what it answers."""
        ...

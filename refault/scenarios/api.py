"""What a scenario can do.

The machine: one vCPU at CPL 3 in long mode; the data slot of 8 MiB at gpa 0x10000000, written `D`,
which the guest maps with 4 KiB pages and the host without huge pages; slot 0 with code and tables.
Offsets count from `D`, in the guest and in the VMM alike. Each guest access is one KVM_RUN.

A step has a title, which is part of what is compared, and a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["DATA_GPA", "DATA_SIZE", "PAGE", "PROT_NONE", "PROT_READ", "PROT_RW", "Backend", "Scenario"]

DATA_GPA = 0x1000_0000
DATA_SIZE = 0x80_0000
PAGE = 4096
PROT_NONE, PROT_READ, PROT_RW = 0, 1, 3


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


class Scenario:
    """The steps, told to a back end. Titles follow the recordings'."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def _step(self, title: str, method: str, *args: Any) -> Any:
        self.backend.mark(f">> {title}")
        result = getattr(self.backend, method)(*args)
        self.backend.mark(f"<< {title}: {result}")
        return result

    def ld(self, offset: int, note: str = "", *, takes: int = 0) -> Any:
        """A guest load; `takes`: for how many ns its thread loses the CPU before the step ends."""
        title = f"guest ld D+{offset:#x} {note}"
        return self._step(title, "slow_load", offset, takes) if takes else self._step(title, "load", offset)

    def st(self, offset: int, value: int, note: str = "") -> Any:
        """A guest store."""
        return self._step(f"guest st D+{offset:#x}={value:#x} {note}", "store", offset, value)

    def rmw(self, offset: int) -> Any:
        """A guest read-modify-write."""
        return self._step(f"guest rmw D+{offset:#x}", "read_modify_write", offset)

    def hw(self, offset: int, value: int) -> Any:
        """The VMM writes."""
        return self._step(f"host write D+{offset:#x}={value:#x}", "host_write", offset, value)

    def hr(self, offset: int) -> Any:
        """The VMM reads."""
        return self._step(f"host read D+{offset:#x}", "host_read", offset)

    def madv(self, offset: int, length: int, advice: str, title: str = "") -> Any:
        """madvise."""
        return self._step(
            title or f"host madvise(D+{offset:#x},{length:#x},{advice})", "madvise", offset, length, advice
        )

    def mprotect(self, offset: int, length: int, prot: int, title: str = "") -> Any:
        """mprotect."""
        title = title or f"mprotect(D+{offset:#x},{length:#x},{prot})"
        return self._step(title, "mprotect", offset, length, prot)

    def munmap(self, offset: int, length: int, title: str) -> Any:
        """munmap."""
        return self._step(title, "munmap", offset, length)

    def mmap_fixed(self, offset: int, length: int, title: str) -> Any:
        """mmap(MAP_FIXED)."""
        return self._step(title, "mmap_fixed", offset, length)

    def mlock(self, offset: int, length: int) -> Any:
        """mlock."""
        return self._step("mlock", "mlock", offset, length)

    def munlock(self, offset: int, length: int) -> Any:
        """munlock."""
        return self._step("munlock", "munlock", offset, length)

    def fork(self) -> Any:
        """fork."""
        return self._step("host fork()", "fork")

    def child_exit(self) -> Any:
        """The child's exit."""
        return self._step("child exit", "child_exit")

    def clear_refs(self, kind: int) -> Any:
        """clear_refs."""
        return self._step(f"clear_refs {kind}", "clear_refs", kind)

    def pin(self, offset: int, title: str) -> Any:
        """A long-term pin."""
        return self._step(title, "pin", offset)

    def unpin(self, title: str) -> Any:
        """Pins back."""
        return self._step(title, "unpin")

    def op(self, name: str, *args: int) -> Any:
        """A host operation by its name in the registry (`refault list operations`); emulator only."""
        shown = ",".join(f"{arg:#x}" for arg in args)
        return self._step(f"host {name}({shown})", "operation", name, *args)

    def fill(self, offset: int, byte: int) -> None:
        """The VMM fills a page with one byte; no step."""
        self.backend.fill(offset, byte)

    def mergeable(self, offset: int, length: int, title: str = "") -> None:
        """MADV_MERGEABLE; a step only with a title."""
        if title:
            self._step(title, "mergeable", offset, length)
        else:
            self.backend.mergeable(offset, length)

    def arrange(self, *blocks: Sequence[int]) -> None:
        """Where the frames of pages lie; no step."""
        self.backend.arrange(blocks)

    def bring_in(self, offset: int, byte: int) -> None:
        """A page from elsewhere; no step."""
        self.backend.bring_in(offset, byte)

    def compact_memory(self, watch: int) -> Any:
        """Compaction; whether the page at `watch` moved."""
        before = self.backend.frames([watch])
        self.backend.mark(">> echo 1 > compact_memory")
        self.backend.compact_memory()
        result = "moved" if self.backend.frames([watch]) != before else "NOT moved"
        self.backend.mark(f"<< echo 1 > compact_memory: {result}")
        return result

    def compact_memory_under(self, offsets: Sequence[int]) -> list[int]:
        """Compaction; which of the pages moved."""
        before = self.backend.frames(offsets)
        self._step("echo 1 > compact_memory", "compact_memory")
        after = self.backend.frames(offsets)
        moved = [at for at, old, new in zip(offsets, before, after, strict=True) if old != new]
        numbers = [at // PAGE for at in moved[:8]]
        self._step(f"moved {len(moved)} of {len(offsets)}: {numbers}", "nothing")
        return moved

    def move_pages(self, offset: int, node: int, title: str) -> Any:
        """move_pages."""
        return self._step(title, "move_pages", offset, node)

    def mbind(self, offset: int, length: int, node: int, title: str) -> Any:
        """mbind."""
        return self._step(title, "mbind", offset, length, node)

    def begin(self) -> None:
        """The event sequence begins here."""
        self.backend.begin()

    def ksmd(self, title: str, *, use_zero_pages: bool = False) -> Any:
        """ksmd runs."""
        return self._step(title, "ksmd", use_zero_pages)

    def idle(self, ns: int, title: str = "") -> None:
        """The VMM sleeps; a step only with a title."""
        if title:
            self._step(title, "idle", ns)
        else:
            self.backend.idle(ns)

    def punch_hole(self, offset: int, length: int, title: str) -> Any:
        """A hole in the file."""
        return self._step(title, "punch_hole", offset, length)

    def ftruncate(self, size: int, title: str) -> Any:
        """Another size of the file."""
        return self._step(title, "ftruncate", size)

    def memcg_limit(self, pages: int, title: str) -> Any:
        """A memory cgroup's limit falls below its usage."""
        return self._step(title, "memcg_limit", pages)

    def pages_gone(self, pages: int) -> Any:
        """Were pages reclaimed?"""
        return self._step("pages gone", "pages_gone", pages)

    def fsync(self) -> Any:
        """fsync of the file."""
        return self._step("host fsync", "fsync")

    def pwrite(self, offset: int, data: bytes, title: str) -> Any:
        """A write into the file, not through its mapping."""
        return self._step(title, "pwrite", offset, data)

    def damon_on(self, offset: int) -> Any:
        """DAMON starts."""
        return self._step("damon on", "damon_on", offset)

    def damon_off(self) -> Any:
        """DAMON stops."""
        return self._step("damon off", "damon_off")

    def uffd(self, mode: int) -> None:
        """A userfaultfd for the data slot."""
        self._step("UFFDIO_API", "uffd_api")
        self._step(f"UFFDIO_REGISTER mode {mode}", "uffd_register", mode)

    def uffd_answer(self, kind: str) -> None:
        """How its faults are answered from now on; no step."""
        self.backend.uffd_answer(kind)

    def uffd_copy(self, offset: int, title: str) -> Any:
        """UFFDIO_COPY."""
        return self._step(title, "uffd_copy", offset)

    def log_dirty(self, on: bool) -> Any:
        """Logging of the data slot begins or ends."""
        return self._step(f"slot flags {'|=' if on else '-='} LOG_DIRTY", "log_dirty", on)

    def get_dirty_log(self, title: str = "GET_DIRTY_LOG") -> Any:
        """KVM_GET_DIRTY_LOG."""
        return self._step(title, "get_dirty_log")

    def count_dirty_log(self, note: str = "") -> Any:
        """KVM_GET_DIRTY_LOG, of many pages."""
        return self._step(f"GET_DIRTY_LOG {note}", "count_dirty_log")

    def manual_protect(self, value: int) -> Any:
        """Manual protection."""
        title = f"ENABLE_CAP MANUAL_DIRTY_LOG_PROTECT2={value}"
        return self._step(title, "enable_manual_protect", value)

    def clear_dirty_log(self, first: int, count: int, pages: Sequence[int]) -> Any:
        """KVM_CLEAR_DIRTY_LOG."""
        shown = list(pages) if len(pages) < 9 else pages
        title = f"CLEAR_DIRTY_LOG first={first} num={count} pages={shown}"
        return self._step(title, "clear_dirty_log", first, count, pages)

    def dirty_ring(self, title: str) -> Any:
        """What is in the ring."""
        return self._step(title, "dirty_ring")

    def reset_dirty_rings(self) -> Any:
        """Harvest and reset."""
        return self._step("KVM_RESET_DIRTY_RINGS", "reset_dirty_rings")

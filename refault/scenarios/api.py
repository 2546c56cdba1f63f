"""What a scenario can do.

The machine: one vCPU at CPL 3 in long mode; the data slot of 8 MiB at gpa 0x10000000, written `D`,
which the guest maps with 4 KiB pages and the host without huge pages; slot 0 with code and tables.
Offsets count from `D`, in the guest and in the VMM alike. Each guest access is one KVM_RUN.

A step has a title, which is part of what is compared, and a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refault.scenarios.api_kvm import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KvmSteps, pte
from refault.scenarios.layout import DATA_GPA, DATA_SIZE, PAGE

if TYPE_CHECKING:
    from refault.scenarios.backend import Backend

__all__ = [
    "DATA_GPA", "DATA_SIZE", "KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY", "PAGE", "PROT_NONE", "PROT_READ",
    "PROT_RW", "Scenario", "pte",
]

PROT_NONE, PROT_READ, PROT_RW = 0, 1, 3


class Scenario(KvmSteps):
    """The steps, told to a back end. Titles follow the recordings'."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def use_vcpu(self, number: int) -> None:
        """What the guest does from now on, this vCPU does; the machine must have it. No step."""
        self.backend.use_vcpu(number)

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

    def hr(self, offset: int, title: str = "") -> Any:
        """The VMM reads."""
        return self._step(title or f"host read D+{offset:#x}", "host_read", offset)

    def madv(self, offset: int, length: int, advice: str, title: str = "") -> Any:
        """madvise."""
        return self._step(
            title or f"host madvise(D+{offset:#x},{length:#x},{advice})", "madvise", offset, length, advice
        )

    def mprotect(self, offset: int, length: int, prot: int, title: str = "") -> Any:
        """mprotect."""
        title = title or f"mprotect(D+{offset:#x},{length:#x},{prot})"
        return self._step(title, "mprotect", offset, length, prot)

    def munmap(self, offset: int, length: int, title: str = "") -> Any:
        """munmap."""
        return self._step(title or f"munmap(D+{offset:#x},{length:#x})", "munmap", offset, length)

    def mmap_fixed(self, offset: int, length: int, title: str = "") -> Any:
        """mmap(MAP_FIXED)."""
        return self._step(title or f"mmap(FIXED, D+{offset:#x},{length:#x})", "mmap_fixed", offset, length)

    def mremap(self, offset: int, length: int, to: int, title: str = "") -> Any:
        """mremap(MREMAP_MAYMOVE | MREMAP_FIXED)."""
        title = title or f"mremap(D+{offset:#x},{length:#x},D+{to:#x})"
        return self._step(title, "mremap", offset, length, to)

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

    def pin(self, offset: int, title: str = "") -> Any:
        """A long-term pin."""
        return self._step(title or f"pin D+{offset:#x}", "pin", offset)

    def unpin(self, title: str = "") -> Any:
        """Pins back."""
        return self._step(title or "unpin", "unpin")

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

    def move_pages(self, offset: int, node: int, title: str = "") -> Any:
        """move_pages."""
        return self._step(title or f"move_pages(D+{offset:#x}, node{node})", "move_pages", offset, node)

    def mbind(self, offset: int, length: int, node: int, title: str = "") -> Any:
        """mbind."""
        title = title or f"mbind(D+{offset:#x},{length:#x}, node{node})"
        return self._step(title, "mbind", offset, length, node)

    def begin(self) -> None:
        """The event sequence begins here."""
        self.backend.begin()

    def ksmd(self, title: str = "", *, use_zero_pages: bool = False) -> Any:
        """ksmd runs."""
        return self._step(title or "ksmd", "ksmd", use_zero_pages)

    def settle(self) -> None:
        """What waits in the LRU's batches goes to its lists, and nobody holds it for that; no step."""
        self.backend.settle()

    def idle(self, ns: int, title: str = "") -> None:
        """The VMM sleeps; a step only with a title."""
        if title:
            self._step(title, "idle", ns)
        else:
            self.backend.idle(ns)

    def punch_hole(self, offset: int, length: int, title: str = "") -> Any:
        """A hole in the file."""
        return self._step(title or f"PUNCH_HOLE(D+{offset:#x},{length:#x})", "punch_hole", offset, length)

    def ftruncate(self, size: int, title: str = "") -> Any:
        """Another size of the file."""
        return self._step(title or f"ftruncate({size:#x})", "ftruncate", size)

    def memcg_limit(self, pages: int, title: str = "") -> Any:
        """A memory cgroup's limit falls below its usage."""
        return self._step(title or f"limit = usage - {pages} pages", "memcg_limit", pages)

    def memcg_squeeze(self, pages: int, title: str = "") -> Any:
        """The limit falls below the usage and is lifted again."""
        return self._step(title or f"limit = usage - {pages} pages, and none", "memcg_squeeze", pages)

    def pages_gone(self, pages: int) -> Any:
        """Were pages reclaimed?"""
        return self._step("pages gone", "pages_gone", pages)

    def fsync(self, title: str = "host fsync") -> Any:
        """fsync of the file."""
        return self._step(title, "fsync")

    def pwrite(self, offset: int, data: bytes, title: str = "") -> Any:
        """A write into the file, not through its mapping."""
        return self._step(title or f"pwrite({offset:#x}, {len(data)} bytes)", "pwrite", offset, data)

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

    def uffd_copy(self, offset: int, title: str = "") -> Any:
        """UFFDIO_COPY."""
        return self._step(title or f"UFFDIO_COPY D+{offset:#x}", "uffd_copy", offset)

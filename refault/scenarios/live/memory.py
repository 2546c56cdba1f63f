"""What a scenario's VMM does with its memory on a real machine: system calls of this process."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refault.scenarios.layout import PAGE
from refault.scenarios.live import libc, machine

__all__ = ["MemorySteps"]

_U64 = struct.Struct("<Q")
_PFN = (1 << 55) - 1
_PRESENT = 1 << 63
_BUFFER = 128 << 20
_MREMAP = 3
"""MREMAP_MAYMOVE | MREMAP_FIXED"""


class MemorySteps:
    """The steps, for a back end that has `data`, the address of D."""

    data: int
    children: list[tuple[int, int]]
    _pins: list[int]

    def _map(self, offset: int, size: int, flags: int = 0, fd: int = -1) -> int:
        flags = flags or libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
        return libc.mmap(self.data + offset, size, 3, flags | libc.MAP_FIXED, fd)

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as exc:
            return f"errno {errno.errorcode.get(exc.errno or 0, str(exc.errno))}"

    def host_write(self, offset: int, value: int) -> Any:
        """The VMM stores."""
        return self._call(lambda: libc.poke(self.data + offset, _U64.pack(value)))

    def host_read(self, offset: int) -> Any:
        """The VMM loads."""
        return self._call(lambda: _U64.unpack(libc.peek(self.data + offset, 8))[0])

    def fill(self, offset: int, byte: int) -> Any:
        """The VMM fills a page."""
        return self._call(lambda: libc.poke(self.data + offset, bytes([byte]) * PAGE))

    def madvise(self, offset: int, length: int, advice: str) -> Any:
        """madvise(2); the fork advices answer 0, as the recordings do."""
        result = self._call(lambda: libc.madvise(self.data + offset, length, advice))
        return result or (0 if advice in ("DONTFORK", "DOFORK") else "ok")

    def mergeable(self, offset: int, length: int) -> Any:
        """MADV_MERGEABLE."""
        result = self.madvise(offset, length, "MERGEABLE")
        return 0 if result == "ok" else result

    def mprotect(self, offset: int, length: int, prot: int) -> Any:
        """mprotect(2): 0 or -1."""
        return -1 if self._call(lambda: libc.mprotect(self.data + offset, length, prot)) else 0

    def munmap(self, offset: int, length: int) -> Any:
        """munmap(2)."""
        return self._call(lambda: libc.munmap(self.data + offset, length)) or 0

    def mmap_fixed(self, offset: int, length: int) -> Any:
        """mmap(MAP_FIXED)."""
        at = self._call(lambda: self._map(offset, length))
        return at if isinstance(at, str) else hex(at - self.data)

    def mremap(self, offset: int, length: int, to: int) -> Any:
        """mremap(2) to a fixed place."""
        at = self._call(lambda: libc.mremap(self.data + offset, length, length, _MREMAP, self.data + to))
        return at if isinstance(at, str) else hex(at - self.data)

    def mlock(self, offset: int, length: int) -> Any:
        """mlock(2)."""
        return self._call(lambda: libc.mlock(self.data + offset, length)) or 0

    def munlock(self, offset: int, length: int) -> Any:
        """munlock(2)."""
        return self._call(lambda: libc.munlock(self.data + offset, length)) or 0

    # -- the process --------------------------------------------------------------------------

    def fork(self) -> Any:
        """fork(2); the child waits for the other end of a pipe."""
        read, wake = os.pipe()
        child = os.fork()
        if not child:
            # An older child waits for the end of its pipe, which this one must not keep open.
            for other in (wake, *(end for _, end in self.children)):
                os.close(other)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        self.children.append((child, wake))
        return "child"

    def child_exit(self) -> Any:
        """The last child's exit."""
        child, wake = self.children.pop()
        os.close(wake)
        return os.waitpid(child, 0)[1]

    def clear_refs(self, kind: int) -> Any:
        """clear_refs."""
        Path("/proc/self/clear_refs").write_text(str(kind))

    def pin(self, offset: int) -> Any:
        """A fixed buffer of an io_uring."""
        result = self._call(lambda: libc.io_uring_with_buffer(self.data + offset, PAGE))
        if isinstance(result, str):
            return result
        self._pins.append(result)
        return 0

    def unpin(self) -> Any:
        """The buffers are taken out and the rings closed."""
        pins, self._pins = self._pins, []
        for ring in pins:
            libc.io_uring_unregister_buffers(ring)
            os.close(ring)
        return 0

    # -- frames -------------------------------------------------------------------------------

    def _pagemap(self, address: int, pages: int) -> list[int]:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            raw = os.pread(file.fileno(), 8 * pages, address // PAGE * 8)
        return [word & _PFN if word & _PRESENT else 0 for (word,) in _U64.iter_unpack(raw)]

    def frames(self, offsets: Sequence[int]) -> list[int]:
        """Which frame each page is in."""
        return [self._pagemap(self.data + at, 1)[0] for at in offsets]

    def pages_gone(self, pages: int) -> Any:
        """Were pages of D reclaimed?"""
        return 0 in self._pagemap(self.data, pages)

    def bring_in(self, offset: int, byte: int) -> None:
        """The page with the lowest frame of a large buffer, so that compaction is sure to move it."""
        place = libc.mmap(0, _BUFFER, 3, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        try:
            libc.madvise(place, _BUFFER, "NOHUGEPAGE")
            libc.madvise(place, _BUFFER, "POPULATE_WRITE")
            frames = self._pagemap(place, _BUFFER // PAGE)
            _, lowest = min((pfn, at) for at, pfn in enumerate(frames) if pfn)
            source = place + lowest * PAGE
            libc.poke(source, bytes([byte]) * PAGE)
            libc.mremap(source, PAGE, PAGE, _MREMAP, self.data + offset)
        finally:
            libc.munmap(place, _BUFFER)

    def arrange(self, blocks: Sequence[Sequence[int]]) -> None:
        """Where frames lie is the machine's; bring_in has one that lies low."""

    def compact_memory(self) -> Any:
        """A write to /proc/sys/vm/compact_memory; the bytes that it took."""
        with open("/proc/sys/vm/compact_memory", "w") as file:
            return file.write("1")

    def move_pages(self, offset: int, node: int) -> Any:
        """move_pages(2) of one page, MPOL_MF_MOVE_ALL."""
        return self._call(lambda: f"rc 0 status {libc.move_page(self.data + offset, node)}")

    def mbind(self, offset: int, length: int, node: int) -> Any:
        """mbind(2) with MPOL_BIND and MPOL_MF_MOVE."""
        return self._call(lambda: f"rc {libc.mbind(self.data + offset, length, node)}")

    # -- other threads of the machine ---------------------------------------------------------

    def ksmd(self, use_zero_pages: bool) -> Any:
        """ksmd runs until nothing more is merged."""
        with machine.ksm(use_zero_pages=use_zero_pages):
            time.sleep(1)
        return "done" if use_zero_pages else "pages_sharing"

    def settle(self) -> None:
        """madvise_cold of any page empties this CPU's batches, and this process is on no other CPU."""
        place = libc.mmap(0, PAGE, 3, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
        libc.madvise(place, PAGE, "COLD")
        libc.munmap(place, PAGE)

    def idle(self, ns: int) -> Any:
        """The VMM sleeps."""
        time.sleep(ns / 1e9)

    def nothing(self) -> Any:
        """A step that only says what was found."""
        return None

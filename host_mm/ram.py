"""The host's physical memory: one mapping of this process.

pfn x 4096 is an address in it; Unicorn's physical memory is the same mapping, so a guest store is
in the host's frame without a copy. Untouched frames cost nothing (MAP_NORESERVE).

Two views of the same bytes: `u64` (unsigned, for the models) and `i64` (signed, for the hardware
walk, whose compiled form needs signed integers throughout).
"""

from __future__ import annotations

import ctypes
import mmap

__all__ = ["PAGE_MASK", "PAGE_SHIFT", "PAGE_SIZE", "POISON", "Ram", "StaleFrames", "column"]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = ~(PAGE_SIZE - 1)
POISON = 0xAA
"""include/linux/poison.h: PAGE_POISON. A freed frame is filled with it."""

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
_POISONED = bytes([POISON]) * PAGE_SIZE
_ZERO = bytes(PAGE_SIZE)


def column(typecode: str, length: int) -> memoryview:
    """A zeroed typed array of `length` items that takes memory only where it is touched."""
    size = memoryview(bytes(8)).cast(typecode).itemsize  # type: ignore[call-overload]
    return memoryview(mmap.mmap(-1, max(length, 1) * size, flags=_FLAGS)).cast(typecode)  # type: ignore[call-overload]


class StaleFrames:
    """Frames whose code changed, told to every CPU that subscribed; each empties its own set."""

    __slots__ = ("_subscribers",)

    def __init__(self) -> None:
        self._subscribers: list[set[int]] = []

    def subscribe(self) -> set[int]:
        """A set that gets every frame from now on."""
        frames: set[int] = set()
        self._subscribers.append(frames)
        return frames

    def unsubscribe(self, frames: set[int]) -> None:
        """Stop adding to a set that `subscribe` gave; unknown ones are ignored."""
        self._subscribers = [s for s in self._subscribers if s is not frames]

    def add(self, pfn: int) -> None:
        """The frame's bytes changed."""
        for frames in self._subscribers:
            frames.add(pfn)


class Ram:
    """`nr_frames` frames of 4 KiB at physical address 0.

    `fetched[pfn]` is nonzero once a CPU fetched instructions from the frame; every change of a
    frame's bytes by the host goes through a method here, which puts fetched frames into `stale`:
    the CPUs drop their translations of those before they run on.
    """

    def __init__(self, nr_frames: int) -> None:
        self.nr_frames = nr_frames
        self.size = nr_frames << PAGE_SHIFT
        self._map = mmap.mmap(-1, self.size, flags=_FLAGS)
        self.b = memoryview(self._map)
        self.u64 = self.b.cast("Q")
        self.i64 = self.b.cast("q")
        self.ptr = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.fetched = column("B", nr_frames)
        self.stale = StaleFrames()

    def clear_page(self, pfn: int) -> None:
        """Fill with zeros."""
        self.b[pfn << 12 : (pfn + 1) << 12] = _ZERO
        if self.fetched[pfn]:
            self.stale.add(pfn)

    def poison_page(self, pfn: int) -> None:
        """Fill with POISON: the frame is free and whoever still reads it shall notice."""
        self.b[pfn << 12 : (pfn + 1) << 12] = _POISONED
        if self.fetched[pfn]:
            self.stale.add(pfn)

    def copy_page(self, dst: int, src: int) -> None:
        """Copy frame `src` over frame `dst`."""
        self.b[dst << 12 : (dst + 1) << 12] = self.b[src << 12 : (src + 1) << 12]
        if self.fetched[dst]:
            self.stale.add(dst)

    def write(self, pa: int, data: bytes | memoryview) -> None:
        """Host bytes into physical address `pa`; must lie in one frame."""
        self.b[pa : pa + len(data)] = data
        pfn = pa >> 12
        if self.fetched[pfn]:
            self.stale.add(pfn)

    def read(self, pa: int, length: int) -> bytes:
        """`length` bytes at physical address `pa`."""
        return bytes(self.b[pa : pa + length])

    def page_is_zero(self, pfn: int) -> bool:
        """Whether every byte is zero."""
        # Bytes are compared forty times faster than views.
        return bytes(self.b[pfn << 12 : (pfn + 1) << 12]) == _ZERO

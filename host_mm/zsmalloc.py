"""Objects smaller than a page, packed into frames: where zswap and zram keep compressed pages.

Source of truth: mm/zsmalloc.c (get_size_class_index, calculate_zspage_chain_size, zs_malloc, zs_free,
zs_obj_write, zs_obj_read_begin); Linux 6.18.

A zspage is a chain of frames that is cut into objects of one size; the chain's length is the one that
wastes least. An object may lie across two frames. A zspage whose last object goes gives its frames back.

Not modelled: merging of size classes with equal chains, compaction and migration of zspages, fullness
groups beyond full and not full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.page import put_page
from host_mm.page_alloc import alloc_pages
from host_mm.ram import PAGE_SIZE

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["ZS_MAX_ALLOC_SIZE", "ZsPool", "Zspage", "chain_size", "size_class"]

ZS_MIN_ALLOC_SIZE = 32
ZS_MAX_ALLOC_SIZE = PAGE_SIZE
ZS_SIZE_CLASS_DELTA = PAGE_SIZE >> 8
ZS_CHAIN_SIZE = 8
"""CONFIG_ZSMALLOC_CHAIN_SIZE: the most frames of one zspage."""


def size_class(size: int) -> int:
    """The object size that a request for `size` bytes gets."""
    if size <= ZS_MIN_ALLOC_SIZE:
        return ZS_MIN_ALLOC_SIZE
    return (size + ZS_SIZE_CLASS_DELTA - 1) // ZS_SIZE_CLASS_DELTA * ZS_SIZE_CLASS_DELTA


def chain_size(class_size: int) -> int:
    """How many frames a zspage of this class has: those of which the smallest part is left over."""
    if not class_size & (class_size - 1):
        return 1
    return min(range(1, ZS_CHAIN_SIZE + 1), key=lambda nr: (nr * PAGE_SIZE % class_size, nr))


class Zspage:
    """A chain of frames, all objects of one size. `used` are the indices that are taken."""

    __slots__ = ("capacity", "class_size", "frames", "free", "used")

    def __init__(self, class_size: int, frames: list[int]) -> None:
        self.class_size = class_size
        self.frames = frames
        self.capacity = len(frames) * PAGE_SIZE // class_size
        self.free = list(range(self.capacity - 1, -1, -1))
        self.used: set[int] = set()


class ZsPool:
    """struct zs_pool. A handle is an int; `frames` and `stored_bytes` say how well it packs."""

    __slots__ = ("_next", "_partial", "frames", "handles", "host", "name", "stored_bytes")

    def __init__(self, host: HostMm, name: str) -> None:
        self.host = host
        self.name = name
        self.frames = 0
        self.stored_bytes = 0
        self.handles: dict[int, tuple[Zspage, int, int]] = {}
        self._partial: dict[int, list[Zspage]] = {}
        self._next = 1
        host.frame_holders.append(self._held)

    def _held(self) -> dict[int, int]:
        return {pfn: 1 for zspage, _, _ in self.handles.values() for pfn in zspage.frames}

    def malloc(self, data: bytes, gfp: int, nid: int = 0) -> int:
        """Keep these bytes; their handle, or 0 without memory."""
        if not 0 < len(data) <= ZS_MAX_ALLOC_SIZE:
            raise BrokenTruth("zsmalloc", f"{self.name}: an object of {len(data)} bytes")
        size = size_class(len(data))
        partial = self._partial.setdefault(size, [])
        if not partial:
            zspage = self._alloc_zspage(size, gfp, nid)
            if zspage is None:
                return 0
            partial.append(zspage)
        zspage = partial[-1]
        index = zspage.free.pop()
        zspage.used.add(index)
        if not zspage.free:
            partial.pop()
        handle, self._next = self._next, self._next + 1
        self.handles[handle] = zspage, index, len(data)
        self.stored_bytes += len(data)
        at = 0
        for address, length in _pieces(zspage, index, len(data)):
            self.host.ram.write(address, data[at : at + length])
            at += length
        return handle

    def _alloc_zspage(self, size: int, gfp: int, nid: int) -> Zspage | None:
        frames: list[int] = []
        for _ in range(chain_size(size)):
            pfn = alloc_pages(self.host, gfp, 0, nid)
            if pfn < 0:
                for taken in frames:
                    put_page(self.host, taken)
                return None
            frames.append(pfn)
        self.frames += len(frames)
        return Zspage(size, frames)

    def read(self, handle: int) -> bytes:
        """The bytes of an object."""
        zspage, index, length = self.handles[handle]
        return b"".join(self.host.ram.read(address, part) for address, part in _pieces(zspage, index, length))

    def size(self, handle: int) -> int:
        """How many bytes an object has."""
        return self.handles[handle][2]

    def free(self, handle: int) -> None:
        """Give an object up; with a zspage's last one its frames go back."""
        zspage, index, length = self.handles.pop(handle)
        self.stored_bytes -= length
        zspage.used.remove(index)
        partial = self._partial[zspage.class_size]
        if not zspage.free:
            partial.append(zspage)
        zspage.free.append(index)
        if not zspage.used:
            partial.remove(zspage)
            self.frames -= len(zspage.frames)
            for pfn in zspage.frames:
                put_page(self.host, pfn)


def _pieces(zspage: Zspage, index: int, length: int) -> list[tuple[int, int]]:
    """(physical address, length) of the parts of an object, one for each frame that it lies in."""
    pieces: list[tuple[int, int]] = []
    at, end = index * zspage.class_size, index * zspage.class_size + length
    while at < end:
        frame, offset = divmod(at, PAGE_SIZE)
        part = min(end - at, PAGE_SIZE - offset)
        pieces.append(((zspage.frames[frame] << 12) + offset, part))
        at += part
    return pieces

"""What guest memory must hold, as bytes: the oracle of the property tests.

A page that MADV_FREE gave away is either as it was or all zeros, until somebody writes it or a read
shows which. A page has the VMM's rights of the moment; `lifting` are the pages that the board gives back
when the guest first meets a protection of the operation `protect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

__all__ = ["HOLE", "PAGE", "Memory", "Page"]

PAGE = 4096
HOLE = -1
_ZEROS = bytes(PAGE)


class Page:
    """One page: its bytes, whether reclaim may drop them, PROT_* or HOLE."""

    __slots__ = ("data", "maybe_zero", "prot")

    def __init__(self) -> None:
        self.data = _ZEROS
        self.maybe_zero = False
        self.prot = 3

    def clear(self) -> None:
        """It reads as zeros from now on."""
        self.data = _ZEROS
        self.maybe_zero = False


class Memory:
    """Pages in a row. `read` gives the machine's bytes of a page, for what cannot be known otherwise."""

    def __init__(self, count: int, read: Callable[[int], bytes]) -> None:
        self.pages = [Page() for _ in range(count)]
        self.read = read
        self.lifting: list[int] = []

    def parts(self, offset: int, size: int) -> Iterator[tuple[Page, int, int]]:
        """(page, start, stop) of the pages that [offset, offset + size) touches."""
        end = offset + size
        while offset < end:
            stop = min(end, (offset // PAGE + 1) * PAGE)
            yield self.pages[offset // PAGE], offset % PAGE, stop - offset // PAGE * PAGE
            offset = stop

    def allows(self, offset: int, size: int, right: int) -> bool:
        """Whether the VMM's own mapping has the right (1 read, 2 write)."""
        return all(page.prot != HOLE and page.prot & right for page, _, _ in self.parts(offset, size))

    def guest_allows(self, offset: int, size: int, right: int) -> bool:
        """Whether a guest access goes through; one that does not lifts what `protect` took."""
        if not self.allows(offset, size, right):
            for index in self.lifting:
                self.pages[index].prot = 3
            self.lifting.clear()
        return self.allows(offset, size, right)

    def check(self, offset: int, got: bytes) -> None:
        """A read gave `got`."""
        at = 0
        for page, start, stop in self.parts(offset, len(got)):
            part, want = got[at : at + stop - start], page.data[start:stop]
            at += len(part)
            if part == want:
                continue
            where = offset + at - len(part)
            if not page.maybe_zero or any(part):
                raise AssertionError(f"D+{where:#x} reads {part.hex()}, must be {want.hex()}")
            page.clear()

    def write(self, offset: int, size: int, new: Callable[[bytes], bytes]) -> None:
        """[offset, offset + size) became `new(what it was)`."""
        parts = list(self.parts(offset, size))
        first = offset // PAGE
        unknown = any(page.maybe_zero for page, _, _ in parts)
        machine = [self.read(first + n) for n in range(len(parts))] if unknown else []
        for dropped in product(*((False, True) if page.maybe_zero else (False,) for page, _, _ in parts)):
            before = [_ZEROS if gone else part[0].data for part, gone in zip(parts, dropped, strict=True)]
            old = b"".join(data[a:b] for data, (_, a, b) in zip(before, parts, strict=True))
            value = new(old)
            after = []
            for data, (_, a, b) in zip(before, parts, strict=True):
                after.append(data[:a] + value[: b - a] + data[b:])
                value = value[b - a :]
            if not unknown or after == machine:
                for (page, _, _), data in zip(parts, after, strict=True):
                    page.data, page.maybe_zero = data, False
                return
        raise AssertionError(f"after a write at D+{offset:#x} the pages are neither old nor dropped ones")

"""get_user_pages and pin_user_pages over a range.

Source of truth: mm/gup.c (get_user_pages_fast, pin_user_pages_fast, gup_fast_fallback, is_valid_gup_args,
unpin_user_pages_dirty_lock); Linux 6.18.

As many pages as can be had without locks come from the entries as they are; the rest is faulted in. A range
that ends early is answered with what there is, and only if that is nothing with the reason.

Not modelled: ranges of folios, pin_user_pages_remote's other process.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL
from typing import TYPE_CHECKING

from host_mm.gup import (
    FOLL_FORCE,
    FOLL_GET,
    FOLL_HONOR_NUMA_FAULT,
    FOLL_LONGTERM,
    FOLL_NOFAULT,
    FOLL_PIN,
    FOLL_TOUCH,
    FOLL_WRITE,
    gup_fast,
    gup_slow,
    trace_gup,
)
from host_mm.gup_pin import gup_longterm, note_pins, unpin_user_page
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import MMF_HAS_PINNED

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct

__all__ = ["get_user_pages", "pin_user_pages", "unpin_user_pages"]


_ALLOWED = FOLL_WRITE | FOLL_LONGTERM | FOLL_FORCE | FOLL_GET | FOLL_NOFAULT | FOLL_HONOR_NUMA_FAULT


def _check(start: int, nr_pages: int, flags: int, how: int) -> None:
    contradicts = flags & FOLL_GET if how == FOLL_PIN else flags & FOLL_LONGTERM
    if nr_pages < 0 or start & 4095 or flags & ~_ALLOWED or contradicts:
        raise KernelError(EINVAL, f"flags {flags:#x} for {nr_pages} pages at {start:#x}")


def _gup(mm: MmStruct, start: int, nr_pages: int, flags: int) -> list[int]:
    pfns: list[int] = []
    while len(pfns) < nr_pages and (pfn := gup_fast(mm, start + (len(pfns) << 12), flags)) >= 0:
        pfns.append(trace_gup(mm, start + (len(pfns) << 12), flags, "fast", pfn))
    at, left = start + (len(pfns) << 12), nr_pages - len(pfns)
    if not left:
        return pfns
    slow, err = gup_longterm(mm.host, flags, lambda: gup_slow(mm, at, left, flags | FOLL_TOUCH))
    for n, pfn in enumerate(slow):
        trace_gup(mm, at + (n << 12), flags, "slow", pfn)
    if not pfns and not slow:
        trace_gup(mm, at, flags, "slow", err)
        raise KernelError(-err or EFAULT, f"no page at {at:#x}")
    return pfns + slow


def get_user_pages(mm: MmStruct, start: int, nr_pages: int, flags: int = 0) -> list[int]:
    """The frames of `nr_pages` pages from `start` on, or of fewer, with a reference each.

    KernelError: EINVAL (flags that do not fit), or why there is not even one (EFAULT, ENOMEM).
    """
    _check(start, nr_pages, flags, FOLL_GET)
    return _gup(mm, start, nr_pages, flags)


def pin_user_pages(mm: MmStruct, start: int, nr_pages: int, flags: int = 0) -> list[int]:
    """The same with pins, for unpin_user_pages. With FOLL_LONGTERM ENOMEM also means: it cannot move out."""
    _check(start, nr_pages, flags, FOLL_PIN)
    mm.flags |= MMF_HAS_PINNED
    pfns = _gup(mm, start, nr_pages, flags | FOLL_PIN)
    note_pins(mm.host, pfns)
    return pfns


def unpin_user_pages(host: HostMm, pfns: list[int], *, dirty: bool = False) -> None:
    """Give pins back; `dirty`: the pages were written."""
    for pfn in pfns:
        unpin_user_page(host, pfn, dirty=dirty)

"""Pins: references whose holder reads and writes the page's bytes.

Source of truth: mm/gup.c (pin_user_pages_fast, __gup_longterm_locked, unpin_user_pages_dirty_lock);
Linux 6.18.

Not modelled: P2PDMA pages, pins of a memfd without a mapping (memfd_pin_folios).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm.gup import (
    FOLL_LONGTERM,
    FOLL_PIN,
    FOLL_TOUCH,
    gup_fast,
    gup_put_folio,
    gup_slow,
    never_pinned,
    trace_gup,
)
from host_mm.gup_longterm import gup_longterm_locked
from host_mm.kernel.errors import BrokenTruth
from host_mm.mm_types import MMF_HAS_PINNED
from host_mm.page import page_folio, set_page_dirty

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct

__all__ = ["gup_longterm", "note_pins", "pin_user_page", "unpin_user_page"]


def pin_user_page(mm: MmStruct, addr: int, flags: int) -> int:
    """Pin the page at `addr` (fast, then slow); its frame or a negative errno. See unpin_user_page."""
    flags |= FOLL_PIN
    mm.flags |= MMF_HAS_PINNED
    pfn = gup_fast(mm, addr, flags)
    path = "fast"
    if pfn < 0:
        path = "slow"
        pfns, err = gup_longterm(mm.host, flags, lambda: gup_slow(mm, addr, 1, flags | FOLL_TOUCH))
        pfn = pfns[0] if pfns else err
    if pfn >= 0:
        note_pins(mm.host, [pfn])
    return trace_gup(mm, addr, flags, path, pfn)


def note_pins(host: HostMm, pfns: list[int]) -> None:
    """Account for pins that their caller keeps."""
    for pfn in pfns:
        if not never_pinned(host, pfn):
            host.pins[page_folio(host.pages, pfn)] += 1


def gup_longterm(
    host: HostMm, flags: int, pin: Callable[[], tuple[list[int], int]]
) -> tuple[list[int], int]:
    """`pin()`, and again until what it pinned may stay pinned, if that is for long."""
    if not flags & FOLL_LONGTERM:
        return pin()
    return gup_longterm_locked(host, pin, lambda pfn: gup_put_folio(host, pfn, FOLL_PIN))


def unpin_user_page(host: HostMm, pfn: int, *, dirty: bool = False) -> None:
    """Give a pin back; `dirty` first marks the page written (unpin_user_pages_dirty_lock)."""
    if not never_pinned(host, pfn):
        if dirty:
            set_page_dirty(host, pfn)
        head = page_folio(host.pages, pfn)
        if not host.pins[head]:
            raise BrokenTruth("page-pins", f"pfn {pfn:#x} is unpinned but has no pin", host.stream.here())
        host.pins[head] -= 1
    gup_put_folio(host, pfn, FOLL_PIN)

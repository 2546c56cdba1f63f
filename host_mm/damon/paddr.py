"""Regions of physical memory.

Source of truth: mm/damon/paddr.c (damon_pa_mkold, damon_pa_young, __damon_pa_check_access); Linux 6.18.

The answer for the page that was asked last is used again, whenever that was: a context whose only
region is one page asks once and never again. That is the kernel's doing (its last_addr outlives the
pass), and a recording shows it.

Not modelled: schemes, huge pages, address units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.damon.core import DamonRegion
from host_mm.damon.ops_common import damon_folio_mkold, damon_folio_young
from host_mm.page import folio_nr_pages, put_page
from host_mm.page_idle import page_idle_get_folio

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["PaddrOperations"]


class PaddrOperations:
    """DAMON_OPS_PADDR."""

    __slots__ = ("host", "last_accessed", "last_page", "last_size")

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.last_page = 0
        self.last_size = 1
        self.last_accessed = False

    def mkold(self, region: DamonRegion) -> None:
        """damon_pa_mkold."""
        folio = page_idle_get_folio(self.host, region.sampling_addr >> 12)
        if folio >= 0:
            damon_folio_mkold(self.host, folio)
            put_page(self.host, folio)

    def check_access(self, region: DamonRegion, first: bool) -> bool:
        """__damon_pa_check_access."""
        page = region.sampling_addr >> 12
        if page // self.last_size != self.last_page // self.last_size:
            folio = page_idle_get_folio(self.host, page)
            self.last_accessed = False
            if folio >= 0:
                self.last_accessed = damon_folio_young(self.host, folio)
                self.last_size = folio_nr_pages(self.host.pages, folio)
                put_page(self.host, folio)
            self.last_page = page
        return self.last_accessed

"""Translations that others than the host's CPUs keep of an mm, where the truths can see them.

Source of truth: none; in Linux each lives in its driver or its device (MTTs, GPU page tables, IOTLBs).

Whoever translates host addresses to frames by tables of his own, and owes it to mmu notifiers that they are
right, adds them here. KVM's are checked by KVM's own truths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct
    from host_mm.tlb import HostTlb

__all__ = ["SecondaryTables"]


class SecondaryTables:
    """(name of the owner, mm, table) of each; a table is a vpn -> frame map with an index by frame."""

    __slots__ = ("tables",)

    def __init__(self) -> None:
        self.tables: list[tuple[str, MmStruct, HostTlb]] = []

    def add(self, who: str, mm: MmStruct, table: HostTlb) -> None:
        """Watch a table from now on."""
        self.tables.append((who, mm, table))

    def remove(self, table: HostTlb) -> None:
        """Stop watching it."""
        self.tables = [entry for entry in self.tables if entry[2] is not table]

    def reaching(self, pfn: int) -> list[tuple[str, int, bool]]:
        """(owner, address, whether writable) of every translation to the frame."""
        return [
            (who, vpn << 12, bool(cached & 1))
            for who, _, table in self.tables if table.entries
            for vpn, cached in table.translations_of(pfn)
        ]

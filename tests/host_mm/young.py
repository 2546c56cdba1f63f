"""A secondary MMU that only has accessed bits: which callback asked, and with which range."""

from __future__ import annotations

from host_mm import mmu_notifier as mn
from host_mm.mm_types import MmStruct
from host_mm.mmu_notifier_register import mmu_notifier_register
from tests.host_mm.machine import PAGE


class YoungMmu(mn.MmuNotifier):
    """Holds the young page numbers from `base`; logs (callback, first page, pages)."""

    def __init__(self, mm: MmStruct, base: int) -> None:
        self.base = base
        self.young: set[int] = set()
        self.log: list[tuple[str, int, int]] = []
        self.brackets = 0
        assert mmu_notifier_register(self, mm) == 0

    def _ask(self, name: str, start: int, end: int, clear: bool) -> int:
        first, last = (start - self.base) // PAGE, (end - self.base + PAGE - 1) // PAGE
        self.log.append((name, first, last - first))
        hit = self.young & set(range(first, last))
        if clear:
            self.young -= hit
        return int(bool(hit))

    def clear_flush_young(self, mm: MmStruct, start: int, end: int) -> int:
        return self._ask("clear_flush_young", start, end, True)

    def clear_young(self, mm: MmStruct, start: int, end: int) -> int:
        return self._ask("clear_young", start, end, True)

    def test_young(self, mm: MmStruct, address: int) -> int:
        return self._ask("test_young", address, address + PAGE, False)

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        self.brackets += 1
        return 0

    def take(self) -> list[tuple[str, int, int]]:
        """What was asked since the last call."""
        taken, self.log = self.log, []
        return taken

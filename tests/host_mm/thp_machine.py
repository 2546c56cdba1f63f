"""A process with memory that may have huge pages, and everything that happens to it written down in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import (
    is_swap_pmd,
    lookup_address_in_mm,
    pmd_table,
    pmd_trans_huge,
    pte_write,
)
from host_mm.madvise import MADV_HUGEPAGE, do_madvise
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm, store_word
from trace_events.stream import Listener

HUGE = 2 << 20


class Order(mn.MmuNotifier):
    """Brackets, changed entries, primary flushes and frees, each in a word, in the order they happen.

    The same word in a row is told once with its number, as `set*512`.
    """

    def __init__(self, vm: ThpVmm) -> None:
        self.vm = vm
        self.words: list[str] = []
        vm.host.pte_hooks.append(lambda mm, _, old, new: self._entry(mm, store_word(old, new)))
        vm.host.pmd_hooks.append(lambda mm, _, old, new: self._entry(mm, self._pmd(old, new)))
        names = {"primary_flush": "flush", "frame_free": "free", "swap_write_start": "io"}
        vm.host.stream.listen(Listener(
            [f"refault:{name}" for name in names], lambda event: self._event(names[event.name], event),
            ancestors=False,
        ))
        assert mmu_notifier_register(self, vm.mm) == 0

    def _event(self, name: str, event: Any) -> None:
        order = event.args["order"] if name == "free" else 0
        self.words.append(f"{name}{order}" if order else name)

    def _entry(self, mm: Any, word: str) -> None:
        if mm is self.vm.mm:
            self.words.append(word)

    @staticmethod
    def _pmd(old: int, new: int) -> str:
        if not new:
            return "pmd-clear"
        if pmd_table(new):
            return "pmd-table"
        if is_swap_pmd(new):
            return "pmd-migration"
        if not new & 1:
            return "pmd-invalid"
        if pmd_trans_huge(old) and pte_write(old) and not pte_write(new):
            return "pmd-protect"
        return "pmd-set"

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        start, end = range_.start - self.vm.base, range_.end - self.vm.base
        name = mn.EVENT_NAMES[range_.event]
        self.words.append(f"start {name} {start:#x} {end - start:#x}")
        return 0

    def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
        self.words.append("end")

    def take(self) -> list[str]:
        """What happened since the last call."""
        words, self.words = self.words, []
        told: list[str] = []
        counts: list[int] = []
        for word in words:
            if told and told[-1] == word:
                counts[-1] += 1
            else:
                told.append(word)
                counts.append(1)
        return [word if count == 1 else f"{word}*{count}" for word, count in zip(told, counts, strict=True)]


class ThpVmm(Vmm):
    """Vmm whose 8 MiB are MADV_HUGEPAGE."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(**({"ram": 64 << 20, "swap": 8 << 20} | kw))
        self.task(lambda: do_madvise(self.mm, self.base, 8 << 20, MADV_HUGEPAGE))

    def task(self, body: Callable[[], Any]) -> Any:
        """Run it to its end as a task; nothing stays in the LRU batches."""
        result = self.host.sched.run_task("test", body)
        self.host.sched.run_task("drain", self.host.lru.lru_add_drain_all)
        return result

    def level(self, offset: int) -> int:
        """1 or 2: the size of the page mapped at `offset`; 0: none."""
        entry, level = lookup_address_in_mm(self.mm, self.base + offset)
        return level if entry & 1 else 0

    def fill(self, offset: int, pages: int, first: int = 1) -> None:
        """Write page numbers."""
        self.task(lambda: [self.host_write(offset + n * PAGE, first + n) for n in range(pages)])

    def words(self, offset: int, pages: int) -> list[int]:
        """The first word of each page, as the process reads it."""
        return self.task(lambda: [self.host_read(offset + n * PAGE) for n in range(pages)])

    def audit(self) -> None:
        """Nobody is at work: the counts are right."""
        self.task(self.host.swap_device.drain)
        audit(self.host)

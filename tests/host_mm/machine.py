"""A small host with one process and a notifier that writes down what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import pte_pfn, pte_present, pte_write, walk_lockless
from host_mm.arch.x86.swapops import is_swap_pte, pte_to_swp_entry, swp_offset
from host_mm.gup import FOLL_WRITE, get_user_page_fast_only, get_user_pages_unlocked
from host_mm.host import HostMm
from host_mm.kernel.sched import Scheduler
from host_mm.mm_types import MmStruct
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_swapcache, put_page, set_page_dirty
from host_mm.pgtable_generic import pmd_offset, pte_offset_map
from host_mm.process import Process
from host_mm.uaccess import copy_from_user, copy_to_user
from trace_events.stream import TraceStream

PAGE = 4096
RW = PROT_READ | PROT_WRITE
ANON = MAP_PRIVATE | MAP_ANONYMOUS
SLOT = 8 << 20


def make_host(ram: int = 16 << 20, swap: int | None = 4 << 20, **kw: Any) -> HostMm:
    stream = TraceStream()
    return HostMm(Scheduler(stream), stream, ram_bytes=ram, swap_bytes=swap, **({"checks": True} | kw))


def run(host: HostMm, *bodies: Callable[[], object]) -> None:
    """Each body as a task of its own, all to their ends; raises what one of them raised."""
    tasks = [host.sched.spawn(f"t{n}", body) for n, body in enumerate(bodies)]
    host.sched.run_until(lambda: all(task.done for task in tasks))
    for task in tasks:
        if task.error is not None:
            raise task.error


def store_word(old: int, new: int) -> str:
    """What a store to a level-1 entry does: "clear", "swap-entry", "protect" or "set"."""
    if not new:
        return "clear"
    if is_swap_pte(new):
        return "swap-entry"
    if pte_present(old) and pte_write(old) and not pte_write(new):
        return "protect"
    return "set"


class Recorder(mn.MmuNotifier):
    """Logs (event name, start, end) with offsets from `base`, "end", "release" and young queries."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.log: list[tuple[Any, ...]] = []
        self.depth = 0

    def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
        self.depth += 1
        self.log.append((mn.EVENT_NAMES[range_.event], range_.start - self.base, range_.end - self.base))
        return 0

    def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
        self.depth -= 1

    def clear_flush_young(self, mm: MmStruct, start: int, end: int) -> int:
        self.log.append(("young", start - self.base, end - self.base))
        return 0

    def release(self, mm: MmStruct) -> None:
        self.log.append(("release", 0, 0))

    def take(self) -> list[tuple[Any, ...]]:
        """What was logged since the last call."""
        taken, self.log = self.log, []
        return taken


class Vmm:
    """A process with the 8 MiB slot of the recordings, accessed as a guest and as the host."""

    def __init__(self, host: HostMm | None = None, **kw: Any) -> None:
        self.host = host if host is not None else make_host(**kw)
        self.process: Process = self.host.create_process("vmm")
        self.mm = self.process.mm
        # A neighbour keeps the level-2 table populated, as libraries do in a real process.
        low = do_mmap(self.mm, 0x7FFFF0000000, PAGE, RW, ANON)
        copy_to_user(self.process, low, b"x")
        self.base = do_mmap(self.mm, 0x7FFFF0400000, SLOT, RW, ANON)
        self.notifier = Recorder(self.base)
        assert mmu_notifier_register(self.notifier, self.mm) == 0

    def guest_load(self, offset: int) -> int:
        """What a guest read fault does: GUP for reading, the reference given back."""
        host = self.host
        pfn = get_user_pages_unlocked(self.mm, self.base + offset, 0)
        assert pfn >= 0
        value = host.ram.u64[(pfn << 12) // 8]
        # KVM maps the page writable where it can, and marks it dirty then.
        if (fast := get_user_page_fast_only(self.mm, self.base + offset, FOLL_WRITE)) >= 0:
            set_page_dirty(host, fast)
            put_page(host, fast)
        put_page(host, pfn)
        return value

    def guest_store(self, offset: int, value: int) -> None:
        """What a guest write fault does."""
        host = self.host
        pfn = get_user_page_fast_only(self.mm, self.base + offset, FOLL_WRITE)
        if pfn < 0:
            pfn = get_user_pages_unlocked(self.mm, self.base + offset, FOLL_WRITE)
        assert pfn >= 0
        host.ram.u64[(pfn << 12) // 8] = value
        set_page_dirty(host, pfn)
        put_page(host, pfn)

    def host_write(self, offset: int, value: int) -> None:
        """The VMM's own store."""
        copy_to_user(self.process, self.base + offset, value.to_bytes(8, "little"))

    def host_read(self, offset: int) -> int:
        """The VMM's own load."""
        return int.from_bytes(copy_from_user(self.process, self.base + offset, 8), "little")

    def pfn(self, offset: int) -> int:
        """The frame that is mapped there, or -1."""
        entry, level = walk_lockless(self.host.ram, self.mm.pgd, self.base + offset)
        return pte_pfn(entry) if level == 1 and pte_present(entry) else -1

    def pte(self, offset: int) -> int:
        """The physical address of the entry there; its table exists."""
        return pte_offset_map(self.mm, pmd_offset(self.mm, self.base + offset), self.base + offset)

    def slot(self, offset: int) -> int:
        """The swap slot that the entry there holds, or -1."""
        value = self.host.ram.u64[self.pte(offset) >> 3]
        return swp_offset(pte_to_swp_entry(value)) if is_swap_pte(value) else -1

    def in_swap_cache(self, offset: int) -> bool:
        """Whether the page there is in the swap cache, mapped or not."""
        pfn = self.pfn(offset)
        if pfn >= 0:
            return bool(self.host.pages.flags[pfn] & PG_swapcache)
        return bool(self.host.swap.cache[self.slot(offset)])

    def brackets(self) -> list[tuple[Any, ...]]:
        """The brackets since the last call; none may be open."""
        assert self.notifier.depth == 0
        return self.notifier.take()

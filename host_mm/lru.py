"""The LRU lists of each node and the batches through which folios reach them.

Source of truth: mm/swap.c (folio_add_lru, folio_mark_accessed, lru_activate, lru_deactivate,
lru_lazyfree, lru_move_tail, folio_batch_move_lru), include/linux/mm_inline.h, mm/vmscan.c:
folio_isolate_lru, folio_putback_lru (Linux 6.18, the lists of the classic LRU; those of the
multi-generational one are in lru_gen.py, mlocked folios in mlock_folio.py).

A folio goes to its list when a batch of FOLIO_BATCH_SIZE is full or drained. Until then it is not
on any list (PG_lru clear) and the batch holds a reference, which migration and COW reuse can see.
Batches belong to CPUs: vCPU n's thread runs on CPU n, all other tasks on CPU 0.

A list is an ordered dict: its last key is the head (newest), its first the tail.

Not modelled: workingset shadow entries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.kernel.locks import Spinlock
from host_mm.mlock_folio import Mlock, folio_evictable, vma_locks
from host_mm.page import (
    FOLIO_BATCH_SIZE,
    PG_active,
    PG_anon,
    PG_dirty,
    PG_head,
    PG_idle,
    PG_locked,
    PG_lru,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
    PG_workingset,
    folio_nr_pages,
    get_page,
    put_page,
    try_get_page,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.memcontrol import MemCgroup
    from host_mm.mm_types import VmArea

__all__ = [
    "LRU_ACTIVE_ANON",
    "LRU_ACTIVE_FILE",
    "LRU_INACTIVE_ANON",
    "LRU_INACTIVE_FILE",
    "LRU_NAMES",
    "LRU_UNEVICTABLE",
    "Lru",
    "Lruvec",
    "folio_lru_list",
]

# enum lru_list
LRU_INACTIVE_ANON = 0
LRU_ACTIVE_ANON = 1
LRU_INACTIVE_FILE = 2
LRU_ACTIVE_FILE = 3
LRU_UNEVICTABLE = 4
LRU_NAMES = ("inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable")


def folio_lru_list(flags: int) -> int:
    """Which list a folio with these flags belongs to. Lazily freed anonymous folios count as file."""
    if flags & PG_unevictable:
        return LRU_UNEVICTABLE
    base = LRU_INACTIVE_ANON if flags & PG_swapbacked else LRU_INACTIVE_FILE
    return base + 1 if flags & PG_active else base


class Lruvec:
    """struct lruvec of one node and one memory cgroup. `sizes` has the sizes of its lists in pages."""

    __slots__ = ("lists", "lock", "nid", "pages", "sizes")

    def __init__(self, host: HostMm, nid: int) -> None:
        self.nid = nid
        self.lock = Spinlock(host.sched, "lru_lock")
        self.pages = host.pages
        self.lists: tuple[OrderedDict[int, None], ...] = tuple(OrderedDict() for _ in LRU_NAMES)
        self.sizes = [0] * len(LRU_NAMES)

    def add(self, pfn: int, flags: int) -> None:
        """lruvec_add_folio: at the head."""
        lru = folio_lru_list(flags)
        self.lists[lru][pfn] = None
        self.sizes[lru] += 1 << self.pages.order[pfn] if flags & PG_head else 1

    def add_tail(self, pfn: int, flags: int) -> None:
        """lruvec_add_folio_tail."""
        self.add(pfn, flags)
        self.lists[folio_lru_list(flags)].move_to_end(pfn, last=False)

    def remove(self, pfn: int, flags: int) -> None:
        """lruvec_del_folio."""
        lru = folio_lru_list(flags)
        try:
            del self.lists[lru][pfn]
        except KeyError:
            raise BrokenTruth("lru", f"pfn {pfn:#x} is not on {LRU_NAMES[lru]} of node {self.nid}") from None
        self.sizes[lru] -= 1 << self.pages.order[pfn] if flags & PG_head else 1

    def where(self, pfn: int) -> list[str]:
        """The lists that a folio is on: one at most."""
        return [name for name, entries in zip(LRU_NAMES, self.lists, strict=True) if pfn in entries]

    def audit(self) -> None:
        """Check what the lists say of themselves."""
        found = [sum(folio_nr_pages(self.pages, pfn) for pfn in entries) for entries in self.lists]
        if found != self.sizes:
            raise BrokenTruth("lru", f"node {self.nid} counts {self.sizes} pages on its lists, has {found}")


class _Batches:
    """struct cpu_fbatches and struct mlock_fbatch of one CPU."""

    __slots__ = ("activate", "add", "deactivate", "lazyfree", "mlock", "move_tail")

    def __init__(self) -> None:
        self.add: list[int] = []
        self.move_tail: list[int] = []
        self.deactivate: list[int] = []
        self.lazyfree: list[int] = []
        self.activate: list[int] = []
        self.mlock: list[tuple[int, int]] = []


class Lru:
    """mm/swap.c for one host: the lists of all nodes and the batches of all CPUs."""

    def __init__(
        self, host: HostMm, new_lruvec: Callable[[HostMm, int, MemCgroup | None], Lruvec]
    ) -> None:
        self.host = host
        self.vecs = [new_lruvec(host, node.nid, None) for node in host.allocator.nodes]
        for node, vec in zip(host.allocator.nodes, self.vecs, strict=True):
            node.lruvec = vec
        self._cpus: dict[int, _Batches] = {}
        self.mlock = Mlock(self)
        self.disabled = 0

    def lruvec(self, pfn: int) -> Lruvec:
        """folio_lruvec: its group's, on its node."""
        memcg = self.host.memcg.folios.get(pfn)
        vecs = self.vecs if memcg is None else memcg.lruvecs
        return vecs[self.host.allocator.nid_of(pfn)]

    def batches(self) -> _Batches:
        """The current CPU's."""
        cpu = self.host.smp_processor_id()
        batches = self._cpus.get(cpu)
        if batches is None:
            batches = self._cpus[cpu] = _Batches()
        return batches

    # -- what a batch does to its folios ------------------------------------------------------

    def _lru_add(self, vec: Lruvec, pfn: int) -> None:
        flags = self.host.pages.flags
        value = flags[pfn]
        vmstat = self.host.vmstat
        if not folio_evictable(self.host, pfn):
            if not value & PG_unevictable:
                vmstat["unevictable_pgs_culled"] += folio_nr_pages(self.host.pages, pfn)
            value = (value & ~PG_active) | PG_unevictable
            self.mlock.count[pfn] = 0
        elif value & PG_unevictable:
            vmstat["unevictable_pgs_rescued"] += folio_nr_pages(self.host.pages, pfn)
            value &= ~PG_unevictable
        flags[pfn] = value
        vec.add(pfn, value)

    def _lru_move_tail(self, vec: Lruvec, pfn: int) -> None:
        flags = self.host.pages.flags
        value = flags[pfn]
        if value & PG_unevictable:
            return
        vec.remove(pfn, value)
        flags[pfn] = value = value & ~PG_active
        vec.add_tail(pfn, value)
        self.host.vmstat["pgrotated"] += folio_nr_pages(self.host.pages, pfn)

    def _lru_activate(self, vec: Lruvec, pfn: int) -> None:
        flags = self.host.pages.flags
        value = flags[pfn]
        if value & (PG_active | PG_unevictable):
            return
        vec.remove(pfn, value)
        flags[pfn] = value = value | PG_active
        vec.add(pfn, value)
        self.host.vmstat["pgactivate"] += folio_nr_pages(self.host.pages, pfn)

    def _lru_deactivate(self, vec: Lruvec, pfn: int) -> None:
        flags = self.host.pages.flags
        value = flags[pfn]
        if value & PG_unevictable or not (value & PG_active or self.host.lru_gen_enabled):
            return
        vec.remove(pfn, value)
        flags[pfn] = value = value & ~(PG_active | PG_referenced)
        vec.add(pfn, value)
        self.host.vmstat["pgdeactivate"] += folio_nr_pages(self.host.pages, pfn)

    def _lru_lazyfree(self, vec: Lruvec, pfn: int) -> None:
        flags = self.host.pages.flags
        value = flags[pfn]
        if not value & PG_anon or not value & PG_swapbacked or value & (PG_swapcache | PG_unevictable):
            return
        vec.remove(pfn, value)
        if self.host.lru_gen_enabled:
            value &= ~PG_workingset
        flags[pfn] = value = value & ~(PG_active | PG_referenced | PG_swapbacked)
        vec.add(pfn, value)
        self.host.vmstat["pglazyfree"] += folio_nr_pages(self.host.pages, pfn)

    def _move(self, batch: list[int], fn: Callable[[Lruvec, int], None], *, adding: bool = False) -> None:
        """folio_batch_move_lru."""
        flags = self.host.pages.flags
        folios, batch[:] = list(batch), []
        for pfn in folios:
            vec = self.lruvec(pfn)
            with vec.lock:
                if not adding:
                    # Isolated meanwhile: whoever has it puts it where it belongs.
                    if not flags[pfn] & PG_lru:
                        continue
                elif flags[pfn] & PG_lru:
                    raise BrokenTruth("lru", f"pfn {pfn:#x} is added to the lists twice")
                fn(vec, pfn)
                flags[pfn] |= PG_lru
        for pfn in folios:
            put_page(self.host, pfn)

    def _queue(
        self, batch: list[int], pfn: int, fn: Callable[[Lruvec, int], None], *, adding: bool = False
    ) -> None:
        get_page(self.host, pfn)
        batch.append(pfn)
        # A large folio does not wait: its references would be in everybody's way.
        if len(batch) >= FOLIO_BATCH_SIZE or self.disabled or self.host.pages.flags[pfn] & PG_head:
            self._move(batch, fn, adding=adding)

    # -- the interface of mm/swap.c -----------------------------------------------------------

    def folio_add_lru(self, pfn: int) -> None:
        """Queue a new folio for its list: the inactive one unless it is marked accessed first.

        With generations, one that a fault makes is young.
        """
        host = self.host
        task, flags = host.sched.current, host.pages.flags
        if host.lru_gen_enabled and task in host.gens.in_fault and task not in host.allocator.memalloc:
            if not flags[pfn] & PG_unevictable:
                flags[pfn] |= PG_active
        self._queue(self.batches().add, pfn, self._lru_add, adding=True)

    def folio_add_lru_vma(self, pfn: int, vma: VmArea) -> None:
        """As folio_add_lru, but a folio of a locked VMA becomes unevictable."""
        if vma_locks(vma):
            self.mlock.mlock_new_folio(pfn)
        else:
            self.folio_add_lru(pfn)

    def folio_mark_accessed(self, pfn: int) -> None:
        """One step up: unreferenced, referenced, active, active and referenced."""
        if self.host.lru_gen_enabled:
            self.host.gens.inc_refs(pfn)
            return
        flags = self.host.pages.flags
        value = flags[pfn]
        if not value & PG_referenced:
            flags[pfn] = value | PG_referenced
        elif not value & (PG_unevictable | PG_active):
            if value & PG_lru:
                self.folio_activate(pfn)
            elif pfn in self.batches().add:
                flags[pfn] |= PG_active
            flags[pfn] &= ~PG_referenced
        if value & PG_idle:
            flags[pfn] &= ~PG_idle

    def folio_activate(self, pfn: int) -> None:
        """Queue a move to the active list."""
        value = self.host.pages.flags[pfn]
        if value & PG_lru and not value & (PG_active | PG_unevictable):
            self._queue(self.batches().activate, pfn, self._lru_activate)

    def folio_deactivate(self, pfn: int) -> None:
        """Queue a move from the active to the inactive list, or to the generation of what is not used."""
        value = self.host.pages.flags[pfn]
        if not value & PG_lru or value & PG_unevictable:
            return
        old = self.host.gens.clear_refs(pfn) if self.host.lru_gen_enabled else not value & PG_active
        if not old:
            self._queue(self.batches().deactivate, pfn, self._lru_deactivate)

    def folio_mark_lazyfree(self, pfn: int) -> None:
        """Queue a clean anonymous folio to become discardable (MADV_FREE)."""
        value = self.host.pages.flags[pfn]
        wanted = PG_anon | PG_swapbacked | PG_lru
        if value & wanted == wanted and not value & (PG_swapcache | PG_unevictable):
            self._queue(self.batches().lazyfree, pfn, self._lru_lazyfree)

    def folio_rotate_reclaimable(self, pfn: int) -> None:
        """Writeback for reclaim ends: queue a move to the tail. From I/O completion, so no lock."""
        value = self.host.pages.flags[pfn]
        if value & PG_lru and not value & (PG_locked | PG_dirty | PG_unevictable):
            get_page(self.host, pfn)
            self.batches().move_tail.append(pfn)

    def _drain(self, batches: _Batches) -> None:
        if batches.add:
            self._move(batches.add, self._lru_add, adding=True)
        if batches.move_tail:
            self._move(batches.move_tail, self._lru_move_tail)
        if batches.deactivate:
            self._move(batches.deactivate, self._lru_deactivate)
        if batches.lazyfree:
            self._move(batches.lazyfree, self._lru_lazyfree)
        if batches.activate:
            self._move(batches.activate, self._lru_activate)
        if batches.mlock:
            self.mlock.mlock_folio_batch(batches.mlock)

    def lru_add_drain(self) -> None:
        """Empty this CPU's batches."""
        self._drain(self.batches())

    def lru_add_drain_all(self) -> None:
        """Empty every CPU's batches."""
        for batches in list(self._cpus.values()):
            self._drain(batches)

    def lru_cache_disable(self) -> None:
        """Empty all batches and let none fill until lru_cache_enable: migration wants no stray references."""
        self.disabled += 1
        self.lru_add_drain_all()

    def lru_cache_enable(self) -> None:
        """Let batches fill again."""
        self.disabled -= 1

    def lru_del(self, pfn: int) -> None:
        """__page_cache_release: the folio's last reference went while it was on a list."""
        flags = self.host.pages.flags
        vec = self.lruvec(pfn)
        with vec.lock:
            vec.remove(pfn, flags[pfn])
            flags[pfn] &= ~(PG_lru | PG_active | PG_unevictable)
        self.mlock.count.pop(pfn, None)

    # -- isolation ----------------------------------------------------------------------------

    def folio_isolate_lru(self, pfn: int) -> bool:
        """Take a folio off its list, with a reference; False if it is on none."""
        flags = self.host.pages.flags
        if not flags[pfn] & PG_lru or not try_get_page(self.host, pfn):
            return False
        vec = self.lruvec(pfn)
        with vec.lock:
            flags[pfn] &= ~PG_lru
            vec.remove(pfn, flags[pfn])
        return True

    def folio_putback_lru(self, pfn: int) -> None:
        """Give an isolated folio back to the lists and drop the isolation's reference."""
        self.folio_add_lru(pfn)
        put_page(self.host, pfn)

    # -- for audits ---------------------------------------------------------------------------

    def batched(self) -> list[int]:
        """Every folio a batch holds a reference to, once per reference."""
        return [
            pfn
            for b in self._cpus.values()
            for batch in (b.add, b.move_tail, b.deactivate, b.lazyfree, b.activate, [p for p, _ in b.mlock])
            for pfn in batch
        ]

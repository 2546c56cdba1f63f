"""Multi-generational LRU: generations, the lists that stand for them, and the look around a young entry.

Source of truth: include/linux/mm_inline.h (lru_gen_add_folio, lru_gen_del_folio, lru_gen_folio_seq),
include/linux/mmzone.h (LRU_REFS_FLAGS), mm/swap.c (lru_gen_inc_refs, lru_gen_clear_refs), mm/vmscan.c
(folio_update_gen, folio_inc_gen, lru_gen_set_refs, walk_update_folio, lru_gen_look_around); Linux 6.18.

    min_seq[type] ... max_seq    the generations that exist, MIN_NR_GENS to MAX_NR_GENS of them; the two
                                 youngest are what the classic LRU calls active
    gen, refs                    each folio's generation (-1: on no list) and its count of accesses
                                 through files, which the kernel keeps in page->flags

A folio that the page-table walk promotes gets its new generation at once and stays on its old list until
eviction meets it there; so `place` says which list a folio is on, and only `gen` how young it is.

Aging is in lru_gen_walk.py, eviction in lru_gen_evict.py. On with `--param mm.lru_gen=Y`, or later.

Not modelled: Bloom filters (every page table is walked), zones (one a node), the PID controller, which
without workingset refaults never protects a tier, huge entries.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm.arch.x86.pgtable import _PAGE_ACCESSED, _PAGE_SPECIAL, pte_dirty, pte_pfn, pte_present
from host_mm.kernel.errors import BrokenTruth
from host_mm.lru import LRU_UNEVICTABLE, Lruvec
from host_mm.mm_types import VM_SPECIAL
from host_mm.page import (
    PG_active,
    PG_anon,
    PG_dirty,
    PG_reclaim,
    PG_referenced,
    PG_swapbacked,
    PG_swapcache,
    PG_unevictable,
    PG_workingset,
    PG_writeback,
    page_folio,
    set_page_dirty,
)
from host_mm.pgtable_generic import ptep_get, ptep_test_and_clear_young
from host_mm.ram import column

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.kernel.sched import Task
    from host_mm.memcontrol import MemCgroup
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "ANON_AND_FILE", "LRU_REFS_WIDTH", "MAX_LRU_BATCH", "MAX_NR_GENS", "MIN_LRU_BATCH", "MIN_NR_GENS",
    "GenLruvec", "LruGen", "MmWalk", "lru_gen_change_state", "ptep_clear_young_notify",
]

MIN_NR_GENS = 2
MAX_NR_GENS = 4
ANON_AND_FILE = 2
LRU_REFS_WIDTH = 2
MIN_LRU_BATCH = 64
MAX_LRU_BATCH = MIN_LRU_BATCH * 64
_REFS_MASK = (1 << LRU_REFS_WIDTH) - 1
_PMD = 1 << 21


def ptep_clear_young_notify(mm: MmStruct, address: int, pte: int) -> bool:
    """Clear the accessed bit here and in secondary MMUs, none of which need flush; whether any was set."""
    young = int(ptep_test_and_clear_young(mm, address, pte))
    return bool(young | mmu_notifier.mmu_notifier_clear_young(mm, address, address + 4096))


class GenLruvec(Lruvec):
    """A lruvec whose evictable folios are on lists by generation, while that is switched on.

    `mm_seq` is the last generation that a walk of all page tables was finished for, `mm_pending` the
    address spaces that the walk under way has not come to.
    """

    __slots__ = (
        "folios", "host", "max_seq", "memcg", "min_seq", "mm_pending", "mm_seq", "nr_pages", "timestamps",
    )

    def __init__(self, host: HostMm, nid: int, memcg: MemCgroup | None) -> None:
        super().__init__(host, nid)
        self.host = host
        self.memcg = memcg
        self.max_seq = MIN_NR_GENS + 1
        self.min_seq = [0, 0]
        self.mm_seq = MIN_NR_GENS
        self.mm_pending: list[MmStruct] | None = None
        self.timestamps = [host.sched.now] * MAX_NR_GENS
        self.nr_pages = [[0, 0] for _ in range(MAX_NR_GENS)]
        self.folios: list[list[OrderedDict[int, None]]] = [
            [OrderedDict(), OrderedDict()] for _ in range(MAX_NR_GENS)
        ]

    def is_active(self, gen: int) -> bool:
        """lru_gen_is_active: whether it is one of the two youngest."""
        return gen in (self.max_seq % MAX_NR_GENS, (self.max_seq - 1) % MAX_NR_GENS)

    def nr_gens(self, kind: int) -> int:
        """How many generations of anonymous (0) or file (1) folios there are."""
        return self.max_seq - self.min_seq[kind] + 1

    def folio_seq(self, pfn: int, reclaiming: bool) -> int:
        """lru_gen_folio_seq: the generation that a folio enters when it is put on a list."""
        flags = self.host.pages.flags[pfn]
        kind = 0 if flags & PG_swapbacked else 1
        workingset = bool(flags & PG_workingset)
        if flags & PG_active:
            age = MIN_NR_GENS - workingset
        elif reclaiming:
            age = MAX_NR_GENS
        elif (not kind and not flags & PG_swapcache) or (
            flags & PG_reclaim and flags & (PG_dirty | PG_writeback)
        ):
            age = MIN_NR_GENS
        else:
            age = MAX_NR_GENS - workingset
        return max(self.max_seq - age + 1, self.min_seq[kind])

    # -- Lruvec's interface -------------------------------------------------------------------

    def add(self, pfn: int, flags: int) -> None:
        """lruvec_add_folio: into the generation that its flags say."""
        if flags & PG_unevictable or not self.host.lru_gen_enabled:
            super().add(pfn, flags)
        else:
            self._add(pfn, reclaiming=False)

    def add_tail(self, pfn: int, flags: int) -> None:
        """lruvec_add_folio_tail: into the oldest generation that exists, first in line."""
        if flags & PG_unevictable or not self.host.lru_gen_enabled:
            super().add_tail(pfn, flags)
        else:
            self._add(pfn, reclaiming=True)

    def remove(self, pfn: int, flags: int) -> None:
        """lruvec_del_folio: a folio of an active generation leaves with PG_active set."""
        if self.host.gens.gen[pfn]:
            self.del_folio(pfn, reclaiming=False)
        else:
            super().remove(pfn, flags)

    def where(self, pfn: int) -> list[str]:
        """The lists that a folio is on."""
        found = [
            f"gen {gen} {'anon' if not kind else 'file'}"
            for gen in range(MAX_NR_GENS) for kind in range(ANON_AND_FILE) if pfn in self.folios[gen][kind]
        ]
        return found + super().where(pfn)

    def audit(self) -> None:
        """Compare the counts with the folios that there are, and the generations with their bounds."""
        super().audit()
        gens = self.host.gens
        found = [[0, 0] for _ in range(MAX_NR_GENS)]
        for row in self.folios:
            for kind, entries in enumerate(row):
                for pfn in entries:
                    found[gens.gen[pfn] - 1][kind] += gens.pages_of(pfn)
        if found != self.nr_pages:
            raise BrokenTruth("lru", f"node {self.nid} counts {self.nr_pages} by generation, has {found}")
        if not all(MIN_NR_GENS <= self.nr_gens(kind) <= MAX_NR_GENS for kind in range(ANON_AND_FILE)):
            raise BrokenTruth("lru", f"node {self.nid}: generations {self.min_seq} to {self.max_seq}")

    def evictable(self) -> list[int]:
        """Every folio of the lists that reclaim takes from, oldest first."""
        classic = [pfn for entries in self.lists[:LRU_UNEVICTABLE] for pfn in entries]
        seqs = range(min(self.min_seq), self.max_seq + 1)
        return classic + [
            pfn for seq in seqs for entries in self.folios[seq % MAX_NR_GENS] for pfn in entries
        ]

    # -- lists --------------------------------------------------------------------------------

    def _add(self, pfn: int, *, reclaiming: bool) -> None:
        gens, flags = self.host.gens, self.host.pages.flags
        gen = self.folio_seq(pfn, reclaiming) % MAX_NR_GENS
        kind = gens.kind(pfn)
        flags[pfn] &= ~PG_active
        gens.gen[pfn] = gen + 1
        self.nr_pages[gen][kind] += gens.pages_of(pfn)
        self.put(pfn, gen, kind, tail=reclaiming)

    def del_folio(self, pfn: int, *, reclaiming: bool) -> None:
        """lru_gen_del_folio: off its list."""
        gens, flags = self.host.gens, self.host.pages.flags
        gen = gens.gen[pfn] - 1
        if not reclaiming and self.is_active(gen):
            flags[pfn] |= PG_active
        gens.gen[pfn] = 0
        self.nr_pages[gen][gens.kind(pfn)] -= gens.pages_of(pfn)
        self.take(pfn)

    def put(self, pfn: int, gen: int, kind: int, *, tail: bool) -> None:
        """list_add or list_add_tail."""
        entries = self.folios[gen][kind]
        entries[pfn] = None
        if tail:
            entries.move_to_end(pfn, last=False)
        self.host.gens.place[pfn] = gen * ANON_AND_FILE + kind + 1

    def take(self, pfn: int) -> None:
        """list_del."""
        gens = self.host.gens
        place = gens.place[pfn] - 1
        if place < 0 or pfn not in self.folios[place // ANON_AND_FILE][place % ANON_AND_FILE]:
            raise BrokenTruth("lru", f"pfn {pfn:#x} is on no list of node {self.nid}")
        del self.folios[place // ANON_AND_FILE][place % ANON_AND_FILE][pfn]
        gens.place[pfn] = 0

    def move(self, pfn: int, gen: int, *, tail: bool = False) -> None:
        """list_move or list_move_tail, to the list of a generation."""
        self.take(pfn)
        self.put(pfn, gen, self.host.gens.kind(pfn), tail=tail)

    def inc_gen(self, pfn: int, kind: int, *, reclaiming: bool) -> int:
        """folio_inc_gen: from the oldest generation to the next, unless a walk promoted it meanwhile."""
        gens, flags = self.host.gens, self.host.pages.flags
        old = self.min_seq[kind] % MAX_NR_GENS
        if gens.gen[pfn] - 1 != old:
            return gens.gen[pfn] - 1
        new = (old + 1) % MAX_NR_GENS
        gens.gen[pfn] = new + 1
        gens.refs[pfn] = 0
        flags[pfn] = (flags[pfn] & ~PG_referenced) | (PG_reclaim if reclaiming else 0)
        size = gens.pages_of(pfn)
        self.nr_pages[old][kind] -= size
        self.nr_pages[new][kind] += size
        return new


class MmWalk:
    """struct lru_gen_mm_walk: promotions that are not yet counted in the lruvec, and what was met."""

    __slots__ = ("batched", "leaf_total", "leaf_young", "nr_pages", "seq", "swappiness", "vec")

    def __init__(self) -> None:
        self.vec: GenLruvec | None = None
        self.seq = 0
        self.swappiness = 0
        self.batched = 0
        self.leaf_total = self.leaf_young = 0
        self.nr_pages = [[0, 0] for _ in range(MAX_NR_GENS)]

    def reset_batch_size(self, vec: GenLruvec) -> None:
        """Count the promotions in the lruvec, whose lock is held."""
        self.batched = 0
        for gen, row in enumerate(self.nr_pages):
            for kind in range(ANON_AND_FILE):
                vec.nr_pages[gen][kind] += row[kind]
                row[kind] = 0


class LruGen:
    """What all lruvecs of a host share: the bits of page->flags, and who is in a fault or in reclaim."""

    __slots__ = ("gen", "host", "in_fault", "place", "refs", "walks")

    def __init__(self, host: HostMm) -> None:
        self.host = host
        nr_frames = host.pages.nr_frames
        self.gen = column("B", nr_frames)
        self.place = column("B", nr_frames)
        self.refs = column("B", nr_frames)
        self.in_fault: set[Task] = set()
        self.walks: dict[Task, MmWalk] = {}

    def forget(self, pfn: int, order: int) -> None:
        """A free hook: PAGE_FLAGS_CHECK_AT_PREP clears these too."""
        for frame in range(pfn, pfn + (1 << order)):
            self.refs[frame] = 0

    def kind(self, pfn: int) -> int:
        """folio_is_file_lru: 0 anonymous, 1 file (or lazily freed)."""
        return 0 if self.host.pages.flags[pfn] & PG_swapbacked else 1

    def pages_of(self, pfn: int) -> int:
        """folio_nr_pages."""
        return 1 << self.host.pages.order[pfn]

    def lruvec(self, pfn: int) -> GenLruvec:
        """folio_lruvec."""
        vec = self.host.lru.lruvec(pfn)
        assert isinstance(vec, GenLruvec)
        return vec

    # -- references ---------------------------------------------------------------------------

    def inc_refs(self, pfn: int) -> None:
        """lru_gen_inc_refs: an access through a file, or by who holds a reference."""
        flags = self.host.pages.flags
        value = flags[pfn]
        if value & PG_unevictable:
            return
        if not value & PG_referenced:
            flags[pfn] = value | PG_referenced
            self.refs[pfn] = 0
        elif self.refs[pfn] == _REFS_MASK:
            flags[pfn] = value | PG_workingset
        else:
            self.refs[pfn] += 1

    def clear_refs(self, pfn: int) -> bool:
        """lru_gen_clear_refs: nobody counts as having used it; true if it is in the oldest generation."""
        if not self.gen[pfn]:
            return True
        self.refs[pfn] = 0
        self.host.pages.flags[pfn] &= ~(PG_referenced | PG_workingset)
        oldest = self.lruvec(pfn).min_seq[self.kind(pfn)]
        return bool(self.gen[pfn] - 1 == oldest % MAX_NR_GENS)

    def set_refs(self, pfn: int) -> bool:
        """lru_gen_set_refs: an accessed bit was found by rmap; true the second time."""
        flags = self.host.pages.flags
        value = flags[pfn]
        self.refs[pfn] = 0
        if not value & (PG_referenced | PG_workingset):
            flags[pfn] = value | PG_referenced
            return False
        flags[pfn] = (value & ~PG_referenced) | PG_workingset
        return True

    def folio_refs(self, pfn: int) -> int:
        """folio_lru_refs: how often it was used, as far as it counts."""
        return self.refs[pfn] + 1 if self.host.pages.flags[pfn] & PG_referenced else 0

    def _update_gen(self, pfn: int, gen: int) -> int:
        """folio_update_gen: promote without moving; the old generation, or -1 if there is none yet."""
        flags = self.host.pages.flags
        value = flags[pfn]
        if not value & (PG_referenced | PG_workingset):
            flags[pfn] = value | PG_referenced
            self.refs[pfn] = 0
            return -1
        old = self.gen[pfn] - 1
        if old < 0:
            return -1
        self.gen[pfn] = gen + 1
        self.refs[pfn] = 0
        flags[pfn] = (value & ~PG_referenced) | PG_workingset
        return int(old)

    def update_folio(self, walk: MmWalk | None, pfn: int, new_gen: int, dirty: bool) -> None:
        """walk_update_folio: an entry of it was young."""
        host = self.host
        flags = host.pages.flags[pfn]
        wanted = PG_anon | PG_swapbacked
        if dirty and not flags & PG_dirty and (flags & wanted != wanted or flags & PG_swapcache):
            set_page_dirty(host, pfn)
        if walk is not None:
            old = self._update_gen(pfn, new_gen)
            if old >= 0 and old != new_gen:
                kind, size = self.kind(pfn), self.pages_of(pfn)
                walk.batched += 1
                walk.nr_pages[old][kind] -= size
                walk.nr_pages[new_gen][kind] += size
        elif self.set_refs(pfn) and self.gen[pfn] and self.gen[pfn] - 1 != new_gen:
            host.lru.folio_activate(pfn)

    # -- entries ------------------------------------------------------------------------------

    def folio_of_entry(self, mm: MmStruct, value: int, nid: int, memcg: MemCgroup | None) -> int:
        """get_pte_pfn and get_pfn_folio: the folio whose use an entry may show, or -1.

        It is on this node, in this group and on a list. An entry that is not young is asked about only
        where somebody else, who has accessed bits of his own, may have used it.
        """
        host = self.host
        if not pte_present(value) or value & _PAGE_SPECIAL or pte_pfn(value) == host.zero_pfn:
            return -1
        if not value & _PAGE_ACCESSED and mm.notifier_subscriptions is None:
            return -1
        pfn = page_folio(host.pages, pte_pfn(value))
        if not self.gen[pfn] or host.allocator.nid_of(pfn) != nid or host.memcg.folios.get(pfn) is not memcg:
            return -1
        return pfn

    def look_around(self, pfn: int, vma: VmArea, address: int, pte: int) -> bool:
        """Whether the entry is young; if so, what is young around it is promoted too. The table is locked."""
        mm, host = vma.mm, self.host
        if not ptep_clear_young_notify(mm, address, pte):
            return False
        if vma.flags & VM_SPECIAL:
            return True
        memcg, nid = host.memcg.folios.get(pfn), host.allocator.nid_of(pfn)
        gen = self.lruvec(pfn).max_seq % MAX_NR_GENS
        walk = self.walks.get(host.sched.current)
        start, end = _window(vma, address)
        at = pte - ((address - start) >> 9)
        last, dirty = -1, False
        for where in range(start, end, 4096) if end - start > 4096 else ():
            value = ptep_get(mm, at)
            folio = self.folio_of_entry(mm, value, nid, memcg)
            if folio >= 0 and ptep_clear_young_notify(mm, where, at):
                if folio != last:
                    if last >= 0:
                        self.update_folio(walk, last, gen, dirty)
                    last, dirty = folio, False
                dirty = dirty or pte_dirty(value)
            at += 8
        if last >= 0:
            self.update_folio(walk, last, gen, dirty)
        return True


def lru_gen_change_state(host: HostMm, enabled: bool) -> None:
    """/sys/kernel/mm/lru_gen/enabled: every folio moves from the lists of one kind to those of the other."""
    if enabled == host.lru_gen_enabled:
        return
    if enabled:
        host.free_hooks.append(host.gens.forget)
    else:
        host.free_hooks.remove(host.gens.forget)
    host.lru_gen_enabled = enabled
    flags = host.pages.flags
    for node in host.allocator.nodes:
        for vec in host.memcg.iter(node.nid, None):
            assert isinstance(vec, GenLruvec)
            with vec.lock:
                for pfn in vec.evictable():
                    if enabled:
                        Lruvec.remove(vec, pfn, flags[pfn])
                    else:
                        vec.del_folio(pfn, reclaiming=False)
                    vec.add(pfn, flags[pfn])
            if host.sched.preempt:
                host.sched.point("cond_resched")


def _window(vma: VmArea, address: int) -> tuple[int, int]:
    """The entries that look_around looks at: at most MIN_LRU_BATCH, of one table and one VMA."""
    start = max(address & ~(_PMD - 1), vma.start)
    end = min((address | (_PMD - 1)) + 1, vma.end)
    span = MIN_LRU_BATCH << 12
    if end - start > span:
        if address - start < span // 2:
            end = start + span
        elif end - address < span // 2:
            start = end - span
        else:
            start, end = address - span // 2, address + span // 2
    return start, end

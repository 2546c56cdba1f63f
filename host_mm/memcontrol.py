"""Memory cgroups: whose memory a folio is, how much a group may have, and reclaim within the group.

Source of truth: mm/memcontrol.c (try_charge_memcg, consume_stock, refill_stock, drain_all_stock,
__mem_cgroup_charge, mem_cgroup_swapin_charge_folio, mem_cgroup_migrate, __mem_cgroup_uncharge,
__mem_cgroup_try_charge_swap, memory_max_write, mem_cgroup_out_of_memory, mem_cgroup_iter),
mm/vmscan.c: user_proactive_reclaim, mm/memcontrol-v1.c: mem_cgroup_resize_max; Linux 6.18.

A folio is charged when it is allocated for a process and uncharged when it is freed; a process that
moves to another group leaves its charges behind. The root group, in which every process starts, counts
nothing. A charge is taken 64 pages at a time, what is over waits in the CPU's stock; who would go over
the limit reclaims from the group first, and kills one of its processes when that brings nothing.
A swap slot remembers its group, which is charged again when the page comes back.

Not modelled: charges of page cache, shmem and huge folios, of kernel memory and of page tables; groups
within groups, memory.min, low and high, zswap accounting, charge moving, v1's memsw counter, threads,
the seven-slot stock (one CPU has a stock for each group).
"""

from __future__ import annotations

from collections import Counter
from errno import EAGAIN, EBUSY, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.lru_gen import GenLruvec
from host_mm.page_alloc import (
    GFP_DIRECT_RECLAIM,
    GFP_HIGH,
    GFP_KERNEL,
    GFP_NORETRY,
    MAX_RECLAIM_RETRIES,
    PAGE_ALLOC_COSTLY_ORDER,
)

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.lru import Lruvec
    from host_mm.mm_types import MmStruct
    from host_mm.process import Process

__all__ = ["MEMCG_CHARGE_BATCH", "PAGE_COUNTER_MAX", "MemCgroup", "MemoryController"]

MEMCG_CHARGE_BATCH = 64
PAGE_COUNTER_MAX = (1 << 63) // 4096


class MemCgroup:
    """struct mem_cgroup, not the root. Counts and limits are in pages.

    `events` counts `max` (a charge met the limit), `oom` and `oom_kill`.
    """

    __slots__ = ("events", "lruvecs", "max", "name", "online", "processes", "swap", "swap_max", "usage")

    def __init__(self, host: HostMm, name: str) -> None:
        self.name = name
        self.usage = self.swap = 0
        self.max = self.swap_max = PAGE_COUNTER_MAX
        self.online = True
        self.processes: list[Process] = []
        self.events: Counter[str] = Counter()
        self.lruvecs = [GenLruvec(host, node.nid, self) for node in host.allocator.nodes]

    def try_charge(self, nr: int) -> bool:
        """page_counter_try_charge."""
        if self.usage + nr > self.max:
            return False
        self.usage += nr
        return True

    def __repr__(self) -> str:
        return f"<MemCgroup {self.name} usage {self.usage} max {self.max} swap {self.swap}>"


class MemoryController:
    """The groups of one host. `folios` has the group of each charged frame, `slots` of each swap slot."""

    __slots__ = ("folios", "groups", "host", "iterator", "slots", "stock")

    def __init__(self, host: HostMm) -> None:
        self.host = host
        self.groups: list[MemCgroup] = []
        self.folios: dict[int, MemCgroup] = {}
        self.slots: dict[int, MemCgroup] = {}
        self.stock: dict[int, dict[MemCgroup, int]] = {}
        self.iterator: dict[int, int] = {}

    # -- groups -------------------------------------------------------------------------------

    def create(self, name: str) -> MemCgroup:
        """mkdir: an empty group without a limit."""
        memcg = MemCgroup(self.host, name)
        self.groups.append(memcg)
        return memcg

    def remove(self, memcg: MemCgroup) -> None:
        """rmdir. What is still charged stays so until it is freed. KernelError(EBUSY)."""
        if memcg.processes:
            raise KernelError(EBUSY, f"memcg {memcg.name} has processes")
        self.drain_all_stock(memcg)
        memcg.online = False
        self._release(memcg)

    def _release(self, memcg: MemCgroup) -> None:
        if not memcg.online and not memcg.usage and not memcg.swap and memcg in self.groups:
            self.groups.remove(memcg)

    def attach(self, process: Process, memcg: MemCgroup | None) -> None:
        """Write to cgroup.procs; None is the root. What the process has stays charged where it is."""
        if process.memcg is not None:
            process.memcg.processes.remove(process)
        process.memcg = memcg
        if memcg is not None:
            memcg.processes.append(process)

    def iter(self, nid: int, target: MemCgroup | None) -> list[Lruvec]:
        """The lruvecs that reclaim on a node goes through: the target's, or everybody's in turn."""
        if target is not None:
            return [target.lruvecs[nid]]
        root = self.host.lru.vecs[nid]
        if not self.groups:
            return [root]
        vecs = [root, *(memcg.lruvecs[nid] for memcg in self.groups)]
        start = self.iterator.get(nid, 0) % len(vecs)
        return vecs[start:] + vecs[:start]

    def iter_break(self, nid: int, passed: int) -> None:
        """A walk ended after `passed` groups: the next one goes on from there."""
        self.iterator[nid] = self.iterator.get(nid, 0) + passed

    # -- the stock ----------------------------------------------------------------------------

    def _cpu_stock(self) -> dict[MemCgroup, int]:
        cpu = self.host.smp_processor_id()
        stock = self.stock.get(cpu)
        if stock is None:
            stock = self.stock[cpu] = {}
        return stock

    def _consume_stock(self, memcg: MemCgroup, nr: int) -> bool:
        stock = self._cpu_stock()
        have = stock.get(memcg, 0)
        if have < nr:
            return False
        stock[memcg] = have - nr
        return True

    def _refill_stock(self, memcg: MemCgroup, nr: int) -> None:
        stock = self._cpu_stock()
        have = stock.get(memcg, 0) + nr
        if have > MEMCG_CHARGE_BATCH:
            self._uncharge(memcg, have)
            have = 0
        stock[memcg] = have

    def drain_all_stock(self, memcg: MemCgroup) -> None:
        """Give back what the CPUs have charged in advance."""
        for stock in self.stock.values():
            self._uncharge(memcg, stock.pop(memcg, 0))

    def stocked(self, memcg: MemCgroup) -> int:
        """How many pages are charged in advance."""
        return sum(stock.get(memcg, 0) for stock in self.stock.values())

    def _uncharge(self, memcg: MemCgroup, nr: int) -> None:
        memcg.usage -= nr
        self._release(memcg)

    # -- charging -----------------------------------------------------------------------------

    def try_charge(self, memcg: MemCgroup, nr: int, gfp: int) -> int:
        """try_charge_memcg: 0 or -ENOMEM. May reclaim and kill."""
        host = self.host
        retries, drained = MAX_RECLAIM_RETRIES, False
        while True:
            if self._consume_stock(memcg, nr):
                return 0
            batch = max(MEMCG_CHARGE_BATCH, nr)
            if memcg.try_charge(batch):
                self._refill_stock(memcg, batch - nr)
                return 0
            if memcg.try_charge(nr):
                return 0
            if host.sched.current in host.allocator.memalloc:
                # Reclaim itself needs the page to free others.
                return self._force(memcg, nr)
            if not gfp & GFP_DIRECT_RECLAIM:
                return self._force(memcg, nr) if gfp & GFP_HIGH else -ENOMEM
            memcg.events["max"] += 1
            reclaimed = host.reclaim_memcg(memcg, nr, gfp)
            if memcg.max - memcg.usage >= nr:
                continue
            if not drained:
                self.drain_all_stock(memcg)
                drained = True
                continue
            if gfp & GFP_NORETRY:
                return -ENOMEM
            if reclaimed and nr <= 8:
                continue
            retries -= 1
            if retries >= 0:
                continue
            if nr > 1 << PAGE_ALLOC_COSTLY_ORDER:
                # Nobody dies for a huge page.
                return -ENOMEM
            memcg.events["oom"] += 1
            if not host.out_of_memory(0, memcg):
                return -ENOMEM
            retries = MAX_RECLAIM_RETRIES

    def _force(self, memcg: MemCgroup, nr: int) -> int:
        memcg.events["max"] += 1
        memcg.usage += nr
        return 0

    def charge(self, pfn: int, mm: MmStruct, gfp: int = GFP_KERNEL) -> int:
        """mem_cgroup_charge: a new folio belongs to the group of this mm's process. 0 or -ENOMEM."""
        return self._charge_folio(pfn, mm.process.memcg, gfp)

    def swapin_charge(self, pfn: int, slot: int, mm: MmStruct | None, gfp: int = GFP_KERNEL) -> int:
        """mem_cgroup_swapin_charge_folio: the group that swapped the page out is charged again."""
        memcg = self.slots.get(slot)
        if memcg is None or not memcg.online:
            memcg = mm.process.memcg if mm is not None else None
        return self._charge_folio(pfn, memcg, gfp)

    def _charge_folio(self, pfn: int, memcg: MemCgroup | None, gfp: int) -> int:
        if memcg is None:
            return 0
        self._check_uncharged(pfn)
        nr = 1 << self.host.pages.order[pfn]
        err = self.try_charge(memcg, nr, gfp)
        if not err:
            self.folios[pfn] = memcg
        return err

    def _check_uncharged(self, pfn: int) -> None:
        if pfn in self.folios:
            raise BrokenTruth("memcg-charge", f"pfn {pfn:#x} is charged twice", self.host.stream.here())

    def uncharge(self, pfn: int, nr: int = 1) -> None:
        """mem_cgroup_uncharge: the folio is being freed."""
        memcg = self.folios.pop(pfn, None)
        if memcg is not None:
            self._uncharge(memcg, nr)

    def migrate(self, old: int, new: int) -> None:
        """mem_cgroup_migrate: the charge goes with the contents, unless the new folio has one."""
        if new in self.folios:
            return
        memcg = self.folios.pop(old, None)
        if memcg is not None:
            self._check_uncharged(new)
            self.folios[new] = memcg

    def split(self, pfn: int, nr: int) -> None:
        """split_page_memcg: each page of a large folio is charged for itself from now on."""
        memcg = self.folios.get(pfn)
        if memcg is not None:
            for page in range(pfn, pfn + nr):
                self.folios[page] = memcg

    # -- swap ---------------------------------------------------------------------------------

    def try_charge_swap(self, pfn: int, slot: int) -> int:
        """The folio's slot counts for its group. 0, or -ENOMEM beyond memory.swap.max."""
        memcg = self.folios.get(pfn)
        if memcg is None:
            return 0
        if memcg.swap >= memcg.swap_max:
            memcg.events["swap_max"] += 1
            return -ENOMEM
        memcg.swap += 1
        self.slots[slot] = memcg
        return 0

    def uncharge_swap(self, slot: int) -> None:
        """The slot is free."""
        memcg = self.slots.pop(slot, None)
        if memcg is not None:
            memcg.swap -= 1
            self._release(memcg)

    # -- the group's files --------------------------------------------------------------------

    def write_max(self, memcg: MemCgroup, pages: int) -> None:
        """memory.max: from now on; reclaims, and kills, until the group is below. KernelError(EINVAL)."""
        if pages < 0:
            raise KernelError(EINVAL, f"{pages} pages: want 0 or more")
        memcg.max = min(pages, PAGE_COUNTER_MAX)
        retries, drained = MAX_RECLAIM_RETRIES, False
        while memcg.usage > memcg.max:
            if not drained:
                self.drain_all_stock(memcg)
                drained = True
                continue
            if retries:
                if not self.host.reclaim_memcg(memcg, memcg.usage - memcg.max, GFP_KERNEL):
                    retries -= 1
                continue
            memcg.events["oom"] += 1
            if not self.host.out_of_memory(0, memcg):
                break

    def resize_max(self, memcg: MemCgroup, pages: int) -> None:
        """v1's memory.limit_in_bytes: the limit holds once usage is below. KernelError(EBUSY, EINVAL)."""
        if pages < 0:
            raise KernelError(EINVAL, f"{pages} pages: want 0 or more")
        drained = False
        while memcg.usage > pages:
            if not drained:
                self.drain_all_stock(memcg)
                drained = True
            elif not self.host.reclaim_memcg(memcg, 1, GFP_KERNEL):
                raise KernelError(EBUSY, f"memcg {memcg.name}: {memcg.usage} pages are used, nothing can go")
        memcg.max = pages

    def write_reclaim(self, memcg: MemCgroup, pages: int) -> int:
        """memory.reclaim: free so many pages of the group, in quarters. KernelError(EAGAIN, EINVAL)."""
        if pages < 0:
            raise KernelError(EINVAL, f"{pages} pages: want 0 or more")
        retries, freed = MAX_RECLAIM_RETRIES, 0
        while freed < pages:
            if not retries:
                self.host.lru.lru_add_drain_all()
            got = self.host.reclaim_memcg(memcg, (pages - freed) // 4, GFP_KERNEL)
            if not got:
                if not retries:
                    raise KernelError(EAGAIN, f"memcg {memcg.name}: {freed} of {pages} pages came free")
                retries -= 1
            freed += got
        return freed

"""HostMm: one host's memory, wired together.

Source of truth: the kernel's boot (mm/mm_init.c) and, for the seams below, the calls between
mm/page_alloc.c, mm/memory.c, mm/madvise.c, mm/vmscan.c, mm/swapfile.c and mm/oom_kill.c; Linux 6.18.

Linux's mm is mutually recursive; imports here may not be. The lower files call upward by methods of
HostMm, which this file, at the top of the room, passes on:

    page_alloc  ->  reclaim, wakeup_kswapd, out_of_memory, try_to_compact_pages
    vmscan      ->  wakeup_kcompactd, reset_isolation_suitable
    memcontrol  ->  reclaim_memcg, out_of_memory
    memory      ->  do_swap_page, do_numa_page, do_fault, wp_page_shared
    swapin      ->  do_wp_page
    madvise     ->  reclaim_pages
    mmap        ->  shmem_file_setup
    page        ->  free_huge_folio, free_zone_device_folio
    mm_types    ->  free_mm

Not modelled: hot-added memory, nodes without memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from host_mm import (
    address_space,
    compaction,
    fork,
    huge_memory_split,
    hugetlb,
    hugetlb_pool,
    kcompactd,
    khugepaged,
    ksm,
    lru,
    lru_gen,
    memory_file,
    memory_wp,
    memremap,
    numa_balancing,
    oom_kill,
    page_alloc,
    page_io,
    page_writeback,
    shmem_file,
    shrinker,
    swap_state,
    swapin,
    tlb,
    truths_running,
    vmscan,
    vmscan_kswapd,
    zram,
    zswap,
)
from host_mm.huge_mm import Thp, shrink_huge_zero_folio
from host_mm.kernel.locks import Mutex, Spinlock, Srcu
from host_mm.kernel.sched import WaitQueue
from host_mm.khugepaged_types import Khugepaged, khugepaged_enter_vma
from host_mm.ksm_types import KSM_RUN_UNMERGE, Ksm
from host_mm.memcontrol import MemCgroup, MemoryController
from host_mm.page import GUP_PIN_COUNTING_BIAS, Pages, PG_head, PG_reserved, page_folio
from host_mm.page_alloc import PageAllocator
from host_mm.process import Process
from host_mm.profile import LINUX_6_18, MmProfile
from host_mm.ram import PAGE_SHIFT, Ram
from host_mm.secondary_tables import SecondaryTables
from host_mm.swap_readahead import SwapReadahead
from host_mm.swapfile import SwapInfo
from host_mm.tracepoints import all_tracepoints

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.kernel.sched import Scheduler, Task
    from host_mm.mm_types import MmStruct, VmArea, VmFault
    from trace_events.stream import TraceStream

__all__ = ["ZERO_PFN", "HostMm"]

ZERO_PFN = 1
"""Frame 0 is nobody's, so that 0 can mean none; frame 1 is empty_zero_page."""
_RESERVED = 2
QUIESCE_POLL = 100_000
"""ns between two looks at whether the daemons sleep."""

class HostMm:
    """The host kernel's memory management. Any number of processes, any number of VMs among them.

    `pte_hooks` are called as (mm, address, old, new) with each store to a level-1 entry, `pmd_hooks` with
    each to a level-2 entry that is or was no table; `free_hooks` as (pfn, order) with each block that goes
    back to the allocator. `checks` is the checker or None. `pmd_locks` has the lock of each level-2 table
    by its frame: address spaces can share such a table.
    `frame_holders` give, as pfn to count, the references that no page table, swap cache or LRU batch
    explains: pins, and frames that upper rooms allocated (for truths.audit). `held` counts, by frame,
    plain references (FOLL_GET) whose holders write through them.
    """

    def __init__(
        self, sched: Scheduler, stream: TraceStream, *, ram_bytes: int, swap_bytes: int | None,
        swap_path: str | None = None, nodes: int = 2, seed: int = 0, profile: MmProfile = LINUX_6_18,
        params: dict[str, str] | None = None, breaks: frozenset[str] = frozenset(), checks: bool = False,
    ) -> None:
        self.sched = sched
        self.stream = stream
        self.profile = profile
        self.params: dict[str, str] = dict(params or {})
        self.breaks = breaks
        self.nr_cpus = int(self.params.get("mm.nr_cpus", "64"))
        self.seed = seed
        self.vmstat: defaultdict[str, int] = defaultdict(int)
        self.trace: Any = stream.bind(all_tracepoints(), profile.absent_events)
        nr_frames = ram_bytes >> PAGE_SHIFT
        if nr_frames < 64:
            raise ValueError("a host needs 256 KiB of RAM at least")
        self.ram = Ram(nr_frames + memremap.DEVICE_FRAMES)
        self.pages = Pages(nr_frames + memremap.DEVICE_FRAMES)
        self.device_frames = memremap.DeviceFrames(nr_frames)
        self.zero_pfn = ZERO_PFN
        for pfn in range(_RESERVED):
            self.pages.flags[pfn] = PG_reserved
            self.pages.refcount[pfn] = 1
        self.pte_hooks: list[Callable[[MmStruct, int, int, int], None]] = []
        self.pmd_hooks: list[Callable[[MmStruct, int, int, int], None]] = []
        self.pmd_locks: dict[int, Spinlock] = {}
        self.free_hooks: list[Callable[[int, int], None]] = []
        self.mms: list[MmStruct] = []
        self.pins: Counter[int] = Counter()
        self.held: Counter[int] = Counter()
        self.frame_holders: list[Callable[[], Mapping[int, int]]] = [
            self._tables_of_the_dead, self._pins, self._poisoned,
        ]
        self.memcg = MemoryController(self)
        self.mf_mutex = Mutex(sched, "mf_mutex")
        self.soft_dirty = self.params.get("mm.soft_dirty", "Y").lower() in ("y", "1", "on", "yes", "true")
        self.lru_gen_enabled = self.params.get("mm.lru_gen", "N").lower() in ("y", "1", "on", "yes", "true")
        self.gens = lru_gen.LruGen(self)
        if self.lru_gen_enabled:
            self.free_hooks.append(self.gens.forget)
        self.allocator = PageAllocator(self, nr_frames, nodes, _RESERVED)
        self.thp = Thp(self)
        self.khugepaged = Khugepaged(self)
        self.frame_holders.append(self.thp.holders)
        self.shrinkers: list[shrinker.Shrinker] = []
        self.mmu_notifier_srcu = Srcu(sched, "mmu_notifier_srcu")
        self.secondary_tables = SecondaryTables()
        self.folio_waitqueues: dict[int, WaitQueue] = {}
        self.reclaim_wait = WaitQueue(sched, "reclaim_wait")
        self.oom_victims: set[Process] = set()
        self.oom_wait = WaitQueue(sched, "oom_wait")
        self.tlb_ubc: dict[Task, tlb.TlbUbc] = {}
        self.lru = lru.Lru(self, lru_gen.GenLruvec)
        self.swap: SwapInfo | None = None
        if swap_bytes:
            device = zram.Zram(self) if self.params.get("swap.device") == "zram" else None
            self.swap = SwapInfo(sched, swap_bytes, swap_path, device)
            self.swap.free_notify.append(self.memcg.uncharge_swap)
        self.zswap = zswap.Zswap(self, self.swap)
        self.swap_readahead = SwapReadahead(self.params)
        balancing = self.params.get("kernel.numa_balancing", "N").lower() in ("y", "1", "on", "yes", "true")
        self.numa_balancing = numa_balancing.NumaBalancing(self.params) if balancing else None
        self.swap_device = page_io.SwapDevice(self)
        self.file_device = page_io.SwapDevice(self, "file-io")
        self.flusher = page_writeback.Flusher(self)
        self.ksm = Ksm(self)
        self.hstate = hugetlb.Hstate(self, nodes)
        self.hugetlb_inodes = 0
        self.processes: list[Process] = []
        self.mappings: list[AddressSpace] = []
        self.delayed_fput: list[AddressSpace] = []
        self.next_pid = 1
        self.daemons: list[Task] = []
        self.checks: truths_running.HostTruths | None = None
        if checks:
            self.checks = truths_running.HostTruths(self)
            self.free_hooks.append(self.checks.frame_freed)
            self.pte_hooks.append(self.checks.pte_set)
            self.pmd_hooks.append(self.checks.pmd_set)

    def _tables_of_the_dead(self) -> dict[int, int]:
        """Page directories that outlive their process because a notifier still holds the mm."""
        return {mm.pgd >> 12: 1 for mm in self.mms if not mm.process.alive}

    def _poisoned(self) -> dict[int, int]:
        """Frames that memory_failure keeps for nobody."""
        return self.allocator.hwpoisoned

    def _pins(self) -> dict[int, int]:
        pages = self.pages
        pins = Counter({
            pfn: nr if pages.flags[page_folio(pages, pfn)] & PG_head else nr * GUP_PIN_COUNTING_BIAS
            for pfn, nr in self.pins.items() if nr
        })
        return pins + self.held

    @property
    def nodes(self) -> list[page_alloc.PgData]:
        """The NUMA nodes."""
        return self.allocator.nodes

    @property
    def zones(self) -> list[page_alloc.Zone]:
        """The zones of all nodes."""
        return self.allocator.zones

    def smp_processor_id(self) -> int:
        """The CPU that the current task is on: vCPU N's thread is on CPU N, everybody else on CPU 0.

        `--param mm.nr_cpus=1` puts all on one, as a VMM has them whose only thread enters every vCPU.
        """
        return max(self.sched.current.ctx.vcpu, 0) % self.nr_cpus

    def numa_node_id(self, process: Process) -> int:
        """The node of the CPU that the current task, a thread of `process` or KVM's for it, runs on."""
        node = self.sched.current.node
        return node if node >= 0 else process.home_node

    # -- processes ----------------------------------------------------------------------------

    def new_process(self, name: str, parent: Process | None = None) -> Process:
        """A process without an address space yet: fork's half of create_process."""
        process = Process(self, self.next_pid, name, parent)
        self.next_pid += 1
        self.processes.append(process)
        return process

    def create_process(self, name: str) -> Process:
        """A process with an empty address space. KernelError(ENOMEM)."""
        process = self.new_process(name)
        fork.mm_init(self, process)
        return process

    def free_mm(self, mm: MmStruct) -> None:
        """mm_types -> fork: the last reference to the mm is gone."""
        fork.free_mm(mm)
        self.mms.remove(mm)

    # -- life ---------------------------------------------------------------------------------

    def start_daemons(self) -> None:
        """Start kswapd on every node; each sleeps until an allocation finds its node short."""
        self.hstate.nr_overcommit = int(self.params.get("hugetlb.nr_overcommit_hugepages", "0"))
        if pages := int(self.params.get("hugetlb.nr_hugepages", "0")):
            hugetlb_pool.set_max_huge_pages(self, pages)
        for node in self.allocator.nodes:
            body = partial(vmscan_kswapd.kswapd, self, node.nid)
            self.daemons.append(self.sched.spawn(f"kswapd{node.nid}", body))

    def quiesce(self) -> None:
        """Sleep until no daemon works and no I/O is under way, then empty the LRU batches: mm at rest."""
        while self._at_work():
            self.sched.sleep(QUIESCE_POLL)
        self.swap_device.drain()
        self.file_device.drain()
        while self.ksm.scanning:
            self.sched.sleep(QUIESCE_POLL)
        self.lru.lru_add_drain_all()

    def _at_work(self) -> bool:
        return self.ksm.scanning or self.khugepaged.scanning or self.flusher.running or any(
            not vmscan_kswapd.kswapd_asleep(self, node.nid) or not kcompactd.kcompactd_asleep(self, node.nid)
            for node in self.nodes
        )

    def shutdown(self) -> None:
        """End every process, stop ksmd, turn swap off, give up the huge pages and the one of zeros.

        What is in use after that is lost.
        """
        for left in list(self.processes):
            fork.exit_process(left)
        while self.khugepaged.mms and self.khugepaged.task is not None:
            # It fell asleep inside an address space, and lets go of that when it goes on.
            khugepaged.scan_sleep_millisecs_store(self, self.khugepaged.scan_sleep_millisecs)
            self.sched.sleep(QUIESCE_POLL)
        if self.ksm.mm_slots:
            ksm.run_store(self, KSM_RUN_UNMERGE)
        if self.swap is not None:
            swap_state.try_to_unuse(self)
        self.hstate.nr_overcommit = 0
        hugetlb_pool.set_max_huge_pages(self, 0)
        self.quiesce()
        shrink_huge_zero_folio(self)

    def close(self) -> None:
        """Give up what the machine underneath holds for us: the swap file and others."""
        for mapping in self.mappings:
            mapping.a_ops.abandon(mapping)
        if self.swap is not None:
            self.swap.close()

    # -- seams --------------------------------------------------------------------------------

    def reclaim(self, order: int, nid: int, gfp: int = page_alloc.GFP_HIGHUSER_MOVABLE) -> int:
        """page_alloc -> vmscan: direct reclaim for a request with these flags; frames freed."""
        return vmscan.try_to_free_pages(self, order, nid, gfp)

    def wakeup_kswapd(self, nid: int, order: int, gfp: int) -> None:
        """page_alloc -> vmscan_kswapd."""
        vmscan_kswapd.wakeup_kswapd(self, nid, order, gfp)

    def try_to_compact_pages(self, gfp: int, order: int, zonelist: list[page_alloc.Zone], prio: int) -> int:
        """page_alloc -> compaction: direct compaction; a COMPACT_* result."""
        return compaction.try_to_compact_pages(self, gfp, order, zonelist, prio)

    def wakeup_kcompactd(self, nid: int, order: int, zoneidx: int) -> None:
        """vmscan_kswapd -> kcompactd."""
        kcompactd.wakeup_kcompactd(self, nid, order, zoneidx)

    def reset_isolation_suitable(self, nid: int) -> None:
        """vmscan_kswapd -> compaction."""
        for zone in self.allocator.nodes[nid].zones:
            compaction.reset_isolation_suitable(zone)

    def out_of_memory(self, order: int, memcg: MemCgroup | None) -> bool:
        """page_alloc, memcontrol -> oom_kill: whether anything was killed, in the group if one is given."""
        return oom_kill.out_of_memory(self, order, memcg)

    def reclaim_memcg(self, memcg: MemCgroup, nr_pages: int, gfp: int) -> int:
        """memcontrol -> vmscan: reclaim from one group; frames freed."""
        return vmscan.try_to_free_mem_cgroup_pages(self, memcg, nr_pages, gfp)

    def reclaim_pages(self, pfns: list[int]) -> int:
        """madvise -> vmscan: reclaim these isolated pages; frames freed."""
        return vmscan.reclaim_pages(self, pfns)

    def split_folio(self, page: int, folios: list[int] | None = None) -> int:
        """madvise, ksm, migrate and reclaim -> huge_memory_split: 0 or a negative errno."""
        return huge_memory_split.split_folio_to_list(self, page, folios)

    def khugepaged_enter_vma(self, vma: VmArea, vm_flags: int) -> None:
        """huge_memory -> khugepaged: memory with these flags may have huge pages."""
        if khugepaged_enter_vma(vma, vm_flags):
            self.wake_khugepaged()

    def shrink_slab(self, nid: int, priority: int) -> None:
        """vmscan -> shrinker."""
        shrinker.shrink_slab(self, nid, priority)

    def wake_khugepaged(self) -> None:
        """There is an address space to scan: start the daemon, if the host has daemons, or wake it."""
        state = self.khugepaged
        state.wait.wake_all()
        if state.task is None and self.daemons:
            state.task = self.sched.spawn("khugepaged", partial(khugepaged.khugepaged, self))
            state.task.ctx.cause = None
            self.daemons.append(state.task)

    def do_swap_page(self, vmf: VmFault) -> int:
        """memory -> swapin."""
        return swapin.do_swap_page(vmf)

    def shmem_file_setup(self, name: str, size: int, nid: int) -> AddressSpace:
        """mmap -> shmem: the file behind a shared anonymous mapping."""
        return shmem_file.shmem_file_setup(self, name, size, nid)

    def fput(self, mapping: AddressSpace) -> None:
        """page_writeback -> address_space: the flusher lets go of a file."""
        address_space.fput(mapping)

    def do_fault(self, vmf: VmFault) -> int:
        """memory -> memory_file: a fault on an empty entry of a file mapping."""
        return memory_file.do_fault(vmf)

    def wp_page_shared(self, vmf: VmFault) -> int:
        """memory -> memory_file: a write on a read-only entry of a shared mapping, its table locked."""
        return memory_file.wp_page_shared(vmf)

    def do_numa_page(self, vmf: VmFault) -> tuple[str, int]:
        """memory -> numa_balancing."""
        return numa_balancing.do_numa_page(vmf)

    def do_wp_page(self, vmf: VmFault) -> tuple[str, int]:
        """swapin -> memory_wp."""
        return memory_wp.do_wp_page(vmf)

    def free_huge_folio(self, pfn: int) -> None:
        """page -> hugetlb: the last reference to a huge page is gone."""
        hugetlb.free_huge_folio(self, pfn)

    def free_zone_device_folio(self, pfn: int) -> None:
        """page -> memremap."""
        memremap.free_zone_device_folio(self, pfn)

    def device_frame_gone(self, pfn: int) -> None:
        """A device's frame has no user any more: whoever still translates to it is wrong."""
        for hook in self.free_hooks:
            hook(pfn, 0)

    def mark_page_accessed(self, pfn: int) -> None:
        """folio_mark_accessed, for holders of a reference outside mm."""
        if pfn != self.zero_pfn:
            self.lru.folio_mark_accessed(page_folio(self.pages, pfn))

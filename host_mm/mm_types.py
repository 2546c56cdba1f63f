"""struct mm_struct, struct vm_area_struct, struct anon_vma and struct vm_fault.

Source of truth: include/linux/mm_types.h, include/linux/rmap.h, include/linux/mm.h (VM_*,
VM_FAULT_*, FAULT_FLAG_*), Linux 6.18.

Not modelled: the maple tree (a sorted list stands for it), per-VMA locks (every walk takes mmap_lock),
mm_cid, user namespaces, membarrier and futex state.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from host_mm.kernel.locks import RwSem, Spinlock

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.process import Process

__all__ = [
    "FAULT_FLAG_ALLOW_RETRY",
    "FAULT_FLAG_INSTRUCTION",
    "FAULT_FLAG_INTERRUPTIBLE",
    "FAULT_FLAG_KILLABLE",
    "FAULT_FLAG_MKWRITE",
    "FAULT_FLAG_REMOTE",
    "FAULT_FLAG_RETRY_NOWAIT",
    "FAULT_FLAG_TRIED",
    "FAULT_FLAG_UNSHARE",
    "FAULT_FLAG_USER",
    "FAULT_FLAG_WRITE",
    "MMF_HAS_PINNED",
    "MMF_HUGE_ZERO_FOLIO",
    "MMF_OOM_SKIP",
    "MMF_UNSTABLE",
    "MMF_VM_HUGEPAGE",
    "MMF_VM_MERGEABLE",
    "MM_ANONPAGES",
    "MM_FILEPAGES",
    "MM_SHMEMPAGES",
    "MM_SWAPENTS",
    "VM_ACCESS_FLAGS",
    "VM_ACCOUNT",
    "VM_DONTCOPY",
    "VM_DONTEXPAND",
    "VM_EXEC",
    "VM_FAULT_BADMAP",
    "VM_FAULT_COMPLETED",
    "VM_FAULT_DONE_COW",
    "VM_FAULT_ERROR",
    "VM_FAULT_FALLBACK",
    "VM_FAULT_HWPOISON",
    "VM_FAULT_LOCKED",
    "VM_FAULT_MAJOR",
    "VM_FAULT_NOPAGE",
    "VM_FAULT_OOM",
    "VM_FAULT_RETRY",
    "VM_FAULT_SIGBUS",
    "VM_FAULT_SIGSEGV",
    "VM_HUGEPAGE",
    "VM_HUGETLB",
    "VM_IO",
    "VM_LOCKED",
    "VM_LOCKED_MASK",
    "VM_LOCKONFAULT",
    "VM_MAYEXEC",
    "VM_MAYREAD",
    "VM_MAYSHARE",
    "VM_MAYWRITE",
    "VM_MERGEABLE",
    "VM_NOHUGEPAGE",
    "VM_NORESERVE",
    "VM_PFNMAP",
    "VM_RAND_READ",
    "VM_READ",
    "VM_SEQ_READ",
    "VM_SHARED",
    "VM_SOFTDIRTY",
    "VM_SPECIAL",
    "VM_UFFD_FLAGS",
    "VM_UFFD_MINOR",
    "VM_UFFD_MISSING",
    "VM_UFFD_WP",
    "VM_WIPEONFORK",
    "VM_WRITE",
    "AnonVma",
    "AnonVmaChain",
    "MmStruct",
    "VmArea",
    "VmFault",
]

VM_READ = 0x1
VM_WRITE = 0x2
VM_EXEC = 0x4
VM_SHARED = 0x8
VM_MAYREAD = 0x10
VM_MAYWRITE = 0x20
VM_MAYEXEC = 0x40
VM_MAYSHARE = 0x80
VM_UFFD_MISSING = 0x200
VM_PFNMAP = 0x400
VM_UFFD_WP = 0x1000
VM_LOCKED = 0x2000
VM_IO = 0x4000
VM_SEQ_READ = 0x8000
VM_RAND_READ = 0x10000
VM_DONTCOPY = 0x20000
VM_DONTEXPAND = 0x40000
VM_LOCKONFAULT = 0x80000
VM_ACCOUNT = 0x100000
VM_NORESERVE = 0x200000
VM_HUGETLB = 0x400000
VM_WIPEONFORK = 0x2000000
VM_SOFTDIRTY = 0x8000000
VM_ACCESS_FLAGS = VM_READ | VM_WRITE | VM_EXEC
VM_SPECIAL = VM_IO | VM_DONTEXPAND | VM_PFNMAP | 0x10000000
VM_MIXEDMAP = 0x10000000
VM_HUGEPAGE = 0x20000000
VM_NOHUGEPAGE = 0x40000000
VM_MERGEABLE = 0x80000000
VM_UFFD_MINOR = 1 << 41
VM_LOCKED_MASK = VM_LOCKED | VM_LOCKONFAULT
VM_UFFD_FLAGS = VM_UFFD_MISSING | VM_UFFD_WP | VM_UFFD_MINOR

VM_FAULT_OOM = 0x1
VM_FAULT_SIGBUS = 0x2
VM_FAULT_MAJOR = 0x4
VM_FAULT_HWPOISON = 0x10
VM_FAULT_SIGSEGV = 0x40
VM_FAULT_NOPAGE = 0x100
VM_FAULT_LOCKED = 0x200
VM_FAULT_RETRY = 0x400
VM_FAULT_FALLBACK = 0x800
VM_FAULT_DONE_COW = 0x1000
VM_FAULT_COMPLETED = 0x4000
VM_FAULT_BADMAP = 0x10000
"""Not the kernel's: do_user_addr_fault's bad_area, so that uaccess can say EFAULT in one place."""
VM_FAULT_ERROR = VM_FAULT_OOM | VM_FAULT_SIGBUS | VM_FAULT_SIGSEGV | VM_FAULT_HWPOISON | VM_FAULT_FALLBACK

FAULT_FLAG_WRITE = 1 << 0
FAULT_FLAG_MKWRITE = 1 << 1
FAULT_FLAG_ALLOW_RETRY = 1 << 2
FAULT_FLAG_RETRY_NOWAIT = 1 << 3
FAULT_FLAG_KILLABLE = 1 << 4
FAULT_FLAG_TRIED = 1 << 5
FAULT_FLAG_USER = 1 << 6
FAULT_FLAG_REMOTE = 1 << 7
FAULT_FLAG_INSTRUCTION = 1 << 8
FAULT_FLAG_INTERRUPTIBLE = 1 << 9
FAULT_FLAG_UNSHARE = 1 << 10

MMF_VM_MERGEABLE = 1 << 16
MMF_VM_HUGEPAGE = 1 << 17
MMF_OOM_SKIP = 1 << 21
MMF_UNSTABLE = 1 << 22
MMF_HUGE_ZERO_FOLIO = 1 << 23
MMF_HAS_PINNED = 1 << 27

MM_FILEPAGES = 0
MM_ANONPAGES = 1
MM_SWAPENTS = 2
MM_SHMEMPAGES = 3


class AnonVma:
    """struct anon_vma: the set of VMAs that may map an anonymous page.

    `chains` is the interval tree, kept as a list ordered by insertion; `lock` is the root's rwsem,
    which every anon_vma of one fork tree shares.
    """

    __slots__ = ("chains", "num_active_vmas", "num_children", "parent", "refcount", "root", "rwsem")

    def __init__(self, host: HostMm, parent: AnonVma | None) -> None:
        self.parent: AnonVma = parent if parent is not None else self
        self.root: AnonVma = parent.root if parent is not None else self
        self.rwsem: RwSem = RwSem(host.sched, "anon_vma") if parent is None else self.root.rwsem
        self.chains: dict[int, AnonVmaChain] = {}
        self.num_children = 0
        self.num_active_vmas = 0
        self.refcount = 1


class AnonVmaChain:
    """struct anon_vma_chain: one (VMA, anon_vma) pair."""

    __slots__ = ("anon_vma", "vma")

    def __init__(self, vma: VmArea, anon_vma: AnonVma) -> None:
        self.vma = vma
        self.anon_vma = anon_vma


class VmArea:
    """struct vm_area_struct: [start, end) with one set of flags.

    `pgoff` is the page index of `start` in its anon_vma or file. `file` is the AddressSpace of
    file and shmem mappings, else None; `ops` its VmOperations. `policy` is the VMA's mempolicy or None,
    `userfaultfd_ctx` the userfaultfd that it is registered with, whose modes are VM_UFFD_* flags.
    `swap_readahead_info` is the address of its last swap fault, the window then, the hits since.
    """

    __slots__ = (
        "anon_vma", "anon_vma_chain", "end", "file", "flags", "mm", "ops", "page_prot", "pgoff",
        "policy", "private_data", "start", "swap_readahead_info", "userfaultfd_ctx",
    )

    def __init__(self, mm: MmStruct, start: int, end: int, flags: int, pgoff: int) -> None:
        self.mm = mm
        self.start = start
        self.end = end
        self.flags = flags
        self.pgoff = pgoff
        self.page_prot = 0
        self.anon_vma: AnonVma | None = None
        self.anon_vma_chain: list[AnonVmaChain] = []
        self.file: Any = None
        self.ops: Any = None
        self.policy: Any = None
        self.private_data: Any = None
        self.swap_readahead_info = (0, 0, 4)
        self.userfaultfd_ctx: Any = None

    def page_index(self, address: int) -> int:
        """linear_page_index."""
        return ((address - self.start) >> 12) + self.pgoff

    def address_of_index(self, index: int) -> int:
        """vma_address: where the page of this index would be, or -1 if outside."""
        address = self.start + ((index - self.pgoff) << 12)
        return address if self.start <= address < self.end else -1

    def __repr__(self) -> str:
        rwx = "".join(c if self.flags & bit else "-" for c, bit in (("r", 1), ("w", 2), ("x", 4)))
        return f"<VmArea {self.start:#x}-{self.end:#x} {rwx}>"


class MmStruct:
    """struct mm_struct: one address space.

    `pgd` is the physical address of its level-4 table. `mm_users` counts threads and remote walkers
    that use the address space, `mm_count` who keeps the struct. `rss` is indexed by MM_*.
    `tlb_flush_pending` and `tlb_flush_batched` are the kernel's. `vmas` is sorted by address.
    """

    __slots__ = (
        "def_flags", "flags", "hiwater_rss", "host", "ksm_merging_pages", "ksm_rmap_items", "ksm_zero_pages",
        "mm_count", "mm_users", "mmap_lock",
        "notifier_subscriptions", "page_table_lock", "pgd", "pgtables_bytes", "process", "pte_locks", "rss",
        "starts", "tlb", "tlb_flush_batched", "tlb_flush_pending", "total_vm", "vmas", "write_protect_seq",
    )

    def __init__(self, host: HostMm, process: Process) -> None:
        self.host = host
        self.process = process
        self.mmap_lock = RwSem(host.sched, "mmap_lock")
        self.page_table_lock = Spinlock(host.sched, "page_table_lock")
        self.pte_locks: dict[int, Spinlock] = {}
        self.pgd = 0
        self.pgtables_bytes = 0
        self.vmas: list[VmArea] = []
        self.starts: list[int] = []
        self.notifier_subscriptions: Any = None
        self.mm_users = 1
        self.mm_count = 1
        self.flags = 0
        self.def_flags = 0
        self.rss = [0, 0, 0, 0]
        self.hiwater_rss = 0
        self.total_vm = 0
        self.tlb: Any = None
        self.tlb_flush_pending = 0
        self.tlb_flush_batched = 0
        self.write_protect_seq = 0
        self.ksm_merging_pages = self.ksm_rmap_items = self.ksm_zero_pages = 0

    def get_mm_rss(self) -> int:
        """Pages that are mapped."""
        return self.rss[MM_FILEPAGES] + self.rss[MM_ANONPAGES] + self.rss[MM_SHMEMPAGES]

    def update_hiwater_rss(self) -> None:
        """Before pages go: the most that were mapped at once, since clear_refs forgot it last."""
        self.hiwater_rss = max(self.hiwater_rss, self.get_mm_rss())

    def find_vma(self, address: int) -> VmArea | None:
        """The first VMA that ends after `address`."""
        index = bisect_right(self.starts, address)
        if index and self.vmas[index - 1].end > address:
            return self.vmas[index - 1]
        return self.vmas[index] if index < len(self.vmas) else None

    def vma_lookup(self, address: int) -> VmArea | None:
        """The VMA that holds `address`."""
        index = bisect_right(self.starts, address)
        if index and self.vmas[index - 1].end > address:
            return self.vmas[index - 1]
        return None

    def vma_lookup_below(self, address: int) -> int:
        """Where the last VMA below `address` ends, or 0."""
        index = bisect_right(self.starts, address - 1)
        return self.vmas[index - 1].end if index else 0

    def find_vma_intersection(self, start: int, end: int) -> VmArea | None:
        """The first VMA that overlaps [start, end)."""
        vma = self.find_vma(start)
        return vma if vma is not None and vma.start < end else None

    def vmas_in(self, start: int, end: int) -> list[VmArea]:
        """The VMAs that overlap [start, end), in order."""
        index = bisect_right(self.starts, start)
        if index and self.vmas[index - 1].end > start:
            index -= 1
        found: list[VmArea] = []
        while index < len(self.vmas) and self.vmas[index].start < end:
            found.append(self.vmas[index])
            index += 1
        return found

    def mmdrop(self) -> None:
        """Drop one mm_count; the last frees the struct and its PGD."""
        self.mm_count -= 1
        if self.mm_count == 0:
            self.host.free_mm(self)


class VmFault:
    """struct vm_fault: one fault on its way. `pmd` and `pte` are physical addresses of entries (0: none)."""

    __slots__ = (
        "address", "cow_page", "fault_type", "flags", "mm", "orig_pmd", "orig_pte", "page", "pgoff", "pmd",
        "pte", "ptl", "real_address", "vma",
    )

    def __init__(self, vma: VmArea, address: int, flags: int) -> None:
        self.vma = vma
        self.mm = vma.mm
        self.address = address & ~0xFFF
        self.real_address = address
        self.flags = flags
        self.pgoff = vma.page_index(address)
        self.pmd = 0
        self.pte = 0
        self.orig_pmd = 0
        self.orig_pte = 0
        self.ptl: Spinlock | None = None
        self.page = -1
        self.cow_page = -1
        self.fault_type = 0

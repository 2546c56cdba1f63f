"""The VMM's process on the host, by the system calls it makes.

Each method is one entry into the host kernel in the name of this process, whatever task calls it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.lru_gen import GenLruvec
    from host_mm.memcontrol import MemCgroup
    from host_mm.pagemap_scan import PageRegion, PmScanArg
    from host_mm.process import Process
    from host_mm.userfaultfd_k import UserfaultfdCtx

__all__ = ["Vmm"]


class Vmm:
    """One user process. `process` is the kernel's object; addresses are the process's own (hva)."""

    def __init__(self, mm: HostMm, process: Process) -> None:
        self.mm = mm
        self.process = process
        self.wp_async: UserfaultfdCtx | None = None

    def mmap(self, length: int, prot: int, address: int = 0) -> int:
        """Private anonymous memory; at `address` exactly if it is not 0 (MAP_FIXED). The address."""
        from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, do_mmap

        flags = MAP_PRIVATE | MAP_ANONYMOUS | (MAP_FIXED if address else 0)
        return do_mmap(self.process.mm, address, length, prot, flags)

    def memfd_hugetlb(self, size: int) -> AddressSpace:
        """memfd_create(MFD_HUGETLB) and ftruncate; close it with close_file. KernelError(EINVAL)."""
        from host_mm.hugetlbfs import hugetlb_file_setup

        return hugetlb_file_setup(self.mm, "memfd", size)

    def mmap_file(self, file: AddressSpace, length: int) -> int:
        """mmap(2) of an open file, shared, from its beginning; the address. KernelError as it refuses."""
        from host_mm.mmap import MAP_SHARED, do_mmap

        return do_mmap(self.process.mm, 0, length, 3, MAP_SHARED, file=file, pgoff=0)

    def close_file(self, file: AddressSpace) -> None:
        """close(2)."""
        from host_mm.address_space import fput

        fput(file)

    def mmap_hugetlb(self, length: int, address: int, file: AddressSpace | None, *, reserve: bool) -> int:
        """Huge pages at exactly `address`, the file's or private ones; KernelError(ENOMEM): none left."""
        from host_mm.mmap import (
            MAP_ANONYMOUS,
            MAP_FIXED,
            MAP_HUGETLB,
            MAP_NORESERVE,
            MAP_PRIVATE,
            MAP_SHARED,
            do_mmap,
        )

        flags = MAP_FIXED | (MAP_SHARED if file is not None else MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
        flags |= 0 if reserve else MAP_NORESERVE
        return do_mmap(self.process.mm, address, length, 3, flags, file=file, pgoff=0)

    def pt_share_count(self, address: int) -> int:
        """How many other processes use this one's level-2 page table of `address`."""
        from host_mm.pgtable_generic import pmd_offset

        pmd = pmd_offset(self.process.mm, address)
        return self.mm.pages.private[pmd >> 12] if pmd else 0

    def hugetlb_unshare(self, address: int) -> None:
        """hugetlb_unshare_all_pmds of the mapping at `address`."""
        from host_mm.hugetlb_share import hugetlb_unshare_all_pmds

        mm = self.process.mm
        mm.mmap_lock.lock()
        vma = mm.vma_lookup(address)
        if vma is not None:
            hugetlb_unshare_all_pmds(vma)
        mm.mmap_lock.unlock()

    def munmap(self, address: int, length: int) -> None:
        """munmap(2)."""
        from host_mm.mmap import do_munmap

        do_munmap(self.process.mm, address, length)

    def mprotect(self, address: int, length: int, prot: int) -> None:
        """mprotect(2)."""
        from host_mm.mprotect import do_mprotect

        do_mprotect(self.process.mm, address, length, prot)

    def madvise(self, address: int, length: int, advice: int) -> None:
        """madvise(2) with a MADV_* of host_mm.madvise."""
        from host_mm.madvise import do_madvise

        do_madvise(self.process.mm, address, length, advice)

    def mlock(self, address: int, length: int, *, onfault: bool = False) -> None:
        """mlock(2), or mlock2(2) with MLOCK_ONFAULT."""
        from host_mm.mlock import MLOCK_ONFAULT, do_mlock

        do_mlock(self.process.mm, address, length, MLOCK_ONFAULT if onfault else 0)

    def munlock(self, address: int, length: int) -> None:
        """munlock(2)."""
        from host_mm.mlock import do_munlock

        do_munlock(self.process.mm, address, length)

    def mremap(self, address: int, old_length: int, new_length: int, flags: int = 0, to: int = 0) -> int:
        """mremap(2) with MREMAP_* of host_mm.mremap; the address."""
        from host_mm.mremap import do_mremap

        return do_mremap(self.process.mm, address, old_length, new_length, flags, to)

    def read(self, address: int, length: int) -> bytes:
        """Load bytes, faulting pages in; KernelError(EFAULT)."""
        from host_mm.uaccess import copy_from_user

        return copy_from_user(self.process, address, length)

    def write(self, address: int, data: bytes) -> None:
        """Store bytes, faulting pages in; KernelError(EFAULT)."""
        from host_mm.uaccess import copy_to_user

        copy_to_user(self.process, address, data)

    def fork(self) -> Vmm:
        """fork(2): the child as a Vmm of its own."""
        from host_mm.fork import fork_process

        return Vmm(self.mm, fork_process(self.process))

    def exit(self) -> None:
        """exit(2): the address space goes first, then the open files."""
        from host_mm.fork import exit_process
        from host_mm.userfaultfd import userfaultfd_release

        memcg = self.process.memcg
        exit_process(self.process)
        if memcg is not None and not memcg.processes:
            self.mm.memcg.remove(memcg)
        if self.wp_async is not None:
            userfaultfd_release(self.wp_async)
            self.wp_async = None

    def clear_refs(self, kind: int) -> None:
        """Write to /proc/PID/clear_refs."""
        from host_mm.task_mmu import clear_refs_write

        clear_refs_write(self.process.mm, kind)

    def userfaultfd(self, features: int = 0) -> UserfaultfdCtx:
        """userfaultfd(2) and UFFDIO_API; it must be released."""
        from host_mm.userfaultfd import userfaultfd, userfaultfd_api

        ctx = userfaultfd(self.process)
        userfaultfd_api(ctx, features)
        return ctx

    def register_wp_async(self, address: int, length: int) -> None:
        """UFFDIO_REGISTER of the range with a userfaultfd whose write-protections a write just lifts."""
        from host_mm.userfaultfd import UFFDIO_REGISTER_MODE_WP, userfaultfd_register
        from host_mm.userfaultfd_k import UFFD_FEATURE_WP_ASYNC

        if self.wp_async is None:
            self.wp_async = self.userfaultfd(UFFD_FEATURE_WP_ASYNC)
        userfaultfd_register(self.wp_async, address, length, UFFDIO_REGISTER_MODE_WP)

    def unregister_wp_async(self, address: int, length: int) -> None:
        """UFFDIO_UNREGISTER of what register_wp_async registered of the range."""
        from host_mm.userfaultfd import userfaultfd_unregister

        if self.wp_async is not None:
            userfaultfd_unregister(self.wp_async, address, length)

    def pagemap(self, address: int, pages: int) -> list[int]:
        """read(2) of /proc/PID/pagemap: a word a page."""
        from host_mm.pagemap import pagemap_read

        return pagemap_read(self.process.mm, address, pages)

    def pagemap_scan(self, arg: PmScanArg) -> list[PageRegion]:
        """PAGEMAP_SCAN on /proc/PID/pagemap."""
        from host_mm.pagemap_scan import do_pagemap_scan

        return do_pagemap_scan(self.process.mm, arg)

    def pin(self, address: int) -> int:
        """A long-term pin for writing, as io_uring takes on a registered buffer: the frame; KernelError."""
        from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
        from host_mm.gup_pin import pin_user_page

        pfn = pin_user_page(self.process.mm, address, FOLL_WRITE | FOLL_LONGTERM)
        if pfn < 0:
            raise KernelError(-pfn, f"no page to pin at {address:#x}")
        return pfn

    def unpin(self, pfn: int) -> None:
        """Give a pin back; the page was written."""
        from host_mm.gup_pin import unpin_user_page

        unpin_user_page(self.mm, pfn, dirty=True)

    def pin_range(self, address: int, pages: int) -> list[int]:
        """Long-term pins for writing of up to `pages` pages: their frames; KernelError if there is none."""
        from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
        from host_mm.gup_range import pin_user_pages

        return pin_user_pages(self.process.mm, address, pages, FOLL_WRITE | FOLL_LONGTERM)

    def unpin_range(self, pfns: list[int]) -> None:
        """Give these pins back; the pages were written."""
        from host_mm.gup_range import unpin_user_pages

        unpin_user_pages(self.mm, pfns, dirty=True)

    def mbind(self, address: int, length: int, node: int) -> None:
        """mbind(2) with MPOL_BIND and MPOL_MF_MOVE."""
        from host_mm.mempolicy import MPOL_BIND, MPOL_MF_MOVE, do_mbind

        do_mbind(self.process, address, length, MPOL_BIND, node, MPOL_MF_MOVE)

    def take_sigbus(self) -> list[int]:
        """The handler of SIGBUS: the addresses whose memory failed since the last call, each once."""
        signals, self.process.signals = self.process.signals, []
        return list(dict.fromkeys(signal.address for signal in signals))

    def present_pfn(self, address: int) -> int:
        """The frame that maps `address`, or -1: what /proc/PID/pagemap says."""
        from host_mm.arch.x86.pgtable import pte_pfn, pte_present, walk_lockless

        entry, level = walk_lockless(self.mm.ram, self.process.mm.pgd, address)
        if level > 2 or not pte_present(entry):
            return -1
        return pte_pfn(entry) + ((address >> 12) & 511 if level == 2 else 0)

    def mapping_level(self, address: int) -> int:
        """1 or 2: the size of the page that is mapped at `address`; 0: none."""
        from host_mm.arch.x86.pgtable import pte_present, walk_lockless

        entry, level = walk_lockless(self.mm.ram, self.process.mm.pgd, address)
        return level if level <= 2 and pte_present(entry) else 0

    def split_huge_pages(self, address: int, length: int) -> int:
        """Write to /sys/kernel/debug/split_huge_pages; how many were split."""
        from host_mm.huge_memory_split import split_huge_pages

        return split_huge_pages(self.process.mm, address, address + length)[1]

    def move_to_other_node(self, addresses: list[int]) -> int:
        """move_pages(2) of every present page to the next NUMA node; how many moved."""
        from host_mm.migrate import move_pages

        nodes = self.mm.nodes
        present = [(address, pfn) for address in addresses if (pfn := self.present_pfn(address)) >= 0]
        if present:
            targets = [(self.mm.allocator.nid_of(pfn) + 1) % len(nodes) for _, pfn in present]
            move_pages(self.process, [address for address, _ in present], targets)
        return sum(1 for address, pfn in present if self.present_pfn(address) not in (pfn, -1))

    def numa_scan(self, address: int, length: int) -> int:
        """One scan of NUMA balancing, of this range: how many pages will fault to say who uses them."""
        from host_mm.numa_balancing import task_numa_scan

        return task_numa_scan(self.process, address, address + length)

    def test_and_clear_young(self, address: int) -> bool:
        """folio_referenced of the page at `address`: whether host or guest touched it since the last time.

        Nobody asks that of huge pages of hugetlbfs, nor of mlocked pages: the walk would lock them once more.
        """
        from host_mm.page import PG_hugetlb, PG_mlocked
        from host_mm.rmap import folio_referenced

        folio = self.present_folio(address)
        if folio <= self.mm.zero_pfn or self.mm.pages.flags[folio] & (PG_hugetlb | PG_mlocked):
            return False
        return folio_referenced(self.mm, folio)[0] > 0

    def present_folio(self, address: int) -> int:
        """The first frame of the folio whose page is mapped at `address`, or -1."""
        from host_mm.page import page_folio

        pfn = self.present_pfn(address)
        return page_folio(self.mm.pages, pfn) if pfn >= 0 else -1

    def is_merged(self, address: int) -> bool:
        """Whether KSM put what is mapped at `address` there: a KSM page or the zero page."""
        from host_mm.arch.x86.pgtable import walk_lockless
        from host_mm.ksm_types import is_ksm_zero_pte
        from host_mm.page import PG_ksm

        pfn = self.present_pfn(address)
        if pfn == self.mm.zero_pfn:
            return is_ksm_zero_pte(self.mm, walk_lockless(self.mm.ram, self.process.mm.pgd, address)[0])
        return pfn >= 0 and bool(self.mm.pages.flags[pfn] & PG_ksm)

    def ksm_stat(self) -> dict[str, int]:
        """The counts of /proc/PID/ksm_stat."""
        mm = self.process.mm
        return {
            "ksm_rmap_items": mm.ksm_rmap_items, "ksm_zero_pages": mm.ksm_zero_pages,
            "ksm_merging_pages": mm.ksm_merging_pages,
        }

    def damon(self, ranges: list[tuple[int, int]], ns: int, sample_ns: int) -> int:
        """kdamond watches [start, end) ranges for `ns`; the pages of the regions in use at the end."""
        from host_mm.damon.core import DamonCtx, DamonRegion, damon_start, damon_stop
        from host_mm.damon.vaddr import VaddrOperations

        used = 0

        def snapshot(regions: list[DamonRegion]) -> None:
            nonlocal used
            used = sum(region.size >> 12 for region in regions if region.nr_accesses)

        aggregation = min(20 * sample_ns, ns)
        ctx = DamonCtx(
            self.mm, VaddrOperations(self.process.mm), ranges, sample_interval=min(sample_ns, aggregation),
            aggr_interval=aggregation,
        )
        ctx.on_aggregation = snapshot
        damon_start(ctx)
        self.mm.sched.sleep(ns)
        damon_stop(ctx)
        return used

    def memcg(self, *, create: bool = False) -> MemCgroup:
        """The process's memory cgroup; KernelError(ENOENT) if it is the root and none is to be made."""
        memcg = self.process.memcg
        if memcg is None:
            if not create:
                raise KernelError(errno.ENOENT, "the VMM is in no memory cgroup; memcg_limit() first")
            memcg = self.mm.memcg.create(f"vm-{self.process.pid}")
            self.mm.memcg.attach(self.process, memcg)
        return memcg

    def lruvecs(self) -> list[GenLruvec]:
        """The lruvecs of its memory cgroup, one a node."""
        from host_mm.lru_gen import GenLruvec

        vecs = self.mm.lru.vecs if self.process.memcg is None else self.process.memcg.lruvecs
        return [vec for vec in vecs if isinstance(vec, GenLruvec)]

    def bystander(self, pages: int) -> Process:
        """Another process with so many pages of its own."""
        from host_mm.fork import mm_init
        from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, do_mmap
        from host_mm.uaccess import copy_to_user

        process = self.mm.new_process("bystander", self.process)
        mm = mm_init(self.mm, process)
        start = do_mmap(mm, 0, pages << 12, 3, MAP_PRIVATE | MAP_ANONYMOUS)
        for address in range(start, start + (pages << 12), 4096):
            copy_to_user(process, address, b"bystander")
        return process

"""A device with memory of its own in a process's address space: pages go to it, come back, or are its alone.

Source of truth: lib/test_hmm.c (dmirror_migrate_to_device, dmirror_devmem_fault, dmirror_device_evict_chunk,
dmirror_interval_invalidate), drivers/gpu/drm/nouveau/nouveau_svm.c: nouveau_atomic_range_fault,
nouveau_svm_range_invalidate (the retry around make_device_exclusive); Linux 6.18.

The device mirrors a range of the process (host_mm/hmm_mirror.py) and owns device-private frames. Migration to
it makes the CPU's entries device-private ones: the device goes on without a fault, the CPU's and the
guest's next touch brings the page back. For an atomic operation the page stays in RAM and becomes the
device's alone. Its notifier leaves out the brackets that its own migrations and its own exclusive accesses
open (MIGRATE and EXCLUSIVE with its owner), and none of others. What it leaves out it has to account for:
before it copies a page it drops its own translation and moves `own_seq`, or a fault of its own that read the
tables earlier would publish the page that was left.

Not modelled: the device's own faults on memory that another device owns, peer-to-peer, prefetch by the
device.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, EINVAL, ETIMEDOUT
from typing import TYPE_CHECKING

from host_mm.filemap import folio_unlock
from host_mm.gup import FOLL_WRITE, get_user_pages_unlocked
from host_mm.hmm import HMM_RANGE_DEFAULT_TIMEOUT
from host_mm.hmm_mirror import HmmMirror
from host_mm.interval_notifier import mmu_interval_read_begin, mmu_interval_read_retry
from host_mm.kernel.costs import COST_MIGRATE_PAGE
from host_mm.kernel.errors import KernelError
from host_mm.memory_folio import folio_alloc
from host_mm.memremap import memremap_pages, memunmap_pages, zone_device_page_init
from host_mm.migrate_device import (
    migrate_device_finalize,
    migrate_device_pages,
    migrate_device_range,
    migrate_vma_finalize,
    migrate_vma_pages,
    migrate_vma_setup,
)
from host_mm.migrate_device_collect import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_WRITE,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
    migrate_pfn,
    migrate_pfn_to_page,
)
from host_mm.mm_types import VM_FAULT_OOM, VM_FAULT_SIGBUS, VM_READ, VM_WRITE
from host_mm.mmu_notifier import MMU_NOTIFY_EXCLUSIVE, MMU_NOTIFY_MIGRATE
from host_mm.page import PG_locked, put_page, set_page_dirty
from host_mm.page_alloc import GFP_HIGHUSER_MOVABLE
from host_mm.rmap_device import make_device_exclusive

if TYPE_CHECKING:
    from host_mm.mm_types import VmFault
    from host_mm.mmu_notifier import MmuNotifierRange
    from host_mm.process import Process

__all__ = ["HmmDevice"]

_CHUNK = 32
"""Pages that one migration takes at once."""


class HmmDevice(HmmMirror):
    """`nr` pages of device memory beside [start, start + length) of a process (`open` begins to watch)."""

    who = "a device with memory of its own"

    def __init__(self, process: Process, nr: int) -> None:
        """KernelError(ENOSPC)."""
        super().__init__(process)
        self.pgmap = memremap_pages(self.host, nr, self, self._migrate_to_ram, self._page_free)
        self.dev_private_owner = self.owner = self
        self.free = list(range(self.pgmap.start + nr - 1, self.pgmap.start - 1, -1))

    def close(self) -> None:
        """The device goes: what it has of living processes goes back to RAM first. KernelError(EBUSY)."""
        self.evict()
        if len(self.free) != self.pgmap.nr:
            raise KernelError(EBUSY, "pages of a living process cannot leave the device")
        super().close()
        memunmap_pages(self.host, self.pgmap)

    # -- notifier -----------------------------------------------------------------------------

    def invalidate(self, range_: MmuNotifierRange, cur_seq: int) -> bool:
        """As a mirror, but for the brackets of what the device itself does and knows."""
        if range_.event in (MMU_NOTIFY_MIGRATE, MMU_NOTIFY_EXCLUSIVE) and range_.owner is self:
            return True
        return super().invalidate(range_, cur_seq)

    def drop(self, start: int, end: int) -> None:
        """What was writable may have been written: nobody else knows."""
        for vpn in self.table.known_in(start, end):
            entry = self.table.entries[vpn]
            if entry & 1:
                set_page_dirty(self.host, entry >> 1)
        super().drop(start, end)

    # -- device memory ------------------------------------------------------------------------

    def _page_free(self, pfn: int) -> None:
        self.free.append(pfn)

    def _take(self) -> int:
        """A locked page of device memory, or -1."""
        if not self.free:
            return -1
        pfn = self.free.pop()
        zone_device_page_init(self.host, pfn)
        return pfn

    def migrate_to_device(self, start: int, pages: int) -> int:
        """dmirror_migrate_to_device: how many pages are in device memory then. KernelError(EINVAL)."""
        mm = self.process.mm
        end = start + (pages << 12)
        moved = 0
        mm.mmap_lock.read_lock()
        try:
            while start < end:
                vma = mm.vma_lookup(start)
                if vma is None or not vma.flags & VM_READ:
                    raise KernelError(EINVAL, f"{start:#x} is not readable memory")
                following = min(end, vma.end, start + (_CHUNK << 12))
                args = MigrateVma(
                    vma, start, following, pgmap_owner=self, flags=MIGRATE_VMA_SELECT_SYSTEM
                )
                ret = migrate_vma_setup(args)
                if ret:
                    raise KernelError(-ret, f"{start:#x} cannot go to a device")
                self._copy_to_device(args, writable=bool(vma.flags & VM_WRITE))
                migrate_vma_pages(args)
                moved += self._map_moved(args)
                migrate_vma_finalize(args)
                start = following
        finally:
            mm.mmap_lock.read_unlock()
        return moved

    def _let_go(self, start: int, end: int) -> None:
        """The device stops using what it is about to move itself."""
        with self.lock:
            self.own_seq += 1
            self.drop(start, end)

    def _copy_to_device(self, args: MigrateVma, *, writable: bool) -> None:
        ram = self.host.ram
        self._let_go(args.start, args.end)
        for index, word in enumerate(args.src):
            if not word & MIGRATE_PFN_MIGRATE:
                continue
            dst = self._take()
            if dst < 0:
                return
            src = migrate_pfn_to_page(word)
            if src < 0:
                ram.clear_page(dst)
            else:
                ram.copy_page(dst, src)
            write = word & MIGRATE_PFN_WRITE or (src < 0 and writable)
            self.host.sched.advance(COST_MIGRATE_PAGE)
            args.dst[index] = migrate_pfn(dst) | (MIGRATE_PFN_WRITE if write else 0)

    def _map_moved(self, args: MigrateVma) -> int:
        """dmirror_migrate_finalize_and_map: the pages are still locked, so that no CPU has them back yet."""
        moved = 0
        with self.lock:
            for index, (word, target) in enumerate(zip(args.src, args.dst, strict=True)):
                dst = migrate_pfn_to_page(target)
                address = args.start + (index << 12)
                if word & MIGRATE_PFN_MIGRATE and dst >= 0:
                    self.table.fill(address, dst, bool(target & MIGRATE_PFN_WRITE))
                    moved += 1
        return moved

    def _migrate_to_ram(self, vmf: VmFault) -> int:
        """dmirror_devmem_fault: one page back for the CPU; the driver's bracket is its own."""
        args = MigrateVma(
            vmf.vma, vmf.address, vmf.address + 4096, pgmap_owner=self,
            flags=MIGRATE_VMA_SELECT_DEVICE_PRIVATE, fault_page=vmf.page,
        )
        if migrate_vma_setup(args):
            return VM_FAULT_SIGBUS
        ret = 0
        if args.src[0] & MIGRATE_PFN_MIGRATE:
            # The charge comes with the contents.
            new = folio_alloc(self.host, vmf.vma, zero=False)
            if new >= 0:
                self._copy_to_ram(args.src, args.dst, 0, new)
            else:
                ret = VM_FAULT_OOM
        migrate_vma_pages(args)
        migrate_vma_finalize(args)
        return ret

    def _copy_to_ram(self, src: list[int], dst: list[int], index: int, new: int) -> None:
        """The device lets go of its page before it is copied."""
        old = migrate_pfn_to_page(src[index])
        vpns = [vpn for vpn, _ in self.table.translations_of(old)]
        self._let_go(*((vpns[0] << 12, vpns[0] + 1 << 12) if vpns else (0, 0)))
        self.host.pages.flags[new] |= PG_locked
        self.host.ram.copy_page(new, old)
        self.host.sched.advance(COST_MIGRATE_PAGE)
        dst[index] = migrate_pfn(new) | src[index] & MIGRATE_PFN_WRITE

    def evict(self) -> None:
        """dmirror_device_evict_chunk: every page of the device goes back to RAM, whoever maps it."""
        host = self.host
        src = migrate_device_range(host, self.pgmap.start, self.pgmap.nr)
        dst = [0] * len(src)
        for index, word in enumerate(src):
            if word & MIGRATE_PFN_MIGRATE:
                new = host.allocator.alloc_pages(GFP_HIGHUSER_MOVABLE)
                if new >= 0:
                    self._copy_to_ram(src, dst, index, new)
        migrate_device_pages(host, src, dst)
        migrate_device_finalize(host, src, dst)

    # -- alone --------------------------------------------------------------------------------

    def atomic(self, address: int) -> int:
        """The frame of `address` for the device alone, until a CPU asks for it. KernelError."""
        host, mm = self.host, self.process.mm
        timeout = host.sched.now + HMM_RANGE_DEFAULT_TIMEOUT
        while host.sched.now <= timeout:
            # What is exclusive already would be given back inside, in a bracket that nobody filters: each
            # attempt would overtake itself.
            self._touch(address)
            seq = mmu_interval_read_begin(self)
            mm.mmap_lock.read_lock()
            pfn = make_device_exclusive(mm, address, self)
            mm.mmap_lock.read_unlock()
            if pfn < 0:
                raise KernelError(-pfn, f"{address:#x} cannot be the device's alone")
            with self.lock:
                good = not mmu_interval_read_retry(self, seq)
                if good:
                    if host.checks is not None:
                        host.checks.interval_published(self, seq)
                        host.checks.translation_published(self.who, mm, address, pfn, True)
                    self.table.fill(address, pfn, True)
            folio_unlock(host, pfn)
            put_page(host, pfn)
            if good:
                return pfn
        raise KernelError(ETIMEDOUT, f"{address:#x} is invalidated all the time")

    def make_writable(self, address: int) -> None:
        """A page in device memory that a fork shared: fault as a CPU would, to RAM and to a copy."""
        self._touch(address)

    def _touch(self, address: int) -> None:
        pfn = get_user_pages_unlocked(self.process.mm, address, FOLL_WRITE)
        if pfn < 0:
            raise KernelError(-pfn, f"the device cannot write {address:#x}")
        put_page(self.host, pfn)

    def fetch_add(self, address: int, value: int) -> int:
        """Add to 8 aligned bytes while the page is the device's alone; what was there. KernelError."""
        if address & 7:
            raise KernelError(EFAULT, f"{address:#x} is not aligned to 8")
        at = (self.atomic(address) << 12) + (address & 4095)
        old = int.from_bytes(self.host.ram.read(at, 8), "little")
        self.host.ram.write(at, (old + value & (1 << 64) - 1).to_bytes(8, "little"))
        return old

    # -- plain accesses -----------------------------------------------------------------------

    def read(self, address: int, length: int) -> bytes:
        """Load within one page, from device memory or RAM. KernelError."""
        pfn = self.access(address, write=False)
        return self.host.ram.read((pfn << 12) + (address & 4095), length)

    def write(self, address: int, data: bytes) -> None:
        """Store within one page, in device memory or RAM. KernelError."""
        pfn = self.access(address, write=True)
        self.host.ram.write((pfn << 12) + (address & 4095), data)

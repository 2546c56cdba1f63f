"""guest_memfd: guest memory that is a file of KVM's, found by its offset and not by a host address.

Source of truth: virt/kvm/guest_memfd.c (Linux 6.18): kvm_gmem_create, kvm_gmem_bind, kvm_gmem_unbind,
kvm_gmem_get_pfn, kvm_gmem_prepare_folio, kvm_gmem_punch_hole, kvm_gmem_allocate, kvm_gmem_release,
__kvm_gmem_invalidate_begin, __kvm_gmem_invalidate_end, kvm_gmem_fault_user_mapping, kvm_gmem_error_folio.

Its pages have no other store: they stay where they are, nothing reclaims, writes or migrates them, and a
page is gone when a hole is punched over it. Host page tables need not map them, so no mmu notifier tells KVM
when one goes; the file tells it, by the same bracket: begin, unmap and flush under mmu_lock, then the page
leaves the file, then end. Where the file may be mapped (GUEST_MEMFD_FLAG_MMAP with INIT_SHARED), that zap
opens a notifier's bracket inside this one.

A memslot is bound to a range of the file for its life. Closing the file takes the bindings away, not the
slots: faults there leave KVM_RUN with KVM_EXIT_MEMORY_FAULT.

Lock order: slots_lock, invalidate_lock, mmu_lock or folio lock.

Not modelled: several files of one inode, huge pages, kvm_gmem_populate and the preparation of pages by
hardware (SEV-SNP, TDX), NUMA policies, a VM that lives on because only the file is open.
"""

from __future__ import annotations

from errno import EBADF, EEXIST, EFAULT, EINVAL, EIO, ENODEV, ENOMEM, ENOTTY, EOPNOTSUPP
from typing import TYPE_CHECKING

from host_mm.address_space import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    AddressSpace,
    AddressSpaceOperations,
    VmOperations,
    check_fallocate,
    fput,
    get_file,
)
from host_mm.filemap import folio_unlock
from host_mm.filemap_cache import filemap_add_folio, filemap_lock_folio, filemap_page
from host_mm.kernel.costs import COST_CLEAR_PAGE
from host_mm.kernel.errors import EHWPOISON, BrokenTruth, KernelError
from host_mm.mm_types import (
    VM_FAULT_LOCKED,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_MAYSHARE,
    VM_SHARED,
)
from host_mm.page import PG_hwpoison, PG_referenced, PG_uptodate, put_page
from host_mm.page_alloc import GFP_HIGHUSER, alloc_pages
from host_mm.truncate import truncate_inode_pages_range
from kvm_model.memslots import KVM_MEMSLOT_GMEM_ONLY, KvmMemorySlot
from kvm_model.mmu.gfn_range import kvm_unmap_gfn_range
from kvm_model.mmu.invalidate import (
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from kvm_model.requests import kvm_flush_remote_tlbs

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea, VmFault
    from kvm_model.kvm_main import Kvm

__all__ = [
    "GUEST_MEMFD_FLAG_INIT_SHARED", "GUEST_MEMFD_FLAG_MMAP", "KvmGmem", "kvm_gmem_bind", "kvm_gmem_create",
    "kvm_gmem_folio", "kvm_gmem_get_pfn", "kvm_gmem_unbind",
]

GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1
_MF_DELAYED = 2
_FOREVER = 1 << 64


class KvmGmem:
    """struct kvm_gmem: a guest_memfd of `kvm`, with the memslots that show ranges of it."""

    __slots__ = ("bindings", "file", "flags", "kvm")

    def __init__(self, kvm: Kvm, size: int, flags: int) -> None:
        self.kvm = kvm
        self.flags = flags
        self.bindings: list[KvmMemorySlot] = []
        self.file = AddressSpace(kvm.host, "[kvm-gmem]", size, _A_OPS, _VM_OPS, kvm.process.home_node)
        self.file.private_data = self

    def bound(self, start: int, end: int) -> list[KvmMemorySlot]:
        """The slots that show pages of [start, end), by their place in the file."""
        found = [s for s in self.bindings if s.gmem_pgoff < end and s.gmem_pgoff + s.npages > start]
        return sorted(found, key=lambda slot: slot.gmem_pgoff)


# -- pages ----------------------------------------------------------------------------------------


def _get_folio(gmem: KvmGmem, index: int) -> int:
    """kvm_gmem_get_folio: page `index`, made if need be, locked and with a reference; or -ENOMEM."""
    mapping, host = gmem.file, gmem.kvm.host
    while True:
        pfn = filemap_lock_folio(mapping, index)
        if pfn >= 0:
            host.lru.folio_mark_accessed(pfn)
            return pfn
        pfn = alloc_pages(host, GFP_HIGHUSER, 0, mapping.nid)
        if pfn < 0:
            return -ENOMEM
        host.pages.flags[pfn] |= PG_referenced
        err = filemap_add_folio(mapping, pfn, index, gmem.kvm.mm)
        if not err:
            return pfn
        put_page(host, pfn)
        if err != -EEXIST:
            return err


def _prepare(gmem: KvmGmem, pfn: int) -> None:
    """kvm_gmem_prepare_folio: a page that was only allocated so far becomes zeros."""
    host = gmem.kvm.host
    if not host.pages.flags[pfn] & PG_uptodate:
        host.ram.clear_page(pfn)
        host.sched.advance(COST_CLEAR_PAGE)
        host.pages.flags[pfn] |= PG_uptodate


def kvm_gmem_folio(slot: KvmMemorySlot, gfn: int) -> int:
    """The frame that the file has for `gfn` of a bound slot, or -1; for who only looks."""
    gmem = slot.gmem
    return -1 if gmem is None else gmem.file.i_pages.get(gfn - slot.base_gfn + slot.gmem_pgoff, -1)


def kvm_gmem_get_pfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int) -> int:
    """The frame for `gfn`, zeroed when it is new, with a reference; or a negative errno. Sleeps.

    Nothing is held against a hole that is punched meanwhile: the caller must ask mmu_invalidate_retry_gfn.
    """
    gmem = slot.gmem
    host = kvm.host
    # Being closed: kvm_gmem_release has not come to this slot yet.
    if gmem is None or gmem.file not in host.mappings:
        return -EFAULT
    index = gfn - slot.base_gfn + slot.gmem_pgoff
    get_file(gmem.file)
    if slot not in gmem.bindings:
        pfn = -EIO
    else:
        pfn = _get_folio(gmem, index)
    if pfn >= 0:
        poisoned = host.pages.flags[pfn] & PG_hwpoison
        if not poisoned:
            _prepare(gmem, pfn)
        folio_unlock(host, pfn)
        if poisoned:
            put_page(host, pfn)
            pfn = -EHWPOISON
    # fput leaves the rest to the end of the system call: it would wait for who waits for our SRCU section.
    gmem.file.f_count -= 1
    if not gmem.file.f_count and not gmem.file.i_mmap:
        host.delayed_fput.append(gmem.file)
    return pfn


# -- the bracket ----------------------------------------------------------------------------------


def _invalidate_begin(gmem: KvmGmem, start: int, end: int) -> object:
    """Unmap pages [start, end) in every slot that shows them, and keep them unmapped until the end."""
    kvm = gmem.kvm
    flush = found = False
    for slot in gmem.bound(start, end):
        pgoff = slot.gmem_pgoff
        first = slot.base_gfn + max(pgoff, start) - pgoff
        last = slot.base_gfn + min(pgoff + slot.npages, end) - pgoff
        if not found:
            found = True
            kvm.mmu_lock.lock()
            kvm_mmu_invalidate_begin(kvm)
        kvm_mmu_invalidate_range_add(kvm, first, last)
        if "gmem-no-unmap" not in kvm.breaks:
            flush |= kvm_unmap_gfn_range(kvm, slot, first, last, may_block=True)
    if flush:
        kvm_flush_remote_tlbs(kvm)
    bracket = object()
    if found:
        if kvm.truths is not None:
            kvm.truths.note_start_unlock()
        kvm.mmu_lock.unlock()
    if kvm.truths is not None:
        kvm.truths.note_start_returned(bracket, found)
    return bracket


def _invalidate_end(gmem: KvmGmem, start: int, end: int, bracket: object) -> None:
    """Faults may map pages [start, end) again."""
    kvm = gmem.kvm
    if kvm.truths is not None:
        for slot in gmem.bound(start, end):
            kvm.truths.note_gfns(slot.base_gfn, slot.npages)
        kvm.truths.note_end_called(bracket)
    found = bool(gmem.bound(start, end))
    if found:
        with kvm.mmu_lock:
            kvm_mmu_invalidate_end(kvm)
    if kvm.truths is not None:
        kvm.truths.note_end_returned(bracket, found)


# -- the file -------------------------------------------------------------------------------------


def _punch_hole(gmem: KvmGmem, offset: int, length: int) -> None:
    start, end = offset >> 12, (offset + length) >> 12
    # Bindings must not change, so that begin and end see the same.
    with gmem.file.invalidate_lock:
        bracket = _invalidate_begin(gmem, start, end)
        truncate_inode_pages_range(gmem.file, offset, offset + length - 1)
        _invalidate_end(gmem, start, end, bracket)


def _allocate(gmem: KvmGmem, offset: int, length: int) -> None:
    host, lock = gmem.kvm.host, gmem.file.invalidate_lock
    if offset + length > gmem.file.i_size:
        raise KernelError(EINVAL, "a guest_memfd does not grow")
    lock.read_lock()
    try:
        for index in range(offset >> 12, (offset + length) >> 12):
            pfn = _get_folio(gmem, index)
            if pfn < 0:
                raise KernelError(-pfn, "no frame for guest_memfd")
            folio_unlock(host, pfn)
            put_page(host, pfn)
            if host.sched.preempt:
                host.sched.point("cond_resched")
    finally:
        lock.read_unlock()


def _release(gmem: KvmGmem) -> None:
    """kvm_gmem_release: the slots lose their memory; the pages go later, with the inode."""
    kvm = gmem.kvm
    with kvm.slots_lock, gmem.file.invalidate_lock:
        for slot in gmem.bindings:
            slot.gmem = None
        bracket = _invalidate_begin(gmem, 0, _FOREVER)
        _invalidate_end(gmem, 0, _FOREVER, bracket)
        gmem.bindings.clear()
    kvm.gmems.remove(gmem)


class _GmemVmOperations(VmOperations):
    """kvm_gmem_vm_ops."""

    def fault(self, vmf: VmFault) -> int:
        """kvm_gmem_fault_user_mapping."""
        gmem: KvmGmem = vmf.vma.file.private_data
        if vmf.pgoff << 12 >= gmem.file.i_size or not gmem.flags & GUEST_MEMFD_FLAG_INIT_SHARED:
            return VM_FAULT_SIGBUS
        pfn = _get_folio(gmem, vmf.pgoff)
        if pfn < 0:
            return VM_FAULT_OOM
        _prepare(gmem, pfn)
        vmf.page = filemap_page(gmem.file, pfn, vmf.pgoff)
        return VM_FAULT_LOCKED


class _GmemOperations(AddressSpaceOperations):
    """kvm_gmem_aops and kvm_gmem_fops. What the file does not offer is refused as the VFS refuses it."""

    unevictable = True

    def mmap(self, mapping: AddressSpace, vma: VmArea) -> None:
        """kvm_gmem_mmap."""
        if not mapping.private_data.flags & GUEST_MEMFD_FLAG_MMAP:
            raise KernelError(ENODEV, "this guest_memfd cannot be mapped")
        if vma.flags & (VM_SHARED | VM_MAYSHARE) != VM_SHARED | VM_MAYSHARE:
            raise KernelError(EINVAL, "guest_memfd is mapped shared only")

    def dirty_folio(self, mapping: AddressSpace, pfn: int) -> bool:
        """noop_dirty_folio: there is nowhere to write to."""
        return False

    def dropped_clean(self, mapping: AddressSpace, pfn: int) -> None:
        """Nobody may drop a page: its bytes are nowhere else."""
        what = f"pfn {pfn:#x} of {mapping!r} is dropped"
        raise BrokenTruth("dirty-dropped", what, mapping.host.stream.here())

    @staticmethod
    def error_remove_folio(mapping: AddressSpace, pfn: int) -> int:
        """kvm_gmem_error_folio: out of the SPTEs; the page stays, and faults on it are told."""
        gmem: KvmGmem = mapping.private_data
        mapping.invalidate_lock.read_lock()
        start = mapping.host.pages.index[pfn]
        bracket = _invalidate_begin(gmem, start, start + 1)
        _invalidate_end(gmem, start, start + 1, bracket)
        mapping.invalidate_lock.read_unlock()
        return _MF_DELAYED

    def write_begin(self, mapping: AddressSpace, index: int, inside: int, length: int) -> int:
        """There is no write(2)."""
        raise KernelError(EINVAL, "no write(2) on guest_memfd")

    def read_begin(self, mapping: AddressSpace, index: int) -> int:
        """There is no read(2)."""
        raise KernelError(EINVAL, "no read(2) on guest_memfd")

    def fsync(self, mapping: AddressSpace) -> None:
        """There is no fsync(2)."""
        raise KernelError(EINVAL, "no fsync(2) on guest_memfd")

    def set_size(self, mapping: AddressSpace, size: int) -> None:
        """kvm_gmem_setattr."""
        raise KernelError(EINVAL, "the size of a guest_memfd is fixed")

    def fallocate(self, mapping: AddressSpace, mode: int, offset: int, length: int) -> None:
        """kvm_gmem_fallocate."""
        check_fallocate(mode, offset, length)
        if not mode & FALLOC_FL_KEEP_SIZE:
            raise KernelError(EOPNOTSUPP, "a guest_memfd does not grow")
        if (offset | length) & 0xFFF:
            raise KernelError(EINVAL, f"{length:#x} bytes at {offset:#x} are not whole pages")
        act = _punch_hole if mode & FALLOC_FL_PUNCH_HOLE else _allocate
        act(mapping.private_data, offset, length)

    def evict_inode(self, mapping: AddressSpace) -> None:
        """The last descriptor and mapping are gone."""
        _release(mapping.private_data)
        truncate_inode_pages_range(mapping, 0, -1)


_A_OPS = _GmemOperations()
_VM_OPS = _GmemVmOperations()


# -- ioctls ---------------------------------------------------------------------------------------


def kvm_gmem_create(kvm: Kvm, size: int, flags: int) -> AddressSpace:
    """KVM_CREATE_GUEST_MEMFD: the file, with one descriptor. KernelError(EINVAL), ENOTTY before 6.8.

    INIT_SHARED, without which nobody but the guest reaches the pages, is not for VMs with private memory.
    """
    if not kvm.profile.guest_memfd:
        raise KernelError(ENOTTY, "this kernel has no guest_memfd")
    supported = GUEST_MEMFD_FLAG_MMAP | (0 if kvm.has_private_mem else GUEST_MEMFD_FLAG_INIT_SHARED)
    if flags & ~supported:
        raise KernelError(EINVAL, f"flags {flags:#x}: this VM supports {supported:#x}")
    if not 0 < size < 1 << 63 or size & 0xFFF:
        raise KernelError(EINVAL, f"size {size:#x} is not whole pages")
    gmem = KvmGmem(kvm, size, flags)
    kvm.gmems.append(gmem)
    return gmem.file


def kvm_gmem_bind(kvm: Kvm, slot: KvmMemorySlot, file: AddressSpace | None, offset: int) -> None:
    """A new slot shows `file` from byte `offset` on; slots_lock held. KernelError(EBADF or EINVAL)."""
    if file is None or file not in kvm.host.mappings:
        raise KernelError(EBADF, "guest_memfd is not an open file")
    get_file(file)
    try:
        gmem = file.private_data
        if not isinstance(gmem, KvmGmem) or gmem.kvm is not kvm:
            raise KernelError(EINVAL, f"{file!r} is no guest_memfd of this VM")
        if offset < 0 or offset & 0xFFF or offset + (slot.npages << 12) > file.i_size:
            raise KernelError(EINVAL, f"offset {offset:#x}: the slot reaches beyond {file!r}")
        with file.invalidate_lock:
            start = offset >> 12
            if gmem.bound(start, start + slot.npages):
                raise KernelError(EINVAL, "a slot shows these pages already")
            slot.gmem = gmem
            slot.gmem_pgoff = start
            if gmem.flags & GUEST_MEMFD_FLAG_MMAP:
                slot.flags |= KVM_MEMSLOT_GMEM_ONLY
            gmem.bindings.append(slot)
    finally:
        fput(file)


def kvm_gmem_unbind(slot: KvmMemorySlot) -> None:
    """A slot that no vCPU can see any more lets go of its file; slots_lock held."""
    gmem = slot.gmem
    if gmem is None:
        return
    with gmem.file.invalidate_lock:
        gmem.bindings.remove(slot)
        slot.gmem = None

"""struct address_space: a file's pages in memory, and the VMAs that map it.

Source of truth: include/linux/fs.h (struct address_space, struct address_space_operations), mm/vma.c
(__vma_link_file, vma_link_file, unlink_file_vma, __remove_shared_vm_struct), mm/interval_tree.c
(vma_interval_tree_insert_after), include/linux/xarray.h (xa_mk_value), fs/open.c: vfs_fallocate; Linux 6.18.

An AddressSpace stands for the kernel's struct file, struct inode and struct address_space in one: what is
opened, has a size and holds pages. It lives while somebody uses it: each open descriptor (`get_file`,
`fput`) and each VMA in `i_mmap` count. With the last user it is evicted: written back if it has where to,
its pages and swap slots given up. In Linux the inode cache would keep the pages for a while.

    i_pages[index]   >= 0: pfn of the head of the folio that has this page
                     <  0: ~value, a shmem page's swap entry (xa_mk_value)

The page cache holds one reference per page to each of its folios. `i_mmap` is the interval tree as a list:
walks sort it by pgoff, and VMAs of the same pgoff stay in the order in which they came.

Locks, outermost first: mmap_lock or i_rwsem, invalidate_lock, folio lock, i_mmap_rwsem, anon_vma, page
tables.

Not modelled: struct file (no position, no per-descriptor flags), inodes shared by several address spaces,
DAX, error sequences, directories and names.
"""

from __future__ import annotations

from errno import EFBIG, EINVAL, EOPNOTSUPP
from typing import TYPE_CHECKING, Any

from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.locks import RwSem
from host_mm.mm_types import VM_MAYWRITE, VM_SHARED
from host_mm.page import PG_dirty, set_page_dirty

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea, VmFault

__all__ = [
    "FALLOC_FL_KEEP_SIZE",
    "FALLOC_FL_PUNCH_HOLE",
    "MAX_LFS_FILESIZE",
    "AddressSpace",
    "AddressSpaceOperations",
    "VmOperations",
    "check_fallocate",
    "evict_unused",
    "flush_delayed_fput",
    "fput",
    "get_file",
    "i_mmap_insert",
    "i_mmap_remove",
    "vma_file_lock",
    "vmas_of_pages",
]

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
MAX_LFS_FILESIZE = (1 << 63) - 1


def check_fallocate(mode: int, offset: int, length: int) -> None:
    """vfs_fallocate: KernelError EINVAL, EFBIG, or EOPNOTSUPP for a mode other than plain and hole."""
    if offset < 0 or length <= 0:
        raise KernelError(EINVAL, f"cannot allocate {length:#x} bytes at {offset:#x}")
    hole = mode & FALLOC_FL_PUNCH_HOLE
    if mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE) or (hole and not mode & FALLOC_FL_KEEP_SIZE):
        raise KernelError(EOPNOTSUPP, f"no fallocate mode {mode:#x}")
    if offset + length > MAX_LFS_FILESIZE:
        raise KernelError(EFBIG, f"{offset:#x}+{length:#x} is beyond the largest file")


class VmOperations:
    """struct vm_operations_struct. `map_pages` and `page_mkwrite` are None where the file has none."""

    map_pages: Any = None
    """(vmf, first index, last index) -> VM_FAULT_*: map what is cached around the fault."""
    page_mkwrite: Any = None
    """(vmf) -> VM_FAULT_*: the shared page at vmf.page is about to become writable."""

    open: Any = None
    """(vma): a copy of a VMA of the file was made."""
    close: Any = None
    """(vma): a VMA of the file is gone, its entries and tables with it."""
    may_split: Any = None
    """(vma, address) -> bool: whether the VMA can be cut there."""

    def allowable_huge_order(self, vma: VmArea, forced: bool) -> bool:
        """Whether the file may be mapped by huge pages there; `forced`: whatever the policy."""
        return False

    def fault(self, vmf: VmFault) -> int:
        """Find the page: vmf.page with a reference, locked with VM_FAULT_LOCKED."""
        raise NotImplementedError


class AddressSpaceOperations:
    """struct address_space_operations, and what else its inode's file system decides.

    `can_writeback`: the backing device is one that dirty pages are written to (BDI_CAP_WRITEBACK).
    """

    can_writeback = False
    is_shmem = False
    is_hugetlb = False
    unevictable = False
    """AS_UNEVICTABLE and AS_INACCESSIBLE: reclaim, compaction and migration leave the pages alone."""
    error_remove_folio: Any = None
    """(mapping, pfn) -> int: the memory of a locked page has failed; not 0: the page stays in the file."""

    def mmap(self, mapping: AddressSpace, vma: VmArea) -> None:
        """file_operations.mmap: the file gets a mapping, which is not yet linked. KernelError."""

    def dirty_folio(self, mapping: AddressSpace, pfn: int) -> bool:
        """A folio of the mapping was written to: true if it was clean."""
        flags = mapping.host.pages.flags
        clean = not flags[pfn] & PG_dirty
        flags[pfn] |= PG_dirty
        return clean

    def read_folio(self, mapping: AddressSpace, pfn: int) -> None:
        """Start reading a locked folio that is not up to date; it is unlocked when its bytes are there."""
        raise NotImplementedError

    def write_begin(self, mapping: AddressSpace, index: int, inside: int, length: int) -> int:
        """write(2) of `length` bytes from byte `inside` of page `index`: its folio, locked, with a reference.

        It is up to date unless it is new and the write need not keep anything of it. A negative errno.
        """
        raise KernelError(EOPNOTSUPP, f"no write(2) on {mapping!r}")

    def read_begin(self, mapping: AddressSpace, index: int) -> int:
        """read(2) of page `index`: its folio, locked, up to date, with a reference; or NOT_CACHED: zeros."""
        raise KernelError(EOPNOTSUPP, f"no read(2) on {mapping!r}")

    def cancel_dirty(self, mapping: AddressSpace, pfn: int) -> None:
        """A folio is on its way out of the file: what was written to it need not be kept."""
        mapping.host.pages.flags[pfn] &= ~PG_dirty

    def write_end(self, mapping: AddressSpace, pfn: int, offset: int, length: int) -> None:
        """write(2) has put `length` bytes at `offset` of a locked folio."""
        set_page_dirty(mapping.host, pfn)

    def invalidate_folio(self, mapping: AddressSpace, pfn: int, offset: int, length: int) -> None:
        """Bytes of a locked folio went: what the file system keeps of them goes, too."""

    def release_folio(self, mapping: AddressSpace, pfn: int) -> bool:
        """filemap_release_folio: whether the file system gives up what it keeps of a locked folio."""
        return True

    def dropped_clean(self, mapping: AddressSpace, pfn: int) -> None:
        """A truth: the folio goes as clean, so its bytes must be what would come back. Only with checks."""
        raise NotImplementedError

    def fallocate(self, mapping: AddressSpace, mode: int, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_*. KernelError."""
        raise KernelError(EOPNOTSUPP, f"no fallocate(2) on {mapping!r}")

    def set_size(self, mapping: AddressSpace, size: int) -> None:
        """ftruncate(2). KernelError."""
        raise KernelError(EOPNOTSUPP, f"no ftruncate(2) on {mapping!r}")

    def writepage(self, mapping: AddressSpace, pfn: int) -> None:
        """Write a locked folio that was made clean; unlocks it."""
        raise NotImplementedError

    def fsync(self, mapping: AddressSpace) -> None:
        """fsync(2): sleep until everything written so far is in the file. Nothing to do without one."""

    def writeout(self, mapping: AddressSpace, pfn: int) -> bool:
        """Reclaim wants a locked dirty folio written; unlocks it. False: it stays, dirty and locked."""
        raise NotImplementedError

    def abandon(self, mapping: AddressSpace) -> None:
        """The host ends with the file in use: give up what the machine underneath holds for it."""

    def evict_inode(self, mapping: AddressSpace) -> None:
        """The last user is gone: give up every page."""
        raise NotImplementedError


class AddressSpace:
    """One file. `i_size` is in bytes, `nrpages` counts the pages that have a frame, new ones
    come from node `nid`; no page beyond `top` was ever there. `dirty` and `writeback` are the xarray's marks,
    by the index of the folio. `dirty_blocks` are pages whose buffers a file system on blocks must write."""

    __slots__ = (
        "a_ops", "dirty", "dirty_blocks", "f_count", "host", "i_mmap", "i_mmap_rwsem", "i_mmap_writable",
        "i_pages", "i_rwsem", "i_size", "invalidate_lock", "name", "nid", "nrpages", "private_data", "top",
        "vm_ops", "writeback",
    )

    def __init__(
        self, host: HostMm, name: str, size: int, a_ops: AddressSpaceOperations, vm_ops: VmOperations,
        nid: int = 0,
    ) -> None:
        self.host = host
        self.name = name
        self.i_size = size
        self.nid = nid
        self.a_ops = a_ops
        self.vm_ops = vm_ops
        self.i_pages: dict[int, int] = {}
        self.nrpages = self.top = 0
        self.dirty: dict[int, None] = {}
        self.dirty_blocks: set[int] = set()
        self.writeback: dict[int, None] = {}
        self.i_mmap: list[VmArea] = []
        self.i_mmap_rwsem = RwSem(host.sched, "i_mmap_rwsem")
        self.i_mmap_writable = 0
        self.invalidate_lock = RwSem(host.sched, "invalidate_lock")
        self.i_rwsem = RwSem(host.sched, "i_rwsem")
        self.private_data: Any = None
        self.f_count = 1
        host.mappings.append(self)

    @property
    def file_end(self) -> int:
        """The index of the first page that lies wholly beyond the end of the file."""
        return (self.i_size + 4095) >> 12

    def __repr__(self) -> str:
        return f"<AddressSpace {self.name} {self.i_size:#x}>"


# -- users ----------------------------------------------------------------------------------------
def get_file(mapping: AddressSpace) -> None:
    """One more descriptor."""
    mapping.f_count += 1


def fput(mapping: AddressSpace) -> None:
    """One descriptor less; without descriptors and mappings the file is evicted. Sleeps."""
    mapping.f_count -= 1
    if mapping.f_count < 0:
        raise BrokenTruth("file-count", f"{mapping!r} is closed once too often", mapping.host.stream.here())
    evict_unused(mapping)


def evict_unused(mapping: AddressSpace) -> None:
    """iput: evict the file if nobody uses it any more."""
    host = mapping.host
    if mapping.f_count or mapping.i_mmap or mapping not in host.mappings:
        return
    host.mappings.remove(mapping)
    mapping.a_ops.evict_inode(mapping)
    if mapping.i_pages:
        raise BrokenTruth("page-cache", f"{mapping!r} is evicted with pages in it", host.stream.here())


# -- the VMAs that map it -------------------------------------------------------------------------
def vma_file_lock(vma: VmArea) -> RwSem | None:
    """The i_mmap_rwsem that rmap walks of this VMA's file pages take, if it has a file."""
    return vma.file.i_mmap_rwsem if vma.file is not None else None


def i_mmap_insert(vma: VmArea, after: VmArea | None = None) -> None:
    """__vma_link_file: the VMA can be found from its file; i_mmap_rwsem is held for writing.

    `after`: the VMA that it is a fork's copy of.
    """
    mapping: AddressSpace = vma.file
    if vma.flags & (VM_SHARED | VM_MAYWRITE) == VM_SHARED | VM_MAYWRITE:
        mapping.i_mmap_writable += 1
    if after is None:
        mapping.i_mmap.append(vma)
    else:
        mapping.i_mmap.insert(mapping.i_mmap.index(after) + 1, vma)


def i_mmap_remove(vma: VmArea) -> None:
    """__remove_shared_vm_struct: rmap does not find the VMA any more; i_mmap_rwsem is held for writing."""
    mapping: AddressSpace = vma.file
    if vma.flags & (VM_SHARED | VM_MAYWRITE) == VM_SHARED | VM_MAYWRITE:
        mapping.i_mmap_writable -= 1
    mapping.i_mmap.remove(vma)
    if not mapping.i_mmap and not mapping.f_count:
        mapping.host.delayed_fput.append(mapping)


def flush_delayed_fput(host: HostMm) -> None:
    """____fput: at the end of a system call, with no lock held, evict what lost its last mapping."""
    while host.delayed_fput:
        evict_unused(host.delayed_fput.pop())


def vmas_of_pages(mapping: AddressSpace, first: int, last: int) -> list[VmArea]:
    """vma_interval_tree_foreach: the VMAs that cover one of the pages [first, last], by pgoff."""
    hits = [
        vma for vma in mapping.i_mmap
        if vma.pgoff <= last and vma.pgoff + ((vma.end - vma.start) >> 12) > first
    ]
    hits.sort(key=lambda vma: vma.pgoff)
    return hits

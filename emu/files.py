"""The VMM's files: memory of the guest that is a memfd's or a file's, and what can be done to those.

Each function is a system call of the process `vmm`, on the file that one of its mappings shows; a
descriptor lives only as long as the call, the mapping keeps the file alive.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.vmm import Vmm
    from host_mm.address_space import AddressSpace

__all__ = [
    "fadvise_dontneed", "file_at", "file_size", "fsync", "ftruncate", "mmap_file", "mmap_memfd", "peer_write",
    "punch_hole", "pwrite",
]

PROT_RW = 3


def _mmap(vmm: Vmm, file: AddressSpace, length: int, address: int, *, private: bool, pgoff: int = 0) -> int:
    from host_mm.mmap import MAP_FIXED, MAP_PRIVATE, MAP_SHARED, do_mmap

    flags = (MAP_PRIVATE if private else MAP_SHARED) | (MAP_FIXED if address else 0)
    return do_mmap(vmm.process.mm, address, length, PROT_RW, flags, file=file, pgoff=pgoff)


def mmap_memfd(vmm: Vmm, length: int, address: int = 0) -> int:
    """A fresh memfd of `length` bytes, mapped shared; the address."""
    from host_mm.address_space import fput
    from host_mm.memfd import memfd_create

    file = memfd_create(vmm.mm, "guest", length, vmm.process.home_node)
    try:
        return _mmap(vmm, file, length, address, private=False)
    finally:
        fput(file)


def mmap_file(
    vmm: Vmm, length: int, path: str | None = None, address: int = 0, *, private: bool = False,
    data: bytes = b"", pgoff: int = 0,
) -> int:
    """A real file, by path or a temporary one, mapped from page `pgoff` on; the address.

    It is made at least as long as the mapping; `data` is written into it first. KernelError: EACCES and
    what else the machine underneath says of the path.
    """
    from host_mm.address_space import fput
    from host_mm.arch.x86.pgtable import TASK_SIZE
    from host_mm.backing_file import open_file
    from host_mm.filemap_rw import file_write

    if length > TASK_SIZE:
        raise KernelError(errno.ENOMEM, f"{length:#x} bytes are more than an address space has")
    try:
        file = open_file(vmm.mm, (pgoff << 12) + length, path, vmm.process.home_node)
    except OSError as exc:
        raise KernelError(exc.errno or errno.EIO, f"{path}: {exc.strerror}") from None
    try:
        if data:
            file_write(file, 0, data)
            file.a_ops.fsync(file)
        return _mmap(vmm, file, length, address, private=private, pgoff=pgoff)
    finally:
        fput(file)


def file_at(vmm: Vmm, address: int) -> tuple[AddressSpace, int]:
    """The file mapped at `address` and the position in it; KernelError(EBADF) where none is.

    A device's memory is mapped through a file, too, but is nobody's page cache.
    """
    from host_mm.mm_types import VM_PFNMAP

    vma = vmm.process.mm.vma_lookup(address)
    if vma is None or vma.file is None or vma.flags & VM_PFNMAP:
        raise KernelError(errno.EBADF, f"no file is mapped at {address:#x}")
    return vma.file, address - vma.start + (vma.pgoff << 12)


def file_size(vmm: Vmm, address: int) -> int:
    """fstat(2): the size of the file mapped at `address`."""
    return file_at(vmm, address)[0].i_size


def fsync(vmm: Vmm, address: int) -> None:
    """fsync(2)."""
    file, _ = file_at(vmm, address)
    file.a_ops.fsync(file)


def punch_hole(vmm: Vmm, address: int, length: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE of what is mapped at [address, address + length)."""
    from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

    file, pos = file_at(vmm, address)
    file.a_ops.fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, pos, length)


def ftruncate(vmm: Vmm, address: int, size: int) -> None:
    """ftruncate(2) of the file mapped at `address`."""
    file, _ = file_at(vmm, address)
    file.a_ops.set_size(file, size)


def pwrite(vmm: Vmm, address: int, data: bytes) -> int:
    """pwrite(2) into the file where it is mapped at `address`: not through the mapping."""
    from host_mm.filemap_rw import file_write

    file, pos = file_at(vmm, address)
    return file_write(file, pos, data)


def fadvise_dontneed(vmm: Vmm, address: int, length: int) -> None:
    """posix_fadvise(POSIX_FADV_DONTNEED) of what is mapped at [address, address + length)."""
    from host_mm.filemap_rw import POSIX_FADV_DONTNEED, generic_fadvise

    file, pos = file_at(vmm, address)
    generic_fadvise(file, pos, length, POSIX_FADV_DONTNEED)


def peer_write(vmm: Vmm, address: int, data: bytes) -> None:
    """Another process maps the page of the file that is at `address`, stores `data` there, and ends."""
    from emu.vmm import Vmm as Process

    file, pos = file_at(vmm, address)
    peer = Process(vmm.mm, vmm.mm.create_process("peer"))
    try:
        at = _mmap(peer, file, 4096, 0, private=False, pgoff=pos >> 12)
        peer.write(at + (pos & 4095), data)
    finally:
        peer.exit()

"""System calls that the standard library has no function for, by ctypes. Refusals are OSError."""

from __future__ import annotations

import ctypes
import os

__all__ = [
    "MADV", "MAP_ANONYMOUS", "MAP_FIXED", "MAP_HUGETLB", "MAP_NORESERVE", "MAP_PRIVATE", "MAP_SHARED",
    "fallocate", "io_uring_unregister_buffers", "io_uring_with_buffer", "ioctl", "madvise", "mbind", "mlock",
    "mmap", "move_page", "mprotect", "mremap", "munlock", "munmap", "peek", "poke", "userfaultfd",
]

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
MAP_HUGETLB = 0x4_0000
MADV = {
    "NORMAL": 0, "WILLNEED": 3, "DONTNEED": 4, "FREE": 8, "REMOVE": 9, "DONTFORK": 10, "DOFORK": 11,
    "MERGEABLE": 12, "UNMERGEABLE": 13, "HUGEPAGE": 14, "NOHUGEPAGE": 15, "WIPEONFORK": 18, "KEEPONFORK": 19,
    "COLD": 20, "PAGEOUT": 21, "POPULATE_READ": 22, "POPULATE_WRITE": 23, "COLLAPSE": 25,
}
_SYS_MBIND, _SYS_MOVE_PAGES, _SYS_USERFAULTFD = 237, 279, 323
_SYS_IO_URING_SETUP, _SYS_IO_URING_REGISTER = 425, 427
_IO_URING_PARAMS_SIZE = 120
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS = 0, 1
_MPOL_BIND, _MPOL_MF_MOVE, _MPOL_MF_MOVE_ALL = 2, 2, 4
_PIPE = 4096
_FAILED = (1 << 64) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.syscall.restype = ctypes.c_long
_SIZES = {
    "mmap": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long],
    "munmap": [ctypes.c_void_p, ctypes.c_size_t],
    "mprotect": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    "madvise": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    "mlock": [ctypes.c_void_p, ctypes.c_size_t],
    "munlock": [ctypes.c_void_p, ctypes.c_size_t],
    "mremap": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p],
    "fallocate": [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long],
    "read": [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t],
    "write": [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t],
    "ioctl": [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p],
}
for _name, _types in _SIZES.items():
    getattr(_libc, _name).argtypes = _types


def _call(name: str, *args: int | None) -> int:
    answer = getattr(_libc, name)(*args)
    if answer in (-1, _FAILED):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return answer or 0


def mmap(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """mmap(2); address 0 lets the kernel choose."""
    return _call("mmap", address or None, length, prot, flags, fd, offset)


def munmap(address: int, length: int) -> None:
    """munmap(2)."""
    _call("munmap", address, length)


def mprotect(address: int, length: int, prot: int) -> None:
    """mprotect(2)."""
    _call("mprotect", address, length, prot)


def madvise(address: int, length: int, advice: str) -> None:
    """madvise(2) with MADV_<advice>."""
    _call("madvise", address, length, MADV[advice])


def mlock(address: int, length: int) -> None:
    """mlock(2)."""
    _call("mlock", address, length)


def munlock(address: int, length: int) -> None:
    """munlock(2)."""
    _call("munlock", address, length)


def mremap(address: int, old_length: int, new_length: int, flags: int, to: int) -> int:
    """mremap(2); the new address."""
    return _call("mremap", address, old_length, new_length, flags, to)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _call("fallocate", fd, mode, offset, length)


def _syscall(number: int, *args: int) -> int:
    answer = _libc.syscall(number, *(ctypes.c_long(arg) for arg in args))
    if answer == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"syscall {number}")
    return int(answer)


def userfaultfd(flags: int) -> int:
    """userfaultfd(2)."""
    return _syscall(_SYS_USERFAULTFD, flags)


def mbind(address: int, length: int, node: int) -> int:
    """mbind(2) with MPOL_BIND to one node and MPOL_MF_MOVE."""
    mask = ctypes.c_ulong(1 << node)
    return _syscall(_SYS_MBIND, address, length, _MPOL_BIND, ctypes.addressof(mask), 64, _MPOL_MF_MOVE)


def move_page(address: int, node: int) -> int:
    """move_pages(2) of one page of this process with MPOL_MF_MOVE_ALL; its status."""
    pages, nodes, status = ctypes.c_ulong(address), ctypes.c_int(node), ctypes.c_int(-99)
    pointers = (ctypes.addressof(each) for each in (pages, nodes, status))
    _syscall(_SYS_MOVE_PAGES, 0, 1, *pointers, _MPOL_MF_MOVE | _MPOL_MF_MOVE_ALL)
    return status.value


def io_uring_with_buffer(address: int, length: int) -> int:
    """A fresh io_uring with those bytes as its fixed buffer, which pins their pages; the descriptor."""
    params = ctypes.create_string_buffer(_IO_URING_PARAMS_SIZE)
    ring = _syscall(_SYS_IO_URING_SETUP, 4, ctypes.addressof(params))
    iovec = ctypes.create_string_buffer(address.to_bytes(8, "little") + length.to_bytes(8, "little"), 16)
    try:
        _syscall(_SYS_IO_URING_REGISTER, ring, _REGISTER_BUFFERS, ctypes.addressof(iovec), 1)
    except OSError:
        os.close(ring)
        raise
    return ring


def io_uring_unregister_buffers(ring: int) -> None:
    """The fixed buffers are unpinned."""
    _syscall(_SYS_IO_URING_REGISTER, ring, _UNREGISTER_BUFFERS, 0, 0)


def ioctl(fd: int, request: int, argument: int | bytes | bytearray = 0) -> int:
    """ioctl(2) with a number, which may have 64 bits, or with a buffer; a bytearray may change."""
    if isinstance(argument, int):
        return _call("ioctl", fd, request, argument)
    buffer = bytearray(argument) if isinstance(argument, bytes) else argument
    return _call("ioctl", fd, request, ctypes.addressof(ctypes.c_char.from_buffer(buffer)))


def peek(address: int, length: int) -> bytes:
    """Bytes of this process, at most a page; OSError(EFAULT) where it has none.

    By way of a pipe: the kernel's copy faults as the process would, and fails where that would end it.
    """
    read, write = os.pipe()
    try:
        _call("write", write, address, length)
        return os.read(read, length)
    finally:
        os.close(read)
        os.close(write)


def poke(address: int, data: bytes) -> None:
    """Store bytes of this process; OSError(EFAULT) where it may not."""
    read, write = os.pipe()
    try:
        for at in range(0, len(data), _PIPE):
            piece = data[at : at + _PIPE]
            os.write(write, piece)
            _call("read", read, address + at, len(piece))
    finally:
        os.close(read)
        os.close(write)

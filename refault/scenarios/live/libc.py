"""System calls that the standard library has no function for, by ctypes. Refusals are OSError."""

from __future__ import annotations

import ctypes
import os

__all__ = [
    "MADV", "MAP_ANONYMOUS", "MAP_FIXED", "MAP_NORESERVE", "MAP_PRIVATE", "MAP_SHARED", "ioctl", "madvise",
    "mlock", "mmap", "mprotect", "munlock", "munmap", "peek", "poke",
]

MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
MADV = {
    "NORMAL": 0, "WILLNEED": 3, "DONTNEED": 4, "FREE": 8, "REMOVE": 9, "DONTFORK": 10, "DOFORK": 11,
    "MERGEABLE": 12, "UNMERGEABLE": 13, "HUGEPAGE": 14, "NOHUGEPAGE": 15, "WIPEONFORK": 18, "KEEPONFORK": 19,
    "COLD": 20, "PAGEOUT": 21, "POPULATE_READ": 22, "POPULATE_WRITE": 23, "COLLAPSE": 25,
}
_FAILED = (1 << 64) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_SIZES = {
    "mmap": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long],
    "munmap": [ctypes.c_void_p, ctypes.c_size_t],
    "mprotect": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    "madvise": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    "mlock": [ctypes.c_void_p, ctypes.c_size_t],
    "munlock": [ctypes.c_void_p, ctypes.c_size_t],
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


def ioctl(fd: int, request: int, argument: int | bytes | bytearray = 0) -> int:
    """ioctl(2) with a number, which may have 64 bits, or with a buffer; a bytearray may change."""
    if isinstance(argument, int):
        return _call("ioctl", fd, request, argument)
    buffer = bytearray(argument) if isinstance(argument, bytes) else argument
    return _call("ioctl", fd, request, ctypes.addressof(ctypes.c_char.from_buffer(buffer)))


def peek(address: int, length: int) -> bytes:
    """Bytes of this process."""
    return ctypes.string_at(address, length)


def poke(address: int, data: bytes) -> None:
    """Store bytes of this process."""
    ctypes.memmove(address, data, len(data))

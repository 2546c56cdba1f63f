"""Arguments that the system calls refuse, or take for nothing: with the errno that Linux gives."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import TASK_SIZE
from host_mm.kernel.errors import KernelError
from host_mm.madvise import MADV_COLD, MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT, MADV_POPULATE_READ, do_madvise
from host_mm.migrate import move_pages
from host_mm.mlock import do_mlock, do_munlock
from host_mm.mmap import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    do_mmap,
    do_munmap,
)
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, make_host

BASE = 0x10000000
"""Four pages, a hole of two, two pages; all written."""
HOLE = BASE + 4 * PAGE
BEHIND = BASE + 6 * PAGE
MAX = (1 << 64) - 1
TOP = MAX & ~0xFFF
FREE = 0x20000000
MOVE = MREMAP_MAYMOVE | MREMAP_FIXED
PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS

Call = Callable[[Process], Any]
OK = 0


def madvise(start: int, length: int, advice: int = MADV_DONTNEED) -> Call:
    return lambda p: do_madvise(p.mm, start, length, advice)


def mprotect(start: int, length: int, prot: int = PROT_READ) -> Call:
    return lambda p: do_mprotect(p.mm, start, length, prot)


def munmap(start: int, length: int) -> Call:
    return lambda p: do_munmap(p.mm, start, length)


def mlock(start: int, length: int, flags: int = 0) -> Call:
    return lambda p: do_mlock(p.mm, start, length, flags)


def munlock(start: int, length: int) -> Call:
    return lambda p: do_munlock(p.mm, start, length)


def mremap(start: int, old: int, new: int, flags: int = 0, to: int = 0) -> Call:
    return lambda p: do_mremap(p.mm, start, old, new, flags, to)


def mmap(start: int, length: int, flags: int = PRIVATE) -> Call:
    return lambda p: do_mmap(p.mm, start, length, RW, flags)


TABLE: dict[str, tuple[Call, int]] = {
    "madvise unaligned": (madvise(BASE + 1, PAGE), errno.EINVAL),
    "madvise of nothing": (madvise(BASE, 0), OK),
    "madvise of nothing in a hole": (madvise(HOLE, 0), OK),
    "madvise of nothing, unaligned": (madvise(BASE + 1, 0), errno.EINVAL),
    "madvise of nothing, no such advice": (madvise(BASE, 0, 77), errno.EINVAL),
    "madvise length near 2**64": (madvise(BASE, MAX), errno.EINVAL),
    "madvise wraps around": (madvise(TOP, 2 * PAGE), errno.EINVAL),
    "madvise to the very end": (madvise(TOP, PAGE), errno.EINVAL),
    "madvise beyond the address space": (madvise(TASK_SIZE, PAGE), errno.ENOMEM),
    "madvise of a hole": (madvise(HOLE, PAGE), errno.ENOMEM),
    "madvise over a hole": (madvise(BASE, 8 * PAGE, MADV_COLD), errno.ENOMEM),
    "madvise part of a page counts whole": (madvise(BASE, 1, MADV_COLD), OK),
    "pageout of a hole": (madvise(HOLE, PAGE, MADV_PAGEOUT), errno.ENOMEM),
    "free of a hole": (madvise(HOLE, PAGE, MADV_FREE), errno.ENOMEM),
    "populate of a hole": (madvise(HOLE, PAGE, MADV_POPULATE_READ), errno.ENOMEM),
    "populate of nothing": (madvise(BASE, 0, MADV_POPULATE_READ), OK),
    "mprotect unaligned": (mprotect(BASE + 8, PAGE), errno.EINVAL),
    "mprotect of nothing": (mprotect(HOLE, 0), OK),
    "mprotect of nothing, unaligned": (mprotect(BASE + 8, 0), errno.EINVAL),
    "mprotect length near 2**64": (mprotect(BASE, MAX), errno.ENOMEM),
    "mprotect wraps around": (mprotect(TOP, 2 * PAGE), errno.ENOMEM),
    "mprotect no such rights": (mprotect(BASE, PAGE, 0x40), errno.EINVAL),
    "mprotect of a hole": (mprotect(HOLE, PAGE), errno.ENOMEM),
    "mprotect that begins in a hole": (mprotect(HOLE, 4 * PAGE), errno.ENOMEM),
    "mprotect beyond the address space": (mprotect(TASK_SIZE, PAGE), errno.ENOMEM),
    "munmap unaligned": (munmap(BASE + 1, PAGE), errno.EINVAL),
    "munmap of nothing": (munmap(BASE, 0), errno.EINVAL),
    "munmap length near 2**64": (munmap(BASE, MAX), errno.EINVAL),
    "munmap wraps around": (munmap(TOP, 2 * PAGE), errno.EINVAL),
    "munmap reaches beyond": (munmap(BASE, TASK_SIZE), errno.EINVAL),
    "munmap of a hole": (munmap(HOLE, PAGE), OK),
    "mlock of nothing": (mlock(HOLE, 0), OK),
    "mlock of a hole": (mlock(HOLE, PAGE), errno.ENOMEM),
    "mlock that begins in a hole": (mlock(HOLE, 4 * PAGE), errno.ENOMEM),
    "mlock length that wraps to nothing": (mlock(BASE, MAX), OK),
    "mlock wraps around": (mlock(TOP, 2 * PAGE), errno.EINVAL),
    "mlock beyond the address space": (mlock(TASK_SIZE, PAGE), errno.ENOMEM),
    "mlock no such flag": (mlock(BASE, PAGE, 2), errno.EINVAL),
    "munlock of what is not locked": (munlock(BASE, PAGE), OK),
    "munlock of a hole": (munlock(HOLE, PAGE), errno.ENOMEM),
    "munlock wraps around": (munlock(TOP, 2 * PAGE), errno.EINVAL),
    "mremap unaligned": (mremap(BASE + 1, PAGE, 2 * PAGE), errno.EINVAL),
    "mremap to nothing": (mremap(BASE, PAGE, 0), errno.EINVAL),
    "mremap of nothing, private": (mremap(BASE, 0, PAGE, MREMAP_MAYMOVE), errno.EINVAL),
    "mremap of a hole": (mremap(HOLE, PAGE, 2 * PAGE, MREMAP_MAYMOVE), errno.EFAULT),
    "mremap over a hole": (mremap(BASE, 8 * PAGE, 9 * PAGE, MREMAP_MAYMOVE), errno.EFAULT),
    "mremap no such flag": (mremap(BASE, PAGE, PAGE, 8), errno.EINVAL),
    "mremap fixed, may not move": (mremap(BASE, PAGE, PAGE, MREMAP_FIXED, FREE), errno.EINVAL),
    "mremap to an unaligned place": (mremap(BASE, PAGE, PAGE, MOVE, FREE + 1), errno.EINVAL),
    "mremap beyond the address space": (mremap(BASE, PAGE, PAGE, MOVE, TASK_SIZE), errno.EINVAL),
    "mremap onto itself": (mremap(BASE, 2 * PAGE, 2 * PAGE, MOVE, BASE + PAGE), errno.EINVAL),
    "mremap length near 2**64": (mremap(BASE, PAGE, MAX), errno.EINVAL),
    "mremap more than there is": (mremap(BASE, PAGE, TASK_SIZE + PAGE, MREMAP_MAYMOVE), errno.EINVAL),
    "mremap DONTUNMAP resizes": (
        mremap(BASE, PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP), errno.EINVAL,
    ),
    "mremap grows without room": (mremap(BASE, 4 * PAGE, 8 * PAGE), errno.ENOMEM),
    "mmap of nothing": (mmap(0, 0), errno.EINVAL),
    "mmap neither shared nor private": (mmap(0, PAGE, MAP_ANONYMOUS), errno.EINVAL),
    "mmap both": (mmap(0, PAGE, PRIVATE | MAP_SHARED), errno.EINVAL),
    "mmap length near 2**64": (mmap(0, MAX), errno.ENOMEM),
    "mmap more than there is": (mmap(0, 1 << 47), errno.ENOMEM),
    "mmap fixed, unaligned": (mmap(FREE + 1, PAGE, PRIVATE | MAP_FIXED), errno.EINVAL),
    "mmap fixed beyond": (mmap(TASK_SIZE, PAGE, PRIVATE | MAP_FIXED), errno.ENOMEM),
    "mmap fixed beyond, unaligned": (mmap(TASK_SIZE + 1, PAGE, PRIVATE | MAP_FIXED), errno.ENOMEM),
    "mmap where something is": (mmap(BASE, PAGE, PRIVATE | MAP_FIXED_NOREPLACE), errno.EEXIST),
    "mmap shared, of nothing": (mmap(0, PAGE, MAP_SHARED), errno.ENODEV),
    "move_pages to no node": (lambda p: move_pages(p, [BASE], [9]), errno.ENODEV),
    "move_pages to a negative node": (lambda p: move_pages(p, [BASE], [-1]), errno.ENODEV),
}


def machine() -> Process:
    host = make_host()
    process = host.create_process("p")
    for start, pages in ((BASE, 4), (BEHIND, 2)):
        host.sched.run_task("map", lambda start=start, pages=pages: do_mmap(
            process.mm, start, pages * PAGE, PROT_READ | PROT_WRITE, ANON | MAP_FIXED
        ))
        for page in range(pages):
            at = start + page * PAGE
            host.sched.run_task("write", lambda at=at: copy_to_user(process, at, at.to_bytes(8, "little")))
    host.sched.run_task("drain", host.lru.lru_add_drain_all)
    return process


@pytest.mark.parametrize("name", TABLE)
def test_bad_arguments_get_linuxs_errno_and_change_nothing(name: str) -> None:
    call, expected = TABLE[name]
    process = machine()
    host = process.host
    before = [(vma.start, vma.end, vma.flags) for vma in process.mm.vmas], list(process.mm.rss)
    if expected == OK:
        host.sched.run_task("call", lambda: call(process))
    else:
        with pytest.raises(KernelError) as refused:
            host.sched.run_task("call", lambda: call(process))
        assert refused.value.errno == expected, refused.value
        assert str(refused.value).startswith(f"{errno.errorcode[expected]}: ")
    after = [(vma.start, vma.end, vma.flags) for vma in process.mm.vmas], list(process.mm.rss)
    assert after == before
    for start, pages in ((BASE, 4), (BEHIND, 2)):
        for at in range(start, start + pages * PAGE, PAGE):
            got = host.sched.run_task("read", lambda at=at: copy_from_user(process, at, 8))
            assert int.from_bytes(got, "little") == at
    host.sched.run_task("drain", host.lru.lru_add_drain_all)
    audit(host)


def test_move_pages_tells_page_by_page_what_it_cannot_move() -> None:
    process = machine()
    pages = [BASE, HOLE, BASE + 1, TASK_SIZE, TOP, BASE + PAGE]
    status = process.host.sched.run_task("move", lambda: move_pages(process, pages, [1] * len(pages)))
    assert status == [1, -errno.EFAULT, 1, -errno.EFAULT, -errno.EFAULT, 1]


def test_mprotect_changes_what_lies_before_a_hole() -> None:
    process = machine()
    with pytest.raises(KernelError, match="ENOMEM"):
        process.host.sched.run_task("call", lambda: do_mprotect(process.mm, BASE, 8 * PAGE, PROT_READ))
    with pytest.raises(KernelError, match="EFAULT"):
        process.host.sched.run_task("write", lambda: copy_to_user(process, BASE, b"x"))
    process.host.sched.run_task("write", lambda: copy_to_user(process, BEHIND, b"x"))

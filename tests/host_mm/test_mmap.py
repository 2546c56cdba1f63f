"""Placing, merging and refusing mappings; page tables come and go (host_mm/mmap.py, vma.py, madvise.py)."""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError
from host_mm.madvise import (
    MADV_COLD,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MADV_WIPEONFORK,
    do_madvise,
)
from host_mm.mmap import (
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_LOCKED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    do_mmap,
    do_munmap,
)
from host_mm.mprotect import do_mprotect
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, make_host

BASE = 0x100000000000
M2 = 2 << 20


@pytest.fixture
def process() -> Process:
    return make_host().create_process("p")


def ranges(process: Process) -> list[tuple[int, int]]:
    return [((vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE) for vma in process.mm.vmas]


def fixed(process: Process, first: int, last: int, prot: int = RW) -> None:
    do_mmap(process.mm, BASE + first * PAGE, (last - first) * PAGE, prot, ANON | MAP_FIXED)


def test_whole_2m_mappings_are_aligned_and_others_pack_downwards(process: Process) -> None:
    first = do_mmap(process.mm, 0, PAGE, RW, ANON)
    assert first == 0x7FFFF7FFE000
    huge = do_mmap(process.mm, 0, 4 * M2, RW, ANON)
    assert huge % M2 == 0
    assert huge + 4 * M2 <= first
    assert do_mmap(process.mm, 0, PAGE, RW, ANON) == first - PAGE


def test_a_hint_is_taken_if_it_is_free(process: Process) -> None:
    assert do_mmap(process.mm, BASE + 5, PAGE, RW, ANON) == BASE
    assert do_mmap(process.mm, BASE, PAGE, RW, ANON) != BASE


def test_neighbours_with_the_same_rights_are_one_vma(process: Process) -> None:
    fixed(process, 0, 4)
    fixed(process, 8, 12)
    assert ranges(process) == [(0, 4), (8, 12)]
    fixed(process, 4, 8)
    assert ranges(process) == [(0, 12)]
    fixed(process, 12, 14, PROT_READ)
    assert ranges(process) == [(0, 12), (12, 14)]
    do_mprotect(process.mm, BASE + 12 * PAGE, 2 * PAGE, 3)
    assert ranges(process) == [(0, 14)]


def test_vmas_with_pages_of_their_own_do_not_merge(process: Process) -> None:
    fixed(process, 0, 4)
    fixed(process, 8, 12)
    for page in (0, 8):
        copy_to_user(process, BASE + page * PAGE, b"x")
    fixed(process, 4, 8)
    assert ranges(process) == [(0, 8), (8, 12)]


def test_fixed_replaces_what_was_there_and_noreplace_refuses(process: Process) -> None:
    fixed(process, 0, 8)
    copy_to_user(process, BASE, b"old" * 3000)
    fixed(process, 1, 2)
    assert copy_from_user(process, BASE, 3) == b"old"
    assert copy_from_user(process, BASE + PAGE, 3) == bytes(3)
    with pytest.raises(KernelError, match="EEXIST"):
        do_mmap(process.mm, BASE, PAGE, RW, ANON | MAP_FIXED_NOREPLACE)
    audit(process.host)


@pytest.mark.parametrize(
    ("addr", "length", "flags", "name"),
    [
        (0, 0, ANON, "EINVAL"), (0, PAGE, 0x20, "EINVAL"), (0, PAGE, MAP_SHARED | MAP_PRIVATE, "EINVAL"),
        (0, PAGE, MAP_SHARED, "ENODEV"), (BASE + 1, PAGE, ANON | MAP_FIXED, "EINVAL"),
        (1 << 47, PAGE, ANON | MAP_FIXED, "ENOMEM"), (0, 1 << 47, ANON, "ENOMEM"),
    ],
)
def test_impossible_mappings_are_refused(
    process: Process, addr: int, length: int, flags: int, name: str
) -> None:
    with pytest.raises(KernelError, match=name):
        do_mmap(process.mm, addr, length, RW, flags)
    assert process.mm.mmap_lock.owner is None


def test_page_tables_go_with_the_last_mapping_above_them(process: Process) -> None:
    mm = process.mm
    fixed(process, 0, 4)
    fixed(process, 600, 604)
    for page in (0, 600):
        copy_to_user(process, BASE + page * PAGE, b"x")
    assert mm.pgtables_bytes == 4 * PAGE
    do_munmap(mm, BASE, 4 * PAGE)
    assert mm.pgtables_bytes == 3 * PAGE
    do_munmap(mm, BASE + 600 * PAGE, 2 * PAGE)
    assert mm.pgtables_bytes == 3 * PAGE
    do_munmap(mm, BASE, 1 << 30)
    assert mm.pgtables_bytes == 0
    assert not mm.pte_locks
    audit(process.host)


def test_munmap_of_nothing_is_fine_and_of_nonsense_is_not(process: Process) -> None:
    do_munmap(process.mm, BASE, PAGE)
    for addr, length in ((BASE + 1, PAGE), (BASE, 0), ((1 << 47) - 2 * PAGE, 4 * PAGE)):
        with pytest.raises(KernelError, match="EINVAL"):
            do_munmap(process.mm, addr, length)


def test_a_huge_sparse_mapping_costs_what_is_touched(process: Process) -> None:
    do_mmap(process.mm, BASE, 1 << 40, RW, ANON | MAP_FIXED)
    for step in range(8):
        copy_to_user(process, BASE + (step << 36), b"far")
    child = fork_process(process)
    assert copy_from_user(child, BASE + (7 << 36), 3) == b"far"
    exit_process(child)
    do_munmap(process.mm, BASE, 1 << 40)
    assert process.mm.pgtables_bytes == 0
    audit(process.host)


def test_dontfork_and_wipeonfork_keep_pages_from_the_child(process: Process) -> None:
    fixed(process, 0, 3)
    for page in range(3):
        copy_to_user(process, BASE + page * PAGE, b"parent")
    do_madvise(process.mm, BASE, PAGE, MADV_DONTFORK)
    do_madvise(process.mm, BASE + PAGE, PAGE, MADV_WIPEONFORK)
    child = fork_process(process)
    with pytest.raises(KernelError, match="EFAULT"):
        copy_from_user(child, BASE, 1)
    assert copy_from_user(child, BASE + PAGE, 6) == bytes(6)
    assert copy_from_user(child, BASE + 2 * PAGE, 6) == b"parent"
    assert copy_from_user(process, BASE + PAGE, 6) == b"parent"
    exit_process(child)
    audit(process.host)


def test_madvise_does_what_it_can_and_reports_the_hole(process: Process) -> None:
    fixed(process, 0, 1)
    fixed(process, 2, 3)
    for page in (0, 2):
        copy_to_user(process, BASE + page * PAGE, b"x")
    with pytest.raises(KernelError, match="ENOMEM"):
        do_madvise(process.mm, BASE, 3 * PAGE, MADV_DONTNEED)
    assert copy_from_user(process, BASE + 2 * PAGE, 1) == b"\0"
    with pytest.raises(KernelError, match="EINVAL"):
        do_madvise(process.mm, BASE, PAGE, 99)
    with pytest.raises(KernelError, match="ENOMEM"):
        do_madvise(process.mm, BASE, 3 * PAGE, MADV_POPULATE_WRITE)
    do_mprotect(process.mm, BASE, PAGE, 1)
    with pytest.raises(KernelError, match="EINVAL"):
        do_madvise(process.mm, BASE, PAGE, MADV_POPULATE_WRITE)
    assert not process.mm.mmap_lock.readers


def test_a_freed_page_goes_without_a_copy_unless_it_was_written_again(process: Process) -> None:
    host = process.host
    fixed(process, 0, 2)
    for page in range(2):
        copy_to_user(process, BASE + page * PAGE, b"data")
    host.lru.lru_add_drain_all()
    do_madvise(process.mm, BASE, 2 * PAGE, MADV_FREE)
    host.lru.lru_add_drain_all()
    copy_to_user(process, BASE, b"more")
    for _ in range(3):
        host.sched.run_task("reclaim", lambda: host.reclaim(0, 0))
    assert copy_from_user(process, BASE, 4) == b"more"
    assert copy_from_user(process, BASE + PAGE, 4) == bytes(4)
    assert host.vmstat["pglazyfreed"] == 1


def test_lazy_freeing_refuses_locked_memory_like_dropping_it(process: Process) -> None:
    at = do_mmap(process.mm, 0, 4 * PAGE, RW, ANON | MAP_LOCKED)
    for advice in (MADV_DONTNEED, MADV_FREE, MADV_COLD, MADV_PAGEOUT):
        with pytest.raises(KernelError, match="locked"):
            do_madvise(process.mm, at, 4 * PAGE, advice)

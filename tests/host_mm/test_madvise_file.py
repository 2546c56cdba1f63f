"""madvise on mappings of files (host_mm/madvise_file.py)."""

from __future__ import annotations

from errno import EACCES, EINVAL

import pytest

from host_mm.fork import exit_process
from host_mm.kernel.errors import KernelError
from host_mm.madvise import (
    MADV_COLD,
    MADV_FREE,
    MADV_PAGEOUT,
    MADV_REMOVE,
    MADV_WILLNEED,
    do_madvise,
)
from host_mm.mlock import do_mlock
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, do_mmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_swapcache
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, RW, Recorder
from tests.host_mm.test_shmem import reclaim_rest


@pytest.mark.parametrize("disk", [None, b""])
def test_remove_punches_a_hole_at_the_place_in_the_file(disk: bytes | None) -> None:
    s = Shared(disk=disk)

    def use() -> None:
        copy_to_user(s.a, s.at, b"x" * 16 * PAGE)
        at = do_mmap(s.b.mm, 0, 4 * PAGE, RW, 1, file=s.file, pgoff=8)
        notifier = Recorder(s.at)
        mmu_notifier_register(notifier, s.a.mm)
        do_madvise(s.b.mm, at + PAGE, 2 * PAGE, MADV_REMOVE)
        assert notifier.take() == [("clear", 9 * PAGE, 11 * PAGE)]
        assert copy_from_user(s.a, s.at + 9 * PAGE - 1, 2) == b"x\0"
        assert copy_from_user(s.a, s.at + 11 * PAGE - 1, 2) == b"\0x"

    s.do(use)
    s.end()


def test_remove_wants_a_shared_writable_unlocked_mapping_of_a_file() -> None:
    s = Shared(kind=MAP_PRIVATE)
    anon = do_mmap(s.a.mm, 0, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS)
    do_mlock(s.a.mm, s.at, PAGE)
    for process, at, errno in ((s.b, s.bt, EACCES), (s.a, anon, EINVAL), (s.a, s.at, EINVAL)):
        with pytest.raises(KernelError) as refused:
            do_madvise(process.mm, at, PAGE, MADV_REMOVE)
        assert refused.value.errno == errno
    s.end()


def test_willneed_reads_shmem_from_swap_and_files_from_disk() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"swapped")
    exit_process(s.b)
    s.host.lru.lru_add_drain_all()
    s.do(lambda: do_madvise(s.a.mm, s.at, PAGE, MADV_PAGEOUT))
    s.quiet()
    reclaim_rest(s)
    entry = ~s.file.i_pages[0]
    assert s.host.swap is not None
    assert not s.host.swap.has_cache(entry)
    s.do(lambda: do_madvise(s.a.mm, s.at, PAGE, MADV_WILLNEED))
    s.quiet()
    pfn = s.host.swap.cache[entry] - 1
    assert s.host.pages.flags[pfn] & PG_swapcache
    assert s.file.i_pages[0] == ~entry, "only a fault takes it into the file"
    assert copy_from_user(s.a, s.at, 7) == b"swapped"
    s.end()
    disk = Shared(disk=b"x" * 16 * PAGE)
    disk.do(lambda: do_madvise(disk.a.mm, disk.at + 3 * PAGE, 2 * PAGE, MADV_WILLNEED))
    disk.quiet()
    assert sorted(disk.file.i_pages) == [3, 4]
    assert not disk.a.mm.mmap_lock.readers
    disk.end()


def test_lazy_freeing_is_for_anonymous_memory_and_cold_is_for_all() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    with pytest.raises(KernelError) as refused:
        do_madvise(s.a.mm, s.at, PAGE, MADV_FREE)
    assert refused.value.errno == EINVAL
    notifier = Recorder(s.at)
    mmu_notifier_register(notifier, s.a.mm)
    do_madvise(s.a.mm, s.at, PAGE, MADV_COLD)
    assert notifier.take() == []
    s.end()

"""Shared memory and its swap (host_mm/shmem.py)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm
from host_mm.filemap_cache import NOT_CACHED
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.mm_types import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES, MM_SWAPENTS
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_anon, PG_swapbacked, PG_swapcache
from host_mm.swapfile import SWAP_HAS_CACHE, SWAP_MAP_SHMEM
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from host_mm.vmscan import reclaim_pages
from tests.host_mm.files import Shared, frame
from tests.host_mm.machine import PAGE, RW, Recorder, make_host, run


def swap_out(s: Shared, pages: int = 1, first: int = 0) -> None:
    """What only `a` maps goes to swap, and its writes end."""
    s.host.lru.lru_add_drain_all()
    start = s.at + first * PAGE
    s.host.sched.run_task("pageout", lambda: do_madvise(s.a.mm, start, pages * PAGE, MADV_PAGEOUT))
    s.host.sched.run_task("drain", s.host.swap_device.drain)


def reclaim_rest(s: Shared) -> None:
    """Reclaim what is clean now."""
    s.host.lru.lru_add_drain_all()
    pages = [pfn for vec in s.host.lru.vecs for entries in vec.lists for pfn in entries]
    taken = [pfn for pfn in pages if s.host.lru.folio_isolate_lru(pfn)]
    s.host.sched.run_task("reclaim", lambda: reclaim_pages(s.host, taken))


def test_a_store_through_one_mapping_is_read_through_the_other() -> None:
    s = Shared()
    copy_to_user(s.a, s.at + 3 * PAGE, b"one")
    assert copy_from_user(s.b, s.bt + 3 * PAGE, 3) == b"one"
    assert frame(s.a, s.at + 3 * PAGE) == frame(s.b, s.bt + 3 * PAGE)
    assert (s.a.mm.rss[MM_SHMEMPAGES], s.a.mm.rss[MM_FILEPAGES], s.a.mm.rss[MM_ANONPAGES]) == (1, 0, 0)
    s.end()


def test_shared_anonymous_memory_lives_as_long_as_it_is_mapped() -> None:
    host = make_host()
    a = host.create_process("a")
    at = do_mmap(a.mm, 0, 4 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS)
    copy_to_user(a, at, b"parent")
    b = fork_process(a)
    copy_to_user(b, at, b"child!")
    assert copy_from_user(a, at, 6) == b"child!"
    assert not host.pages.flags[frame(a, at)] & PG_anon
    exit_process(a)
    assert copy_from_user(b, at, 6) == b"child!"
    do_munmap(b.mm, at, 4 * PAGE)
    assert not host.mappings, "the last mapping took the file along"
    exit_process(b)
    audit(host)


def test_beyond_the_end_of_the_file_is_a_bus_error() -> None:
    s = Shared(pages=2)
    at = do_mmap(s.a.mm, 0, 4 * PAGE, RW, MAP_SHARED, file=s.file, pgoff=0)
    copy_to_user(s.a, at + PAGE, b"x")
    with pytest.raises(KernelError, match="bus error"):
        copy_from_user(s.a, at + 2 * PAGE, 1)
    with pytest.raises(KernelError, match="bus error"):
        copy_to_user(s.a, at + 2 * PAGE, b"x")
    s.end()


def test_a_page_that_goes_to_swap_leaves_its_slot_in_the_file_and_nothing_in_page_tables() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"bytes")
    notifier = Recorder(s.at)
    mmu_notifier_register(notifier, s.a.mm)
    swap_out(s)
    assert notifier.take() == [("clear", 0, PAGE)]
    assert lookup_address_in_mm(s.a.mm, s.at)[0] == 0
    assert s.a.mm.rss == [0, 0, 0, 0], "the slot is the file's, not the process's"
    entry = ~s.file.i_pages[0]
    swap = s.host.swap
    assert swap is not None
    assert swap.swap_map[entry] & ~SWAP_HAS_CACHE == SWAP_MAP_SHMEM
    assert swap.swap_count(entry) == 1
    assert s.file.nrpages == s.host.vmstat["nr_shmem"] == 0
    audit(s.host)
    reclaim_rest(s)
    assert not swap.has_cache(entry)
    assert copy_from_user(s.b, s.bt, 5) == b"bytes"
    assert not swap.swap_map[entry]
    pfn = frame(s.b, s.bt)
    assert s.host.pages.flags[pfn] & (PG_swapbacked | PG_swapcache | PG_anon) == PG_swapbacked
    assert s.b.mm.rss[MM_SHMEMPAGES] == 1
    s.end()


def test_a_page_is_faulted_back_from_the_swap_cache_without_a_read() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"bytes")
    pfn = frame(s.a, s.at)
    swap_out(s)
    reads = s.host.vmstat["pswpin"]
    assert copy_from_user(s.a, s.at, 5) == b"bytes"
    assert frame(s.a, s.at) == pfn
    assert s.host.vmstat["pswpin"] == reads
    s.end()


def test_a_private_copy_of_a_shmem_page_swaps_for_itself() -> None:
    s = Shared(kind=MAP_PRIVATE)
    copy_to_user(s.a, s.at, b"file")
    copy_to_user(s.b, s.bt, b"mine")
    s.host.lru.lru_add_drain_all()
    for mm, at in ((s.a.mm, s.at), (s.b.mm, s.bt)):
        s.host.sched.run_task("pageout", lambda mm=mm, at=at: do_madvise(mm, at, PAGE, MADV_PAGEOUT))
    s.host.sched.run_task("drain", s.host.swap_device.drain)
    assert (s.b.mm.rss[MM_SWAPENTS], s.a.mm.rss[MM_SWAPENTS]) == (1, 0)
    audit(s.host)
    reclaim_rest(s)
    assert copy_from_user(s.b, s.bt, 4) == b"mine"
    assert copy_from_user(s.a, s.at, 4) == b"file"
    s.end()


def test_slots_of_a_file_that_ends_are_free() -> None:
    s = Shared()
    for page in range(8):
        copy_to_user(s.a, s.at + page * PAGE, bytes([page + 1]))
    swap_out(s, 8)
    assert s.host.swap is not None
    assert s.host.swap.inuse_pages == 8
    s.end()
    assert s.host.swap.inuse_pages == 0


def test_without_swap_nothing_of_a_shmem_file_goes() -> None:
    s = Shared(swap=None)
    copy_to_user(s.a, s.at, b"bytes")
    notifier = Recorder(s.at)
    mmu_notifier_register(notifier, s.a.mm)
    swap_out(s)
    assert copy_from_user(s.a, s.at, 5) == b"bytes"
    assert s.file.nrpages == 1
    s.end()


def test_a_hole_that_was_only_read_goes_as_clean_and_one_with_bytes_may_not() -> None:
    s = Shared()
    copy_from_user(s.a, s.at, 1)
    pfn = frame(s.a, s.at)
    swap_out(s)
    assert s.file.i_pages.get(0, NOT_CACHED) == NOT_CACHED
    copy_from_user(s.a, s.at, 1)
    pfn = frame(s.a, s.at)
    s.host.ram.write(pfn << 12, b"unnoticed")
    with pytest.raises(BrokenTruth, match="dirty-dropped"):
        swap_out(s)


@pytest.mark.parametrize("seed", range(20))
def test_stores_swap_and_fork_race_without_a_wrong_byte(seed: int) -> None:
    s = Shared(pages=8)
    s.host.sched.set_strategy(RandomStrategy(seed, 2))
    s.host.sched.lockdep = {}
    wrong: Counter[str] = Counter()

    def user(process: Any, at: int, offset: int) -> None:
        for turn in range(16):
            where = at + turn * 5 % 8 * PAGE + offset
            copy_to_user(process, where, b"%4d" % turn)
            if copy_from_user(process, where, 4) != b"%4d" % turn:
                wrong[process.name] += 1

    def reclaimer() -> None:
        for turn in range(8):
            do_madvise(s.a.mm, s.at, 8 * PAGE, MADV_PAGEOUT)
            s.host.sched.sleep(20_000 * (turn % 3))

    def forker() -> None:
        for _ in range(3):
            child = fork_process(s.b)
            copy_from_user(child, s.bt, 8)
            exit_process(child)

    run(s.host, lambda: user(s.a, s.at, 0), lambda: user(s.b, s.bt, 8), reclaimer, forker)
    s.host.sched.set_strategy(None)
    s.host.sched.run_task("drain", s.host.swap_device.drain)
    assert not wrong
    s.end()

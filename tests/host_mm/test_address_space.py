"""Files and the VMAs that map them (host_mm/address_space.py)."""

from __future__ import annotations

from errno import ENODEV, EOVERFLOW
from typing import Any

import pytest

from host_mm.address_space import AddressSpace, fput
from host_mm.arch.x86.pgtable import lookup_address_in_mm
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.madvise import MADV_DONTFORK, do_madvise
from host_mm.memfd import memfd_create
from host_mm.mm_types import MM_SHMEMPAGES
from host_mm.mmap import MAP_PRIVATE, MAP_SHARED, PROT_READ, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.process import Process
from host_mm.rmap import folio_referenced, rmap_walk
from host_mm.rmap_unmap import remove_migration_ptes, try_to_migrate, try_to_unmap
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import THERE, Shared, frame
from tests.host_mm.machine import PAGE, RW, Recorder, make_host, run


def test_a_child_shares_shared_pages_and_copies_private_ones() -> None:
    s = Shared(kind=MAP_PRIVATE)
    copy_to_user(s.a, s.at, b"file")
    copy_from_user(s.b, s.bt, 1)
    copy_to_user(s.b, s.bt + PAGE, b"mine")
    one, two = fork_process(s.a), fork_process(s.b)
    assert one.mm.rss == [0, 0, 0, 0], "a mapping without private pages needs no copy at fork"
    copy_to_user(one, s.at, b"one's")
    assert copy_from_user(s.a, s.at, 5) == b"one's"
    assert copy_from_user(two, s.bt, 5) == b"one's"
    copy_to_user(two, s.bt + PAGE, b"two's")
    assert copy_from_user(s.b, s.bt + PAGE, 4) == b"mine"
    assert [vma.mm for vma in s.file.i_mmap] == [s.a.mm, one.mm, s.b.mm, two.mm]
    s.end()


def test_every_way_a_vma_can_change_keeps_it_linked_to_its_file() -> None:
    s = Shared(pages=64)
    for page in range(64):
        copy_to_user(s.a, s.at + page * PAGE, bytes([page]))
    do_mprotect(s.a.mm, s.at + 8 * PAGE, 8 * PAGE, PROT_READ)
    assert len(s.file.i_mmap) == 4
    audit(s.host)
    do_mprotect(s.a.mm, s.at + 8 * PAGE, 8 * PAGE, RW)
    assert len(s.file.i_mmap) == 2, "and merged again"
    do_munmap(s.a.mm, s.at + 16 * PAGE, 4 * PAGE)
    do_madvise(s.a.mm, s.at + 32 * PAGE, 4 * PAGE, MADV_DONTFORK)
    moved = do_mremap(s.a.mm, s.at + 40 * PAGE, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, THERE)
    audit(s.host)
    assert copy_from_user(s.a, moved + PAGE, 1) == bytes([41])
    for page in (0, 15, 20, 33, 39, 44, 63):
        assert copy_from_user(s.a, s.at + page * PAGE, 1) == bytes([page])
    assert s.file.i_mmap_writable == len(s.file.i_mmap)
    child = fork_process(s.a)
    audit(s.host)
    exit_process(child)
    s.end()


def test_a_files_page_is_found_in_all_its_mappings_by_pgoff() -> None:
    s = Shared()
    copy_to_user(s.a, s.at + 5 * PAGE, b"x")
    copy_from_user(s.b, s.bt + 5 * PAGE, 1)
    again = do_mmap(s.b.mm, 0, 4 * PAGE, RW, MAP_SHARED, file=s.file, pgoff=4)
    copy_from_user(s.b, again + PAGE, 1)
    pfn = frame(s.a, s.at + 5 * PAGE)
    found: list[tuple[Process, int]] = []

    def one(vma: Any, address: int) -> bool:
        found.append((vma.mm.process, address))
        return True

    rmap_walk(s.host, pfn, one)
    assert found == [(s.a, s.at + 5 * PAGE), (s.b, s.bt + 5 * PAGE), (s.b, again + PAGE)]
    assert s.host.pages.mapcount[pfn] == 3
    assert folio_referenced(s.host, pfn)[0] == 3
    assert folio_referenced(s.host, pfn)[0] == 0
    s.end()


def test_unmapping_leaves_nothing_behind_and_migration_entries_come_back() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"x")
    copy_from_user(s.b, s.bt, 1)
    pfn = frame(s.a, s.at)
    folio_lock(s.host, pfn)
    assert try_to_migrate(s.host, pfn)
    assert s.a.mm.rss[MM_SHMEMPAGES] == 1, "a page on its way is still counted"
    remove_migration_ptes(s.host, pfn, pfn)
    assert frame(s.a, s.at) == frame(s.b, s.bt) == pfn
    assert try_to_unmap(s.host, pfn)
    folio_unlock(s.host, pfn)
    assert lookup_address_in_mm(s.a.mm, s.at)[0] == lookup_address_in_mm(s.b.mm, s.bt)[0] == 0
    assert s.a.mm.rss == s.b.mm.rss == [0, 0, 0, 0]
    audit(s.host)
    assert copy_from_user(s.b, s.bt, 1) == b"x"
    s.end()


def test_mmap_refuses_what_no_file_backs() -> None:
    s = Shared()
    with pytest.raises(KernelError) as refused:
        do_mmap(s.a.mm, 0, PAGE, RW, MAP_SHARED)
    assert refused.value.errno == ENODEV
    with pytest.raises(KernelError) as refused:
        do_mmap(s.a.mm, 0, PAGE, RW, MAP_SHARED, file=s.file, pgoff=1 << 51)
    assert refused.value.errno == EOVERFLOW
    s.end()


def test_registering_a_notifier_waits_for_walks_of_the_files_mappings() -> None:
    s = Shared()
    order: list[str] = []

    def walker() -> None:
        s.file.i_mmap_rwsem.read_lock()
        s.host.sched.sleep(10_000)
        order.append("walked")
        s.file.i_mmap_rwsem.read_unlock()

    def register() -> None:
        s.host.sched.sleep(1000)
        mmu_notifier_register(Recorder(), s.a.mm)
        order.append("registered")

    run(s.host, walker, register)
    assert order == ["walked", "registered"]
    s.end()


def test_closing_twice_is_a_bug() -> None:
    host = make_host()
    file: AddressSpace = memfd_create(host, "x", PAGE)
    fput(file)
    with pytest.raises(BrokenTruth, match="file-count"):
        fput(file)

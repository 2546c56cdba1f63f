"""Faults on files, and taking a file out of every process (host_mm/memory_file.py)."""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.sched import RandomStrategy
from host_mm.ksm import scan_until_quiet
from host_mm.madvise import MADV_DONTNEED, MADV_MERGEABLE, do_madvise
from host_mm.memory_file import unmap_mapping_pages
from host_mm.mm_types import MM_ANONPAGES, MM_SHMEMPAGES
from host_mm.mmap import MAP_PRIVATE
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_anon, PG_ksm
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared, frame
from tests.host_mm.machine import PAGE, Recorder, run


def test_a_private_mapping_reads_the_file_and_keeps_what_it_writes() -> None:
    s = Shared(kind=MAP_PRIVATE)
    notifier = Recorder(s.bt)
    mmu_notifier_register(notifier, s.b.mm)
    copy_to_user(s.a, s.at, b"file")
    assert copy_from_user(s.b, s.bt, 4) == b"file"
    copy_to_user(s.b, s.bt, b"mine")
    assert notifier.take() == [("clear", 0, PAGE)], "a page of the file was mapped: its copy is bracketed"
    copy_to_user(s.b, s.bt + PAGE, b"mine")
    assert notifier.take() == [], "nothing was mapped: do_cow_fault tells nobody"
    assert copy_from_user(s.a, s.at, 4) == b"file"
    copy_to_user(s.a, s.at, b"FILE")
    assert copy_from_user(s.b, s.bt, 4) == b"mine"
    assert (s.b.mm.rss[MM_SHMEMPAGES], s.b.mm.rss[MM_ANONPAGES]) == (0, 2)
    do_madvise(s.b.mm, s.bt, PAGE, MADV_DONTNEED)
    assert copy_from_user(s.b, s.bt, 4) == b"FILE", "DONTNEED gives the file's bytes back"
    s.end()


@pytest.mark.parametrize("even_cows", [False, True])
def test_unmapping_a_files_pages_takes_copies_only_when_asked(even_cows: bool) -> None:
    s = Shared(kind=MAP_PRIVATE)
    for page in range(4):
        copy_to_user(s.a, s.at + page * PAGE, b"file")
        copy_from_user(s.b, s.bt + page * PAGE, 1)
    copy_to_user(s.b, s.bt + PAGE, b"mine")
    copy_to_user(s.b, s.bt + 9 * PAGE, b"mine")
    a, b = Recorder(s.at), Recorder(s.bt)
    mmu_notifier_register(a, s.a.mm)
    mmu_notifier_register(b, s.b.mm)
    unmap_mapping_pages(s.file, 1, 2, even_cows=even_cows)
    assert a.take() == b.take() == [("clear", PAGE, 3 * PAGE)]
    assert (s.b.mm.rss[MM_SHMEMPAGES], s.b.mm.rss[MM_ANONPAGES]) == (2, 1 if even_cows else 2)
    assert copy_from_user(s.b, s.bt + PAGE, 4) == (b"file" if even_cows else b"mine")
    unmap_mapping_pages(s.file, 8, 0, even_cows=even_cows)
    assert a.take() == b.take() == [("clear", 8 * PAGE, 16 * PAGE)]
    assert copy_from_user(s.b, s.bt + 9 * PAGE, 4) == (bytes(4) if even_cows else b"mine")
    s.end()


@pytest.mark.parametrize("seed", range(20))
def test_faults_unmapping_and_fork_race_without_a_wrong_byte_or_count(seed: int) -> None:
    s = Shared(pages=8, kind=MAP_PRIVATE)
    s.host.sched.set_strategy(RandomStrategy(seed, 2))
    s.host.sched.lockdep = {}

    def writer() -> None:
        for turn in range(12):
            page = turn * 5 % 8
            copy_to_user(s.a, s.at + page * PAGE, b"file%2d" % turn)
            assert copy_from_user(s.a, s.at + page * PAGE, 6) == b"file%2d" % turn

    def private() -> None:
        for turn in range(12):
            page = turn * 3 % 8
            copy_from_user(s.b, s.bt + page * PAGE, 1)
            copy_to_user(s.b, s.bt + page * PAGE + 8, b"mine%2d" % turn)
            assert copy_from_user(s.b, s.bt + page * PAGE + 8, 6) == b"mine%2d" % turn

    def unmapper() -> None:
        for turn in range(8):
            unmap_mapping_pages(s.file, turn, 3, even_cows=False)

    def forker() -> None:
        for _ in range(3):
            exit_process(fork_process(s.b))

    run(s.host, writer, private, unmapper, forker)
    s.host.sched.set_strategy(None)
    s.end()


def test_private_pages_of_a_file_are_merged_by_ksm_and_parted_again() -> None:
    s = Shared(kind=MAP_PRIVATE)
    for page in (1, 2):
        copy_to_user(s.b, s.bt + page * PAGE, b"same" * 1024)
    copy_to_user(s.a, s.at + 3 * PAGE, b"same" * 1024)
    copy_from_user(s.b, s.bt + 3 * PAGE, 1)
    do_madvise(s.b.mm, s.bt, 16 * PAGE, MADV_MERGEABLE)
    s.do(lambda: scan_until_quiet(s.host))
    pfn = frame(s.b, s.bt + PAGE)
    assert s.host.pages.flags[pfn] & PG_ksm
    assert frame(s.b, s.bt + 2 * PAGE) == pfn
    assert not s.host.pages.flags[frame(s.b, s.bt + 3 * PAGE)] & PG_anon, "a page of the file itself is not"
    copy_to_user(s.b, s.bt + 2 * PAGE, b"mine")
    assert copy_from_user(s.b, s.bt + PAGE, 4) == b"same"
    s.end()

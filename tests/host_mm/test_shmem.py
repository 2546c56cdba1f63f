"""Shared memory (host_mm/shmem.py)."""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES
from host_mm.mmap import MAP_ANONYMOUS, MAP_SHARED, do_mmap, do_munmap
from host_mm.page import PG_anon
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared, frame
from tests.host_mm.machine import PAGE, RW, make_host


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

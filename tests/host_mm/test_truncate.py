"""Taking pages out of files (host_mm/truncate.py)."""

from __future__ import annotations

from host_mm.filemap import folio_lock, folio_unlock
from host_mm.filemap_cache import END_OF_FILE
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.page import PG_locked, get_page, put_page
from host_mm.truncate import find_lock_entries, invalidate_mapping_pages, truncate_inode_pages_range
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE


def test_only_what_is_clean_unmapped_and_unused_is_dropped() -> None:
    s = Shared(disk=b"x" * 16 * PAGE)
    s.do(lambda: copy_from_user(s.a, s.at, 16 * PAGE))
    s.do(lambda: copy_to_user(s.a, s.at + 3 * PAGE, b"dirty"))
    s.do(lambda: do_madvise(s.a.mm, s.at, 14 * PAGE, MADV_DONTNEED))
    s.quiet()
    held = s.file.i_pages[5]
    get_page(s.host, held)
    assert invalidate_mapping_pages(s.file, 0, END_OF_FILE) == 12
    assert sorted(s.file.i_pages) == [3, 5, 14, 15]
    put_page(s.host, held)
    s.end()


def test_the_first_pass_leaves_locked_pages_and_the_second_waits_for_them() -> None:
    s = Shared()
    for page in range(4):
        copy_to_user(s.a, s.at + page * PAGE, b"x")
    busy = s.file.i_pages[2]
    folio_lock(s.host, busy)
    found = find_lock_entries(s.file, 0, END_OF_FILE)
    assert [index for index, _ in found] == [0, 1, 3]
    for _, head in found:
        assert s.host.pages.flags[head] & PG_locked
        folio_unlock(s.host, head)
        put_page(s.host, head)
    order: list[str] = []

    def truncater() -> None:
        truncate_inode_pages_range(s.file, 0, -1)
        order.append("truncated")

    def owner() -> None:
        s.host.sched.sleep(1000)
        assert list(s.file.i_pages) == [2]
        order.append("unlocked")
        folio_unlock(s.host, busy)

    s.do(truncater, owner)
    assert order == ["unlocked", "truncated"]
    assert not s.file.i_pages
    assert s.a.mm.rss == [0, 0, 0, 0], "what was mapped was unmapped folio by folio"
    s.end()


def test_partial_pages_are_zeroed_and_stay() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"x" * 3 * PAGE)
    truncate_inode_pages_range(s.file, 10, 2 * PAGE + 9)
    assert sorted(s.file.i_pages) == [0, 2]
    assert copy_from_user(s.a, s.at + 8, 4) == b"xx\0\0"
    assert copy_from_user(s.a, s.at + 2 * PAGE + 8, 4) == b"\0\0xx"
    s.end()

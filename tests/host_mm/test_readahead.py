"""Reading before it is asked for (host_mm/readahead.py)."""

from __future__ import annotations

import pytest

from host_mm.madvise import MADV_RANDOM, MADV_SEQUENTIAL, do_madvise
from host_mm.uaccess import copy_from_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE


@pytest.mark.parametrize(("advice", "first", "last"), [
    (None, 34, 65), (MADV_SEQUENTIAL, 50, 81), (MADV_RANDOM, 50, 50),
])
def test_a_miss_reads_the_window_that_the_advice_asks_for(advice: int | None, first: int, last: int) -> None:
    s = Shared(disk=b"x" * 100 * PAGE, pages=100)
    if advice is not None:
        do_madvise(s.a.mm, s.at, 100 * PAGE, advice)
    s.do(lambda: copy_from_user(s.a, s.at + 50 * PAGE, 1))
    s.quiet()
    assert sorted(s.file.i_pages) == list(range(first, last + 1))
    s.end()


def test_the_window_ends_with_the_file_and_skips_what_is_there() -> None:
    s = Shared(disk=b"x" * 20 * PAGE, pages=20)
    s.do(lambda: copy_from_user(s.a, s.at + 19 * PAGE, 1))
    s.quiet()
    assert sorted(s.file.i_pages) == list(range(3, 20))
    reads = s.host.vmstat["pgpgin"]
    s.do(lambda: copy_from_user(s.b, s.bt, 1))
    s.quiet()
    assert s.host.vmstat["pgpgin"] - reads == 3 * 4
    s.end()


def test_without_a_window_only_the_page_is_read() -> None:
    s = Shared(disk=b"x" * 20 * PAGE, pages=20, params={"mm.read_ahead_kb": "0"})
    s.do(lambda: copy_from_user(s.a, s.at + 7 * PAGE, 1))
    assert list(s.file.i_pages) == [7]
    s.end()

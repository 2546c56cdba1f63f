"""What an audit finds of files (host_mm/truths_files.py)."""

from __future__ import annotations

import os

import pytest

from host_mm.address_space import fput
from host_mm.arch.x86.pgtable import _PAGE_RW
from host_mm.kernel.errors import BrokenTruth
from host_mm.memfd import memfd_create
from host_mm.page import PG_dirty
from host_mm.pgtable_generic import pmd_offset, pte_offset_map, set_pte
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared, frame
from tests.host_mm.machine import PAGE, make_host


def test_a_page_and_a_mapping_that_do_not_belong_are_found() -> None:
    s = Shared()
    copy_to_user(s.a, s.at, b"x")
    s.file.i_pages[7] = s.file.i_pages[0]
    with pytest.raises(BrokenTruth, match="page-cache"):
        audit(s.host)
    del s.file.i_pages[7]
    lost = s.file.i_mmap.pop()
    with pytest.raises(BrokenTruth, match="i-mmap"):
        audit(s.host)
    s.file.i_mmap.append(lost)
    s.end()


def test_a_file_that_should_have_been_evicted_is_found() -> None:
    host = make_host()
    file = memfd_create(host, "x", PAGE)
    file.f_count = 0
    with pytest.raises(BrokenTruth, match="page-cache"):
        audit(host)
    file.f_count = 1
    fput(file)
    audit(host)


def test_a_dirty_mark_that_lies_is_found() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    s.host.pages.flags[frame(s.a, s.at)] |= PG_dirty
    with pytest.raises(BrokenTruth, match="file-dirty"):
        audit(s.host)
    s.host.pages.flags[frame(s.a, s.at)] &= ~PG_dirty
    s.end()


def test_a_clean_page_that_is_writable_is_found() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    s.quiet()
    mm = s.a.mm
    pte = pte_offset_map(mm, pmd_offset(mm, s.at), s.at)
    entry = s.host.ram.u64[pte >> 3]
    set_pte(mm, s.at, pte, entry | _PAGE_RW)
    with pytest.raises(BrokenTruth, match="file-dirty"):
        audit(s.host)
    set_pte(mm, s.at, pte, entry)
    s.end()


def test_a_clean_page_with_other_bytes_than_the_file_is_found() -> None:
    s = Shared(disk=b"disk")
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    s.quiet()
    os.pwrite(s.file.private_data, b"DISK", 0)
    with pytest.raises(BrokenTruth, match="dirty-dropped"):
        audit(s.host)
    os.pwrite(s.file.private_data, b"disk", 0)
    s.end()

"""Finding a file's page for a fault, and what is mapped around it (host_mm/filemap_fault.py)."""

from __future__ import annotations

from errno import EAGAIN

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_present
from host_mm.gup import FOLL_NOWAIT, get_user_pages_unlocked
from host_mm.kernel.costs import COST_SWAP_READ
from host_mm.kernel.errors import KernelError
from host_mm.madvise import MADV_RANDOM, do_madvise
from host_mm.mm_types import MM_FILEPAGES
from host_mm.mmap import do_munmap
from host_mm.page import put_page
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE


def mapped(s: Shared, process_at: int, pages: int) -> list[int]:
    return [
        page for page in range(pages)
        if pte_present(lookup_address_in_mm(s.a.mm, process_at + page * PAGE)[0])
    ]


def test_a_read_maps_what_is_cached_in_the_aligned_64_kib_around_it() -> None:
    s = Shared(disk=b"x" * 40 * PAGE, pages=40)
    s.do(lambda: copy_from_user(s.b, s.bt, 40 * PAGE))
    s.do(lambda: copy_from_user(s.a, s.at + 20 * PAGE, 1))
    first = (s.at + 20 * PAGE >> 16 << 16) - s.at >> 12
    assert mapped(s, s.at, 40) == list(range(first, first + 16))
    assert s.a.mm.rss[MM_FILEPAGES] == 16
    s.end()


def test_what_is_mapped_around_ends_with_the_file_the_mapping_and_pages_that_are_not_ready() -> None:
    s = Shared(disk=b"x" * 10 * PAGE, pages=10)
    s.do(lambda: copy_from_user(s.b, s.bt, 10 * PAGE))
    s.do(lambda: do_munmap(s.a.mm, s.at + 6 * PAGE, PAGE))
    s.do(lambda: s.file.a_ops.set_size(s.file, 9 * PAGE))
    s.do(lambda: copy_from_user(s.a, s.at + 7 * PAGE, 1))
    assert mapped(s, s.at, 10) == [7, 8]
    s.end()


def test_the_knob_turns_it_off() -> None:
    s = Shared(disk=b"x" * 16 * PAGE, params={"mm.fault_around_bytes": "4096"})
    s.do(lambda: copy_from_user(s.a, s.at + 3 * PAGE, 1))
    assert mapped(s, s.at, 16) == [3]
    s.end()


@pytest.mark.parametrize(
    ("size", "pages"), [("0", [3]), ("8191", [3]), ("12288", [2, 3]), ("20000", [0, 1, 2, 3])]
)
def test_the_knob_is_rounded_down_to_a_power_of_two(size: str, pages: list[int]) -> None:
    s = Shared(disk=b"x" * 16 * PAGE, params={"mm.fault_around_bytes": size})
    s.do(lambda: copy_from_user(s.b, s.bt, 16 * PAGE))
    s.do(lambda: copy_from_user(s.a, s.at + 3 * PAGE, 1))
    assert mapped(s, s.at, 16) == pages
    s.end()


def test_a_write_maps_its_page_alone() -> None:
    s = Shared(disk=b"x" * 16 * PAGE)
    s.do(lambda: copy_to_user(s.a, s.at + 3 * PAGE, b"y"))
    assert mapped(s, s.at, 16) == [3]
    s.end()


def test_who_may_not_wait_for_the_read_is_told_to_come_again() -> None:
    s = Shared(disk=b"disk")
    answers: list[int] = []

    def impatient() -> None:
        answers.append(get_user_pages_unlocked(s.a.mm, s.at, FOLL_NOWAIT))
        assert not s.host.sched.current.held
        s.host.sched.sleep(2 * COST_SWAP_READ)
        pfn = get_user_pages_unlocked(s.a.mm, s.at, FOLL_NOWAIT)
        assert s.host.ram.read(pfn << 12, 4) == b"disk"
        put_page(s.host, pfn)

    s.do(impatient)
    assert answers == [-EAGAIN]
    s.end()


def test_who_may_not_wait_gets_a_page_of_a_hole_at_once_and_nothing_around_it() -> None:
    s = Shared(disk=b"x" * 4 * PAGE)
    reads = s.host.vmstat["pgpgin"]
    s.do(lambda: put_page(s.host, get_user_pages_unlocked(s.a.mm, s.at + 9 * PAGE, FOLL_NOWAIT)))
    assert mapped(s, s.at, 16) == [9]
    s.do(s.host.file_device.drain)
    assert s.host.vmstat["pgpgin"] == reads + 4 * 4, "what was read around it, but for the hole"
    s.end()


def test_a_fault_that_waits_for_io_lets_mmap_and_munmap_go_on() -> None:
    s = Shared(disk=b"disk")
    order: list[str] = []

    def reader() -> None:
        copy_from_user(s.a, s.at, 4)
        order.append("read")

    def unmapper() -> None:
        s.host.sched.sleep(1000)
        do_munmap(s.a.mm, s.at + 4 * PAGE, PAGE)
        order.append("unmapped")

    s.do(reader, unmapper)
    assert order == ["unmapped", "read"]
    s.end()


def test_a_mapping_that_goes_while_its_fault_waits_is_no_mapping_any_more() -> None:
    s = Shared(disk=b"disk")

    def reader() -> None:
        with pytest.raises(KernelError, match="no mapping"):
            copy_from_user(s.a, s.at, 4)

    def unmapper() -> None:
        s.host.sched.sleep(1000)
        do_munmap(s.a.mm, s.at, 16 * PAGE)

    s.do(reader, unmapper)
    s.end()


def test_truncation_waits_for_the_read_that_is_under_way() -> None:
    s = Shared(disk=b"disk" * 4096 * 4)
    s.do(lambda: do_madvise(s.a.mm, s.at, 16 * PAGE, MADV_RANDOM))
    order: list[str] = []

    def reader() -> None:
        assert copy_from_user(s.a, s.at + 2 * PAGE, 4) == b"disk"
        order.append("read")

    def cutter() -> None:
        s.host.sched.sleep(1000)
        s.file.a_ops.set_size(s.file, 2 * PAGE)
        order.append("cut")

    s.do(reader, cutter)
    assert order == ["read", "cut"]
    with pytest.raises(KernelError, match="bus error"):
        copy_from_user(s.a, s.at + 2 * PAGE, 1)
    s.end()

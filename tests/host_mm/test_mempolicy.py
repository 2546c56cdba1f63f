"""mbind and migrate_pages place pages and split VMAs (host_mm/mempolicy.py)."""

from __future__ import annotations

from errno import EFAULT, EINVAL, EIO

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.gup import FOLL_WRITE, get_user_pages_unlocked
from host_mm.host import HostMm
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import Scheduler
from host_mm.mempolicy import (
    MPOL_BIND,
    MPOL_DEFAULT,
    MPOL_MF_MOVE,
    MPOL_MF_STRICT,
    MPOL_PREFERRED,
    do_mbind,
    do_migrate_pages,
)
from host_mm.mmap import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import put_page
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from trace_events.stream import TraceStream

PAGE = 4096
BASE = 0x10000000


def make(pages: int = 8, written: int = 8) -> tuple[HostMm, Process]:
    stream = TraceStream()
    host = HostMm(Scheduler(stream), stream, ram_bytes=512 * PAGE, swap_bytes=64 * PAGE, checks=True)
    process = host.create_process("p")
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    do_mmap(process.mm, BASE, pages * PAGE, PROT_READ | PROT_WRITE, flags)
    for page in range(written):
        copy_to_user(process, BASE + page * PAGE, f"page {page}".encode())
    return host, process


def node(process: Process, page: int) -> int:
    return process.host.allocator.nid_of(pte_pfn(lookup_address_in_mm(process.mm, BASE + page * PAGE)[0]))


def test_new_pages_come_from_the_policy_s_node() -> None:
    _, process = make(written=0)
    do_mbind(process, BASE, 4 * PAGE, MPOL_PREFERRED, 1)
    for page in range(8):
        copy_to_user(process, BASE + page * PAGE, b"x")
    assert [node(process, page) for page in range(8)] == [1] * 4 + [0] * 4


def test_bind_with_move_brings_old_pages_along_and_splits_the_vma() -> None:
    host, process = make()
    do_mbind(process, BASE + 2 * PAGE, 3 * PAGE, MPOL_BIND, 1, MPOL_MF_MOVE)
    assert [node(process, page) for page in range(8)] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert len(process.mm.vmas) == 3
    for page in range(8):
        assert copy_from_user(process, BASE + page * PAGE, 6) == f"page {page}".encode()
    audit(host)


def test_a_split_inside_an_aligned_2m_brackets_it_before_the_pages_move() -> None:
    host, process = make(pages=1024)
    ranges: list[tuple[int, int]] = []

    class Recorder(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            ranges.append((range_.start, range_.end))
            return 0

    mmu_notifier_register(Recorder(), process.mm)
    host.sched.run_task("mbind", lambda: do_mbind(process, BASE, PAGE, MPOL_BIND, 1, MPOL_MF_MOVE))
    assert ranges == [(BASE, BASE + (2 << 20)), (BASE, BASE + PAGE)]


def test_a_hole_is_refused_and_strict_tells_of_pages_that_stayed() -> None:
    host, process = make()
    with pytest.raises(KernelError) as caught:
        do_mbind(process, BASE, 9 * PAGE, MPOL_BIND, 1)
    assert caught.value.errno == EFAULT
    pfn = get_user_pages_unlocked(process.mm, BASE, FOLL_WRITE)
    with pytest.raises(KernelError) as caught:
        do_mbind(process, BASE, PAGE, MPOL_BIND, 1, MPOL_MF_MOVE | MPOL_MF_STRICT)
    assert caught.value.errno == EIO
    put_page(host, pfn)
    do_mbind(process, BASE, PAGE, MPOL_DEFAULT, 0)
    audit(host)


def test_strict_without_move_refuses_and_changes_nothing() -> None:
    host, process = make()
    policies = [vma.policy for vma in process.mm.vmas]
    with pytest.raises(KernelError) as caught:
        do_mbind(process, BASE, PAGE, MPOL_BIND, 1, MPOL_MF_STRICT)
    assert caught.value.errno == EIO
    assert [vma.policy for vma in process.mm.vmas] == policies
    do_mbind(process, BASE, PAGE, MPOL_BIND, 0, MPOL_MF_STRICT)
    assert len(process.mm.vmas) == len(policies) + 1
    audit(host)


def test_bad_arguments_are_einval() -> None:
    _, process = make()
    for start, length, mode, node_, flags in (
        (BASE + 1, PAGE, MPOL_BIND, 0, 0), (BASE, -PAGE, MPOL_BIND, 0, 0), (BASE, PAGE, 9, 0, 0),
        (BASE, PAGE, MPOL_BIND, 7, 0), (BASE, PAGE, MPOL_BIND, 0, 8),
    ):
        with pytest.raises(KernelError) as caught:
            do_mbind(process, start, length, mode, node_, flags)
        assert caught.value.errno == EINVAL
    with pytest.raises(KernelError) as caught:
        do_migrate_pages(process, 0, 7)
    assert caught.value.errno == EINVAL


def test_migrate_pages_empties_a_node_of_the_process() -> None:
    host, process = make()
    assert do_migrate_pages(process, 0, 1) == 0
    assert {node(process, page) for page in range(8)} == {1}
    audit(host)

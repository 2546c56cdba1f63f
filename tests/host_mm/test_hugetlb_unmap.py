"""Unmapping and protecting huge pages: order, brackets, promises, and what cannot be cut."""

from __future__ import annotations

from errno import EINVAL
from typing import Any

import pytest

from host_mm.arch.x86.pgtable import pmd_pfn, pte_write
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError
from host_mm.madvise import (
    MADV_COLD,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_MERGEABLE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MADV_WIPEONFORK,
    do_madvise,
)
from host_mm.mmap import PROT_NONE, PROT_READ, do_mmap, do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.profile import LINUX_5_10
from host_mm.uaccess import copy_to_user
from tests.host_mm.hugetlb_machine import BASE, HUGE, PRIVATE, Machine, Witness
from tests.host_mm.machine import RW, run


def ready(pages: int = 2, **kw: Any) -> tuple[Machine, Any, Witness]:
    m = Machine(**kw)
    p = m.process()
    m.private(p, pages)
    for page in range(pages):
        m.write(p, BASE + page * HUGE, bytes([page + 1]))
    return m, p, Witness(m.host, p.mm)


def test_munmap_clears_in_its_one_bracket_then_flushes_and_frees() -> None:
    m, p, witness = ready()
    m.do(lambda: do_munmap(p.mm, BASE, 2 * HUGE))
    log, ranges = witness.take()
    assert log[:6] == ["start", "clear", "clear", "end", "flush", "free"]
    assert [r[:3] for r in ranges] == [("unmap", BASE, BASE + 2 * HUGE)]
    assert m.pool == (8, 0, 0)
    m.close()


def test_dontneed_gives_the_page_back_to_the_pool_and_the_promise_to_the_mapping() -> None:
    m, p, witness = ready()
    m.do(lambda: do_madvise(p.mm, BASE, HUGE, MADV_DONTNEED))
    log, ranges = witness.take()
    assert log == ["start", "clear", "end", "flush", "free"]
    assert [r[:3] for r in ranges] == [("clear", BASE, BASE + HUGE)]
    assert m.pool == (7, 1, 0)
    assert m.read(p, BASE) == b"\0"
    m.close()


def test_linux_5_10_brackets_each_unmapping_once_more_inside_the_callers() -> None:
    m, p, witness = ready(profile=LINUX_5_10)
    m.do(lambda: do_madvise(p.mm, BASE, HUGE, MADV_DONTNEED))
    log, ranges = witness.take()
    assert log[:5] == ["start", "start", "clear", "end", "end"]
    assert [r[0] for r in ranges] == ["clear", "unmap"]
    m.do(lambda: do_munmap(p.mm, BASE, 2 * HUGE))
    log, ranges = witness.take()
    assert log[:5] == ["start", "start", "clear", "end", "end"]
    assert [r[:3] for r in ranges] == [("unmap", BASE, BASE + 2 * HUGE)] * 2
    m.close()


def test_mprotect_changes_and_flushes_inside_one_bracket() -> None:
    m, p, witness = ready()
    m.do(lambda: do_mprotect(p.mm, BASE, 2 * HUGE, PROT_READ))
    log, ranges = witness.take()
    assert log == ["start", "clear", "set", "clear", "set", "flush", "end"]
    assert [r[:3] for r in ranges] == [("protection-vma", BASE, BASE + 2 * HUGE)]
    with pytest.raises(KernelError):
        copy_to_user(p, BASE, b"x")
    m.do(lambda: do_mprotect(p.mm, BASE, 2 * HUGE, RW))
    assert not pte_write(m.entry(p, BASE)), "a private page comes back writable by a fault only"
    m.write(p, BASE, b"x")
    m.close()


def test_without_any_right_the_entry_keeps_its_page() -> None:
    m, p, _ = ready()
    pfn = pmd_pfn(m.entry(p, BASE))
    m.do(lambda: do_mprotect(p.mm, BASE, HUGE, PROT_NONE))
    with pytest.raises(KernelError):
        copy_to_user(p, BASE, b"x")
    m.do(lambda: do_mprotect(p.mm, BASE, HUGE, RW))
    assert m.read(p, BASE) == b"\1"
    assert pmd_pfn(m.entry(p, BASE)) == pfn
    m.close()


@pytest.mark.parametrize("call", [
    lambda p: do_mprotect(p.mm, BASE + 0x3000, 0x1000, PROT_READ),
    lambda p: do_mprotect(p.mm, BASE, 0x1000, PROT_READ),
    lambda p: do_munmap(p.mm, BASE + 0x1000, HUGE),
    lambda p: do_munmap(p.mm, BASE, 0x1000),
    lambda p: do_madvise(p.mm, BASE + 0x3000, 0x1000, MADV_DONTNEED),
    lambda p: do_madvise(p.mm, BASE, HUGE, MADV_FREE),
    lambda p: do_madvise(p.mm, BASE, HUGE, MADV_COLD),
    lambda p: do_madvise(p.mm, BASE, HUGE, MADV_PAGEOUT),
    lambda p: do_madvise(p.mm, BASE, HUGE, MADV_WIPEONFORK),
    lambda p: do_mmap(p.mm, BASE + 0x1000, HUGE, RW, PRIVATE),
    lambda p: do_mmap(p.mm, 0, HUGE, RW, PRIVATE & ~0x10 | 30 << 26),
])
def test_what_would_cut_a_huge_page_is_einval_and_tells_nobody(call: Any) -> None:
    m, p, witness = ready()
    with pytest.raises(KernelError) as caught:
        m.do(lambda: call(p))
    assert caught.value.errno == EINVAL
    assert witness.take() == ([], [])
    assert m.read(p, BASE) == b"\1"
    assert not p.mm.mmap_lock.owner
    m.close()


def test_dontneed_of_less_than_a_huge_page_does_nothing_and_its_end_is_rounded_down() -> None:
    m, p, witness = ready()
    m.do(lambda: do_madvise(p.mm, BASE, 0x1000, MADV_DONTNEED))
    assert witness.take() == ([], [])
    m.do(lambda: do_madvise(p.mm, BASE, HUGE + 0x1000, MADV_DONTNEED))
    assert [r[:3] for r in witness.take()[1]] == [("clear", BASE, BASE + HUGE)]
    assert m.read(p, BASE + HUGE) == b"\2"
    m.close()


def test_ksm_leaves_huge_pages_alone_and_populate_faults_them_in() -> None:
    m, p, _ = ready()
    m.do(lambda: do_madvise(p.mm, BASE, HUGE, MADV_MERGEABLE))
    m.do(lambda: do_munmap(p.mm, BASE, 2 * HUGE))
    m.private(p, 2)
    m.do(lambda: do_madvise(p.mm, BASE, 2 * HUGE, MADV_POPULATE_WRITE))
    assert pte_write(m.entry(p, BASE + HUGE))
    m.close()


def test_a_gather_that_is_full_flushes_and_frees_inside_the_bracket() -> None:
    m, p, witness = ready(params={"mm.max_gather_pages": "1"})
    m.do(lambda: do_munmap(p.mm, BASE, 2 * HUGE))
    log, _ = witness.take()
    assert log[:8] == ["start", "clear", "flush", "free", "clear", "flush", "free", "end"]
    m.close()


def test_a_piece_that_goes_takes_its_promises_and_leaves_the_others() -> None:
    m = Machine()
    p = m.process()
    m.private(p, 4)
    m.write(p, BASE + HUGE, b"x")
    assert m.pool == (7, 3, 0)
    m.do(lambda: do_munmap(p.mm, BASE + HUGE, 2 * HUGE))
    assert m.pool == (8, 2, 0)
    m.close()


def test_exit_gives_back_every_page_and_promise_whoever_goes_first() -> None:
    for parent_first in (True, False):
        m = Machine()
        p = m.process()
        m.private(p, 3)
        m.write(p, BASE, b"x")
        child = m.do(lambda p=p: fork_process(p))
        m.write(child, BASE, b"y")
        m.write(child, BASE + HUGE, b"z")
        for who in (p, child) if parent_first else (child, p):
            m.do(lambda who=who: exit_process(who))
        assert m.pool == (8, 0, 0)
        m.close()


@pytest.mark.parametrize("seed", range(10))
def test_a_write_beside_a_dontneed_finds_its_page_or_a_fresh_one(seed: int) -> None:
    m, p, _ = ready(seed=seed)

    def drop() -> None:
        for _ in range(3):
            do_madvise(p.mm, BASE, HUGE, MADV_DONTNEED)

    def write() -> None:
        for n in range(6):
            copy_to_user(p, BASE + n, b"w")

    run(m.host, drop, write, drop)
    assert set(m.read(p, BASE, 6)) <= {0, ord("w")}
    assert m.read(p, BASE + HUGE) == b"\2"
    m.close()

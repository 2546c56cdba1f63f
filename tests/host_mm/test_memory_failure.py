"""Bad memory is taken out of use, and who loses by it is told (host_mm/memory_failure.py)."""

from __future__ import annotations

import random
from errno import EBUSY, EFAULT, EIO, ENXIO

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_present
from host_mm.arch.x86.swapops import SWP_HWPOISON, pte_to_swp_entry, swp_type
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_HWPOISON, FOLL_WRITE, get_user_pages_unlocked
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.host import HostMm
from host_mm.kernel.errors import EHWPOISON, BrokenTruth, KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_HWPOISON, MADV_PAGEOUT, MADV_SOFT_OFFLINE, do_madvise
from host_mm.memory_failure import MF_ACTION_REQUIRED, memory_failure, soft_offline_page
from host_mm.mlock import do_mlock
from host_mm.page import PG_dirty, PG_hwpoison, PG_swapcache, put_page
from host_mm.page_alloc import GFP_KERNEL, alloc_pages
from host_mm.process import BUS_MCEERR_AO, BUS_MCEERR_AR, Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import run
from tests.host_mm.storm import user
from tests.host_mm.test_migrate import BASE, PAGE, fill, make, pfn_of
from tests.host_mm.test_order_classes import record
from trace_events.stream import Listener


def written(pages: int = 4) -> tuple[HostMm, Process]:
    host, process = make(pages)
    run(host, lambda: fill(process, pages))
    host.lru.lru_add_drain_all()
    return host, process


def fail(host: HostMm, pfn: int, flags: int = 0, current: Process | None = None) -> int:
    result: int = host.sched.run_task("mce", lambda: memory_failure(host, pfn, flags, current))
    return result


def lines_of(host: HostMm) -> list[str]:
    points = {tp.full_name: tp for tp in host.stream.tracepoints()}
    lines: list[str] = []
    host.stream.listen(Listener(
        ["ras:*", "signal:*"], lambda e: lines.append(points[e.event].format(tuple(e.args.values()))),
        ancestors=False,
    ))
    return lines


def test_a_written_page_becomes_a_poison_entry_and_its_user_gets_sigbus() -> None:
    host, process = written()
    lines = lines_of(host)
    pfn = pfn_of(process, 1)
    assert fail(host, pfn) == 0
    assert lines == [f"pfn {pfn:#x}: recovery action for dirty LRU page: Recovered"]
    entry = lookup_address_in_mm(process.mm, BASE + PAGE)[0]
    assert not pte_present(entry)
    assert swp_type(pte_to_swp_entry(entry)) == SWP_HWPOISON
    with pytest.raises(KernelError) as caught:
        run(host, lambda: copy_from_user(process, BASE + PAGE, 1))
    assert caught.value.errno == EFAULT
    assert [(s.code, s.address) for s in process.signals] == [(BUS_MCEERR_AR, BASE + PAGE)]
    assert lines[1:] == ["sig=7 errno=0 code=4 comm=p pid=1 grp=0 res=0"]
    assert copy_from_user(process, BASE, 6) == b"page 0"
    audit(host)
    run(host, lambda: exit_process(process))
    audit(host)
    assert pfn not in [alloc_pages(host, GFP_KERNEL) for _ in range(100)]


def test_who_hit_it_is_told_at_once_and_others_only_if_they_asked_for_it() -> None:
    host, process = written()
    children: list[Process] = []
    run(host, lambda: children.extend(fork_process(process) for _ in range(2)))
    children[1].mce_kill_early = True
    assert fail(host, pfn_of(process), MF_ACTION_REQUIRED, process) == 0
    assert [(s.code, s.address) for s in process.signals] == [(BUS_MCEERR_AR, BASE)]
    assert children[0].signals == []
    assert [(s.code, s.address) for s in children[1].signals] == [(BUS_MCEERR_AO, BASE)]
    for child in children:
        assert not pte_present(lookup_address_in_mm(child.mm, BASE)[0])
        run(host, lambda child=child: exit_process(child))  # type: ignore[misc]
    audit(host)


def test_the_order_is_start_clear_flush_poison_entry_end_and_the_frame_is_not_freed() -> None:
    seen = record(lambda p: memory_failure(p.host, pfn_of(p)))
    assert seen.log == ["start", "clear", "flush", "swap-entry", "end"]
    assert seen.ranges == [(mn.MMU_NOTIFY_CLEAR, BASE, BASE + PAGE, mn.ORDER_UNDER_PTL)]


def test_soft_offline_has_the_order_of_a_migration_and_frees_nothing() -> None:
    seen = record(lambda p: soft_offline_page(p.host, pfn_of(p)))
    assert seen.log == ["start", "clear", "swap-entry", "end", "flush", "set"]
    assert seen.ranges == [(mn.MMU_NOTIFY_CLEAR, BASE, BASE + PAGE, mn.ORDER_BATCHED)]


def paged_out(host: HostMm, process: Process, *, dirty: bool) -> int:
    """Page 0 in the swap cache, mapped, clean or written again; its frame."""

    def body() -> None:
        do_madvise(process.mm, BASE, PAGE, MADV_PAGEOUT)
        copy_from_user(process, BASE, 1)
        host.swap_device.drain()
        if dirty:
            host.pages.flags[pfn_of(process)] |= PG_dirty
        host.lru.lru_add_drain_all()

    run(host, body)
    assert host.pages.flags[pfn_of(process)] & PG_swapcache
    return pfn_of(process)


def test_a_clean_page_of_the_swap_cache_is_dropped_and_read_again() -> None:
    host, process = written()
    lines = lines_of(host)
    pfn = paged_out(host, process, dirty=False)
    assert fail(host, pfn) == 0
    assert lines == [f"pfn {pfn:#x}: recovery action for clean swapcache page: Recovered"]
    run(host, lambda: None)
    assert host.sched.run_task("read", lambda: copy_from_user(process, BASE, 6)) == b"page 0"
    assert process.signals == []
    assert pfn_of(process) != pfn
    audit(host)


def test_a_dirty_page_of_the_swap_cache_stays_there_and_kills_who_wants_it() -> None:
    host, process = written()
    lines = lines_of(host)
    pfn = paged_out(host, process, dirty=True)
    assert fail(host, pfn) == 0
    assert lines == [f"pfn {pfn:#x}: recovery action for dirty swapcache page: Delayed"]
    audit(host)
    with pytest.raises(KernelError):
        run(host, lambda: copy_from_user(process, BASE, 1))
    assert [s.code for s in process.signals] == [BUS_MCEERR_AR]
    run(host, lambda: exit_process(process))
    audit(host)


def test_a_clean_page_of_a_file_is_dropped_and_read_again() -> None:
    s = Shared(disk=b"x" * 16 * PAGE)
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    lines = lines_of(s.host)
    pfn = s.file.i_pages[0]
    assert fail(s.host, pfn, MF_ACTION_REQUIRED, s.a) == 0
    assert lines == [f"pfn {pfn:#x}: recovery action for clean LRU page: Recovered"]
    assert s.a.signals == []
    assert 0 not in s.file.i_pages
    assert s.host.sched.run_task("read", lambda: copy_from_user(s.a, s.at, 1)) == b"x"
    assert s.file.i_pages[0] != pfn
    s.end()


def test_a_dirty_page_of_a_file_is_lost_and_who_mapped_it_is_told() -> None:
    s = Shared(disk=b"x" * 16 * PAGE)
    s.do(lambda: copy_to_user(s.a, s.at, b"new"))
    lines = lines_of(s.host)
    pfn = s.file.i_pages[0]
    assert fail(s.host, pfn, MF_ACTION_REQUIRED, s.a) == 0
    assert lines[-1] == f"pfn {pfn:#x}: recovery action for dirty LRU page: Recovered"
    assert [signal.address for signal in s.a.signals] == [s.at]
    assert s.host.sched.run_task("read", lambda: copy_from_user(s.b, s.bt, 3)) == b"xxx", "as the disk has it"
    s.end()


def test_shmem_keeps_the_bad_page_so_that_nobody_reads_zeros() -> None:
    s = Shared()
    s.do(lambda: copy_to_user(s.a, s.at, b"new"))
    s.quiet()
    pfn = s.file.i_pages[0]
    assert fail(s.host, pfn) == 0
    assert s.file.i_pages[0] == pfn
    for process, at in ((s.a, s.at), (s.b, s.bt)):
        with pytest.raises(KernelError):
            s.do(lambda process=process, at=at: copy_from_user(process, at, 1))  # type: ignore[misc]
        assert [signal.code for signal in process.signals] == [BUS_MCEERR_AR]
    s.end()


def test_a_free_frame_is_taken_off_its_list() -> None:
    host, _ = written()
    lines = lines_of(host)
    free = host.zones[0].nr_free
    assert fail(host, 200) == 0
    assert lines == ["pfn 0xc8: recovery action for free buddy page: Recovered"]
    assert host.zones[0].nr_free == free - 1
    audit(host)
    assert 200 not in [alloc_pages(host, GFP_KERNEL) for _ in range(250)]


def test_locked_memory_is_unmapped_all_the_same() -> None:
    host, process = written()
    run(host, lambda: do_mlock(process.mm, BASE, PAGE))
    lines = lines_of(host)
    assert fail(host, pfn_of(process)) == 0
    # Its last entry took the lock along, so that it counts as any other page by then.
    assert lines[0].endswith("recovery action for dirty LRU page: Recovered")
    assert host.vmstat["nr_mlock"] == 0
    audit(host)


def test_what_cannot_be_handled_and_what_failed_before() -> None:
    host, process = written()
    lines = lines_of(host)
    table = process.mm.pgd >> 12
    assert fail(host, table) == -EBUSY
    assert lines[-1] == f"pfn {table:#x}: recovery action for get hwpoison page: Ignored"
    host.pages.flags[table] &= ~PG_hwpoison
    assert fail(host, pfn_of(process)) == 0
    entry = lookup_address_in_mm(process.mm, BASE)[0]
    pfn = pte_to_swp_entry(entry) & 0xFFFFF
    assert fail(host, pfn) == -EHWPOISON
    assert lines[-1] == f"pfn {pfn:#x}: recovery action for already poisoned page: Failed"
    assert fail(host, 1 << 30) == -ENXIO
    assert fail(host, host.device_frames.start) == -ENXIO, "a device's own memory"
    assert fail(host, -1) == -ENXIO


def test_gup_answers_hwpoison_to_those_who_ask_for_it() -> None:
    host, process = written()
    assert fail(host, pfn_of(process)) == 0
    answers: list[int] = []
    run(host, lambda: answers.append(get_user_pages_unlocked(process.mm, BASE, FOLL_WRITE | FOLL_HWPOISON)))
    run(host, lambda: answers.append(get_user_pages_unlocked(process.mm, BASE, FOLL_WRITE)))
    assert answers == [-EHWPOISON, -EFAULT]


def test_a_pinned_page_that_fails_stays_with_its_pin_and_the_audit_knows() -> None:
    host, process = written()
    got: list[int] = []
    run(host, lambda: got.append(pin_user_page(process.mm, BASE, FOLL_WRITE)))
    assert fail(host, got[0]) == 0
    audit(host)
    unpin_user_page(host, got[0])
    audit(host)


def test_soft_offline_moves_the_page_and_keeps_the_frame() -> None:
    host, process = written()
    pfn = pfn_of(process)
    free = host.allocator.nr_free_pages()
    assert host.sched.run_task("soft", lambda: soft_offline_page(host, pfn)) == 0
    assert pfn_of(process) not in (pfn, -1)
    assert copy_from_user(process, BASE, 6) == b"page 0"
    assert process.signals == []
    assert host.allocator.nr_free_pages() == free - 1
    assert host.pages.flags[pfn] == PG_hwpoison
    audit(host)
    assert host.sched.run_task("soft", lambda: soft_offline_page(host, pfn)) == 0, "nothing left to do"
    assert host.sched.run_task("soft", lambda: soft_offline_page(host, 300)) == 0, "a free one"
    assert host.sched.run_task("soft", lambda: soft_offline_page(host, process.mm.pgd >> 12)) == -EIO
    assert host.sched.run_task("soft", lambda: soft_offline_page(host, 1 << 30)) == -ENXIO
    audit(host)


def test_soft_offline_leaves_a_pinned_page_alone() -> None:
    host, process = written()
    got: list[int] = []
    run(host, lambda: got.append(pin_user_page(process.mm, BASE, FOLL_WRITE)))
    assert host.sched.run_task("soft", lambda: soft_offline_page(host, got[0])) == -EBUSY
    assert not host.pages.flags[got[0]] & PG_hwpoison
    assert pfn_of(process) == got[0]
    unpin_user_page(host, got[0])
    audit(host)


def test_madvise_injects_both_and_says_why_not() -> None:
    host, process = written(4)

    def advise(advice: int, page: int = 0, pages: int = 1) -> None:
        at, length = BASE + page * PAGE, pages * PAGE
        host.sched.run_task("madvise", lambda: do_madvise(process.mm, at, length, advice))

    old = [pfn_of(process, page) for page in range(4)]
    advise(MADV_SOFT_OFFLINE, 0, 2)
    assert [pfn_of(process, page) for page in range(2)] != old[:2]
    assert copy_from_user(process, BASE + PAGE, 6) == b"page 1"
    advise(MADV_HWPOISON, 2)
    assert [(s.code, s.address) for s in process.signals] == [(BUS_MCEERR_AR, BASE + 2 * PAGE)]
    with pytest.raises(KernelError) as caught:
        advise(MADV_HWPOISON, 2)
    assert caught.value.errno == EFAULT, "the page cannot be had any more"
    with pytest.raises(KernelError) as caught:
        advise(MADV_HWPOISON, 400)
    assert caught.value.errno == EFAULT
    got = pin_user_page(process.mm, BASE, FOLL_WRITE)
    with pytest.raises(KernelError) as caught:
        advise(MADV_SOFT_OFFLINE)
    assert caught.value.errno == EBUSY
    unpin_user_page(host, got)
    audit(host)


def test_fork_copies_the_poison_and_dontneed_gives_the_address_back() -> None:
    host, process = written()
    fail(host, pfn_of(process))
    children: list[Process] = []
    run(host, lambda: children.append(fork_process(process)))
    with pytest.raises(KernelError):
        run(host, lambda: copy_from_user(children[0], BASE, 1))
    run(host, lambda: do_madvise(process.mm, BASE, PAGE, MADV_DONTNEED))
    run(host, lambda: copy_to_user(process, BASE, b"new"))
    assert copy_from_user(process, BASE, 3) == b"new"
    run(host, lambda: exit_process(children[0]))
    audit(host)


def test_the_audit_sees_a_poisoned_frame_that_somebody_maps() -> None:
    host, process = written()
    pfn = pfn_of(process)
    fail(host, pfn)
    host.pages.refcount[pfn] += 1
    with pytest.raises(BrokenTruth, match="hwpoison"):
        audit(host)
    host.pages.refcount[pfn] -= 1
    audit(host)
    put_page(host, pfn)
    with pytest.raises(BrokenTruth, match="hwpoison"):
        audit(host)


@pytest.mark.parametrize("seed", range(6))
def test_soft_offline_beside_stores_forks_and_paging_loses_no_byte(seed: int) -> None:
    host, process = make(16, ram=900)
    host.start_daemons()
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    stop: list[int] = []

    def worker() -> None:
        user(process, BASE, 16, seed)
        stop.append(1)

    def offliner() -> None:
        rng = random.Random(seed + 1)
        while not stop:
            pfn = pfn_of(process, rng.randrange(16))
            if pfn > host.zero_pfn:
                soft_offline_page(host, pfn)
            host.sched.sleep(rng.randrange(1, 20_000))

    def pager() -> None:
        rng = random.Random(seed + 2)
        while not stop:
            do_madvise(process.mm, BASE + rng.randrange(8) * PAGE, 8 * PAGE, MADV_PAGEOUT)
            child = fork_process(process)
            host.sched.sleep(rng.randrange(1, 20_000))
            exit_process(child)

    run(host, worker, offliner, pager)
    host.sched.set_strategy(None)
    host.sched.run_task("rest", host.quiesce)
    assert host.allocator.hwpoisoned
    audit(host)

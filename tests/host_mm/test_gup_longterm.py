"""Long-term pins leave movable memory movable (host_mm/gup_longterm.py)."""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOMEM

import pytest

from host_mm import mmu_notifier as mn
from host_mm.compaction import compact_nodes
from host_mm.fork import exit_process, fork_process
from host_mm.gup import (
    FOLL_ANON,
    FOLL_GET,
    FOLL_HONOR_NUMA_FAULT,
    FOLL_LONGTERM,
    FOLL_NOFAULT,
    FOLL_NOWAIT,
    FOLL_PIN,
    FOLL_WRITE,
    get_user_pages_unlocked,
)
from host_mm.gup_pin import pin_user_page
from host_mm.gup_range import get_user_pages, pin_user_pages, unpin_user_pages
from host_mm.kernel.errors import KernelError
from host_mm.ksm import scan_until_quiet
from host_mm.madvise import MADV_MERGEABLE, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import do_munmap
from host_mm.mmu_gather import MmuGather
from host_mm.mmzone import PAGEBLOCK_NR_PAGES, ZONE_MOVABLE, ZONE_NORMAL
from host_mm.mprotect import MM_CP_PROT_NUMA, change_protection
from host_mm.page import put_page
from host_mm.page_isolation import PB_ISOLATE_MODE_OTHER, start_isolate_page_range, undo_isolate_page_range
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.truths import audit
from host_mm.uaccess import copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, Vmm, make_host
from trace_events.stream import Listener


def movable_vmm() -> Vmm:
    return Vmm(make_host(ram=32 << 20, params={"mm.movablecore": "16M"}))


def zones(vmm: Vmm, pfns: list[int]) -> list[int]:
    return [vmm.host.allocator.zone_of(pfn).idx for pfn in pfns]


def pin(vmm: Vmm, pages: int, flags: int = FOLL_WRITE, offset: int = 0) -> list[int]:
    pfns: list[int] = vmm.host.sched.run_task(
        "pin", lambda: pin_user_pages(vmm.mm, vmm.base + offset, pages, flags)
    )
    return pfns


def test_a_short_pin_stays_in_zone_movable_and_a_long_one_moves_out_first() -> None:
    vmm = movable_vmm()
    for page in range(4):
        vmm.host_write(page * PAGE, page + 1)
    short = pin(vmm, 4)
    assert zones(vmm, short) == [ZONE_MOVABLE] * 4
    unpin_user_pages(vmm.host, short)
    lines: list[str] = []
    points = {tp.full_name: tp for tp in vmm.host.stream.tracepoints()}
    vmm.host.stream.listen(Listener(
        ["migrate:mm_migrate_pages"], lambda e: lines.append(points[e.event].format(tuple(e.args.values()))),
        ancestors=False,
    ))
    vmm.brackets()
    long = pin(vmm, 4, FOLL_WRITE | FOLL_LONGTERM)
    assert zones(vmm, long) == [ZONE_NORMAL] * 4
    assert vmm.brackets() == [("clear", page * PAGE, (page + 1) * PAGE) for page in range(4)]
    assert len(lines) == 1
    assert "nr_succeeded=4" in lines[0]
    assert lines[0].endswith("reason=longterm_pin")
    assert [vmm.host_read(page * PAGE) for page in range(4)] == [1, 2, 3, 4]
    audit(vmm.host)
    unpin_user_pages(vmm.host, long, dirty=True)
    audit(vmm.host)


def test_pages_that_the_pin_faults_in_are_not_movable_to_begin_with() -> None:
    vmm = movable_vmm()
    moved = vmm.host.vmstat["pgmigrate_success"]
    long = pin(vmm, 4, FOLL_WRITE | FOLL_LONGTERM)
    assert zones(vmm, long) == [ZONE_NORMAL] * 4
    assert vmm.host.vmstat["pgmigrate_success"] == moved
    unpin_user_pages(vmm.host, long)


def test_a_long_pin_leaves_an_isolated_block_too() -> None:
    vmm = Vmm(make_host(ram=32 << 20))
    vmm.host_write(0, 7)
    vmm.host.sched.run_task("move", lambda: move_pages(vmm.process, [vmm.base], [1]))
    (pfn,) = pin(vmm, 1)
    unpin_user_pages(vmm.host, [pfn])
    block = pfn & -PAGEBLOCK_NR_PAGES
    assert start_isolate_page_range(vmm.host, block, block + 1, PB_ISOLATE_MODE_OTHER) == 0
    (long,) = pin(vmm, 1, FOLL_WRITE | FOLL_LONGTERM)
    assert long & -PAGEBLOCK_NR_PAGES != block
    assert vmm.host_read(0) == 7
    undo_isolate_page_range(vmm.host, block, block + 1)
    unpin_user_pages(vmm.host, [long])
    audit(vmm.host)


def test_a_page_that_somebody_else_holds_there_cannot_be_pinned_for_long() -> None:
    vmm = movable_vmm()
    vmm.host_write(0, 1)
    short = pin(vmm, 1)
    with pytest.raises(KernelError) as caught:
        pin(vmm, 1, FOLL_WRITE | FOLL_LONGTERM)
    assert caught.value.errno == ENOMEM
    answer = vmm.host.sched.run_task(
        "pin", lambda: pin_user_page(vmm.mm, vmm.base, FOLL_WRITE | FOLL_LONGTERM)
    )
    assert answer == -ENOMEM
    audit(vmm.host)
    unpin_user_pages(vmm.host, short)
    unpin_user_pages(vmm.host, pin(vmm, 1, FOLL_WRITE | FOLL_LONGTERM))
    audit(vmm.host)


def test_a_range_that_ends_in_a_hole_is_answered_with_what_there_is() -> None:
    vmm = Vmm()
    vmm.host.sched.run_task("munmap", lambda: do_munmap(vmm.mm, vmm.base + 3 * PAGE, PAGE))
    pfns = pin(vmm, 8)
    assert len(pfns) == 3
    unpin_user_pages(vmm.host, pfns)
    got: list[int] = vmm.host.sched.run_task(
        "gup", lambda: get_user_pages(vmm.mm, vmm.base + PAGE, 8, FOLL_WRITE)
    )
    assert got == pfns[1:]
    for pfn in got:
        put_page(vmm.host, pfn)
    with pytest.raises(KernelError) as caught:
        pin(vmm, 8, offset=3 * PAGE)
    assert caught.value.errno == EFAULT
    assert pin(vmm, 0) == []
    audit(vmm.host)


def test_arguments_that_contradict_each_other_are_einval() -> None:
    vmm = Vmm()
    for call in (
        lambda: get_user_pages(vmm.mm, vmm.base, 1, FOLL_LONGTERM),
        lambda: get_user_pages(vmm.mm, vmm.base, 1, FOLL_PIN),
        lambda: pin_user_pages(vmm.mm, vmm.base, 1, FOLL_GET),
        lambda: pin_user_pages(vmm.mm, vmm.base, -1, 0),
        lambda: get_user_pages(vmm.mm, vmm.base, 1, FOLL_ANON),
        lambda: get_user_pages(vmm.mm, vmm.base, 1, FOLL_NOWAIT),
    ):
        with pytest.raises(KernelError) as caught:
            call()
        assert caught.value.errno == EINVAL


def test_nofault_takes_only_what_is_there_and_anon_only_anonymous_memory() -> None:
    vmm = Vmm()
    vmm.host_write(0, 1)
    pfns = pin(vmm, 4, FOLL_WRITE | FOLL_NOFAULT)
    assert len(pfns) == 1
    unpin_user_pages(vmm.host, pfns)
    s = Shared()
    s.do(lambda: copy_to_user(s.a, s.at, b"x"))
    assert get_user_pages_unlocked(s.a.mm, s.at, FOLL_ANON) == -EFAULT
    put_page(s.host, get_user_pages_unlocked(s.a.mm, s.at, 0))
    s.end()


def test_a_hinting_entry_is_faulted_first_only_by_those_who_honour_it() -> None:
    vmm = Vmm()
    vmm.host_write(0, 1)
    run = vmm.host.sched.run_task
    # A page on the scanner's own node would be left alone.
    run("move", lambda: move_pages(vmm.process, [vmm.base], [1]))
    run("hint", lambda: change_prot_numa(vmm, 0))
    faults = vmm.host.vmstat["numa_hint_faults"]
    put_page(vmm.host, run("gup", lambda: get_user_pages(vmm.mm, vmm.base, 1))[0])
    assert vmm.host.vmstat["numa_hint_faults"] == faults
    put_page(vmm.host, run("gup", lambda: get_user_pages(vmm.mm, vmm.base, 1, FOLL_HONOR_NUMA_FAULT))[0])
    assert vmm.host.vmstat["numa_hint_faults"] == faults + 1


def change_prot_numa(vmm: Vmm, offset: int) -> None:
    """The page's entry becomes a hinting one, as the scanner of NUMA balancing makes it."""
    vma = vmm.mm.vma_lookup(vmm.base)
    assert vma is not None
    tlb = MmuGather(vmm.mm)
    vmm.mm.mmap_lock.read_lock()
    change_protection(tlb, vma, vmm.base + offset, vmm.base + offset + PAGE, MM_CP_PROT_NUMA)
    vmm.mm.mmap_lock.read_unlock()
    tlb.finish()


def test_pins_resist_migration_compaction_merging_and_paging() -> None:
    vmm = Vmm(make_host(ram=32 << 20, nodes=2))
    run = vmm.host.sched.run_task
    for page in range(8):
        vmm.host_write(page * PAGE, 5)
    pfns = pin(vmm, 4, FOLL_WRITE | FOLL_LONGTERM)
    run("merge", lambda: do_madvise(vmm.mm, vmm.base, 8 * PAGE, MADV_MERGEABLE))
    run("ksmd", lambda: scan_until_quiet(vmm.host))
    run("move", lambda: move_pages(vmm.process, [vmm.base + n * PAGE for n in range(4)], [1] * 4))
    run("compact", lambda: compact_nodes(vmm.host))
    run("pageout", lambda: do_madvise(vmm.mm, vmm.base, 8 * PAGE, MADV_PAGEOUT))
    run("reclaim", lambda: vmm.host.reclaim(0, 0))
    run("rest", vmm.host.quiesce)
    for page, pfn in enumerate(pfns):
        vmm.host.ram.write((pfn << 12) + 8, bytes([page]))
        assert vmm.host_read(page * PAGE + 8) == page
    assert vmm.host.vmstat["ksm_pages_shared"] == 0 or vmm.host.ksm.pages_sharing >= 0
    unpin_user_pages(vmm.host, pfns)
    audit(vmm.host)


@pytest.mark.parametrize("profile", [LINUX_6_18, LINUX_5_10], ids=lambda profile: profile.name)
def test_paging_out_leaves_pinned_pages_mapped(profile: MmProfile) -> None:
    vmm = Vmm(profile=profile)
    for page in range(4):
        vmm.host_write(page * PAGE, page)
    pfns = pin(vmm, 2)
    vmm.host.lru.lru_add_drain_all()
    vmm.host.sched.run_task("pageout", lambda: do_madvise(vmm.mm, vmm.base, 4 * PAGE, MADV_PAGEOUT))
    assert vmm.brackets() == [("clear", 2 * PAGE, 3 * PAGE), ("clear", 3 * PAGE, 4 * PAGE)]
    unpin_user_pages(vmm.host, pfns)


def test_fork_copies_pinned_pages_at_once_and_shares_the_others() -> None:
    vmm = Vmm()
    for page in range(4):
        vmm.host_write(page * PAGE, page)
    pfns = pin(vmm, 2, FOLL_WRITE | FOLL_LONGTERM)
    child = vmm.host.sched.run_task("fork", lambda: fork_process(vmm.process))
    for pfn in pfns:
        vmm.host.ram.write(pfn << 12, b"\x77")
    vmm.brackets()
    vmm.host_write(PAGE + 8, 1)
    assert vmm.brackets() == [], "the parent's pinned page stayed exclusive"
    assert vmm.host_read(0) & 0xFF == 0x77
    vmm.host_write(2 * PAGE, 9)
    assert vmm.brackets() == [("clear", 2 * PAGE, 3 * PAGE)]
    vmm.host.sched.run_task("exit", lambda: exit_process(child))
    unpin_user_pages(vmm.host, pfns)
    audit(vmm.host)


def test_a_read_only_long_pin_of_a_shared_page_clears_flushes_and_sets_in_one_bracket() -> None:
    from tests.host_mm.test_order_classes import record

    held: list[int] = []
    seen = record(
        lambda p: held.extend(pin_user_pages(p.mm, 0x10000000, 1, FOLL_LONGTERM)), prepare=fork_process
    )
    assert seen.log == ["start", "clear", "flush", "set", "end"]
    assert seen.ranges == [(mn.MMU_NOTIFY_CLEAR, 0x10000000, 0x10001000, mn.ORDER_UNDER_PTL)]
    assert held

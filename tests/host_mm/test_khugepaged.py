"""Small pages become huge ones: in which order, and what stands in the way."""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EINVAL, ENOMEM

import pytest

from host_mm import khugepaged
from host_mm.arch.x86.pgtable import lookup_address_in_mm, pmd_pfn, pte_mkold
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.huge_memory_split import split_huge_pages
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_COLLAPSE, MADV_DONTNEED, MADV_NOHUGEPAGE, MADV_PAGEOUT, do_madvise
from host_mm.mmap import do_munmap
from host_mm.page import PG_anon_exclusive, PG_referenced
from host_mm.pgtable_generic import ptep_get, set_pte
from host_mm.profile import LINUX_5_10
from tests.host_mm.machine import PAGE
from tests.host_mm.thp_machine import HUGE, Order, ThpVmm
from trace_events.stream import Listener

COLLAPSED = ["start clear 0x0 0x200000", "pmd-clear", "flush", "end"]


def small(pages: int = 512, **kw: object) -> tuple[ThpVmm, Order]:
    """Small pages where a huge one could be."""
    vm = ThpVmm(**kw)
    vm.fill(0, 512)
    vm.task(lambda: split_huge_pages(vm.mm, vm.base, vm.base + HUGE))
    if pages < 512:
        vm.task(lambda: do_madvise(vm.mm, vm.base + pages * PAGE, (512 - pages) * PAGE, MADV_DONTNEED))
    assert vm.level(0) == 1
    return vm, Order(vm)


def collapse(vm: ThpVmm, length: int = HUGE) -> int:
    """0 or the errno."""
    try:
        vm.task(lambda: do_madvise(vm.mm, vm.base, length, MADV_COLLAPSE))
    except KernelError as error:
        return error.errno
    return 0


def told(vm: ThpVmm) -> list[str]:
    """Collect what the huge_memory tracepoints say from now on, without addresses."""
    texts: list[str] = []
    names = ("mm_khugepaged_scan_pmd", "mm_collapse_huge_page", "mm_collapse_huge_page_isolate",
             "mm_collapse_huge_page_swapin")
    vm.host.stream.listen(Listener(
        [f"huge_memory:{name}" for name in names],
        lambda event: texts.append(f"{event.name} " + " ".join(
            f"{key}={value}" for key, value in event.args.items() if key not in ("mm", "pfn")
        )),
        ancestors=False,
    ))
    return texts


def test_the_bracket_covers_the_clearing_of_the_entry_only() -> None:
    vm, order = small()
    texts = told(vm)
    assert collapse(vm) == 0
    words = order.take()
    assert words[:4] == COLLAPSED
    assert words.index("free") > 3
    assert words[-1] == "pmd-set"
    assert sum(int(word.partition("*")[2] or 1) for word in words if word.startswith("free")) == 512
    assert vm.level(0) == 2
    assert vm.words(0, 512) == list(range(1, 513))
    assert texts == [
        "mm_collapse_huge_page_isolate none_or_zero=0 referenced=0 status=succeeded",
        "mm_collapse_huge_page isolated=1 status=succeeded",
        "mm_khugepaged_scan_pmd referenced=0 none_or_zero=0 status=succeeded unmapped=0",
    ]
    vm.audit()


def test_the_new_page_is_exclusive_writable_and_dirty() -> None:
    vm, order = small(3)
    assert collapse(vm) == 0
    order.take()
    folio = pmd_pfn(lookup_address_in_mm(vm.mm, vm.base)[0])
    assert vm.host.pages.flags[folio] & PG_anon_exclusive
    vm.task(lambda: vm.host_write(4 * PAGE, 9))
    assert order.take() == []
    assert vm.words(0, 6) == [1, 2, 3, 0, 9, 0]
    vm.audit()


def test_what_is_huge_already_counts_as_collapsed() -> None:
    vm = ThpVmm()
    vm.fill(0, 1)
    assert collapse(vm) == 0
    vm.fill(HUGE, 1)
    vm.task(lambda: split_huge_pages(vm.mm, vm.base + HUGE, vm.base + 2 * HUGE))
    assert collapse(vm, 2 * HUGE) == 0
    assert vm.level(HUGE) == 2
    assert collapse(vm, HUGE - PAGE) == 0, "there are no 2 MiB in it"


def test_swapped_pages_are_read_first() -> None:
    vm, order = small()
    vm.task(lambda: do_madvise(vm.mm, vm.base, 4 * PAGE, MADV_PAGEOUT))
    vm.task(vm.host.swap_device.drain)
    assert vm.slot(0) >= 0
    texts = told(vm)
    order.take()
    assert collapse(vm) == 0
    words = order.take()
    assert words.index("set*4") < words.index(COLLAPSED[0])
    assert texts[0] == "mm_collapse_huge_page_swapin swapped_in=4 referenced=0 status=succeeded"
    assert vm.words(0, 5) == [1, 2, 3, 4, 5]
    vm.audit()


def test_a_page_that_somebody_holds_ends_it_and_the_table_comes_back() -> None:
    vm, order = small()
    pfn = vm.task(lambda: pin_user_page(vm.mm, vm.base + 7 * PAGE, FOLL_WRITE))
    texts = told(vm)
    assert collapse(vm) == EAGAIN
    assert order.take() == [], "the scan sees it already"
    assert texts == [
        "mm_khugepaged_scan_pmd referenced=0 none_or_zero=0 status=not_suitable_page_count unmapped=0"
    ]
    vm.task(lambda: unpin_user_page(vm.host, pfn))
    assert collapse(vm) == 0
    assert vm.words(7 * PAGE, 1) == [8]
    vm.audit()


def test_what_a_child_shares_is_copied() -> None:
    vm, order = small()
    child = vm.task(lambda: fork_process(vm.process))
    order.take()
    assert collapse(vm) == 0
    vm.fill(0, 2, first=100)
    assert vm.words(0, 3) == [100, 101, 3]
    entry, level = lookup_address_in_mm(child.mm, vm.base)
    assert level == 1
    assert vm.host.ram.u64[(entry & 0xFFFFFFFFF000) >> 3] == 1
    vm.task(lambda: exit_process(child))
    vm.audit()


def test_khugepaged_wants_something_used_and_not_too_much_missing() -> None:
    vm, _ = small(100, params={"khugepaged.max_ptes_none": "411"})
    texts = told(vm)
    vm.task(lambda: khugepaged.khugepaged_do_scan(vm.host))
    assert vm.level(0) == 1
    assert texts[0].endswith("none_or_zero=412 status=exceed_none_pte unmapped=0")
    vm.fill(100 * PAGE, 1)
    vm.task(lambda: khugepaged.khugepaged_do_scan(vm.host))
    assert vm.level(0) == 2
    assert vm.host.khugepaged.pages_collapsed == 1
    vm.audit()


def test_what_nobody_used_of_late_stays_small() -> None:
    vm, _ = small()
    for page in range(512):
        pte = vm.pte(page * PAGE)
        set_pte(vm.mm, vm.base + page * PAGE, pte, pte_mkold(ptep_get(vm.mm, pte)))
        vm.host.pages.flags[vm.pfn(page * PAGE)] &= ~PG_referenced
    texts = told(vm)
    vm.task(lambda: khugepaged.khugepaged_do_scan(vm.host))
    wanted = "mm_khugepaged_scan_pmd referenced=0 none_or_zero=0 status=lack_referenced_page unmapped=0"
    assert texts[0] == wanted
    assert vm.level(0) == 1
    assert collapse(vm) == 0


def test_the_daemon_goes_round_sleeps_and_forgets_who_exits() -> None:
    vm, _ = small()
    host = vm.host
    host.start_daemons()
    vm.task(host.wake_khugepaged)
    host.sched.run_until(lambda: host.khugepaged.task is not None and not host.khugepaged.scanning)
    assert vm.level(0) == 2
    rounds = host.khugepaged.full_scans
    vm.task(lambda: split_huge_pages(vm.mm, vm.base, vm.base + HUGE))
    vm.task(lambda: host.sched.sleep(11 * 10**9))
    assert host.khugepaged.full_scans > rounds
    assert vm.level(0) == 2
    vm.task(lambda: split_huge_pages(vm.mm, vm.base, vm.base + HUGE))
    vm.task(lambda: khugepaged.scan_sleep_millisecs_store(host, 1000))
    vm.task(lambda: host.sched.sleep(10**6))
    assert vm.level(0) == 2, "the file wakes it at once"
    vm.task(lambda: exit_process(vm.process))
    vm.task(lambda: host.sched.sleep(11 * 10**9))
    assert not host.khugepaged.mms


@pytest.mark.parametrize(("spoil", "error"), [
    ("nohugepage", EINVAL), ("unmapped", ENOMEM), ("untouched", EINVAL), ("memory", ENOMEM),
    ("locked", EAGAIN), ("cgroup", EBUSY),
])
def test_why_a_range_cannot_be_collapsed(spoil: str, error: int) -> None:
    vm, order = small(8) if spoil != "untouched" else (ThpVmm(), None)
    held: list[int] = []
    match spoil:
        case "nohugepage":
            vm.task(lambda: do_madvise(vm.mm, vm.base, HUGE, MADV_NOHUGEPAGE))
        case "unmapped":
            vm.task(lambda: do_munmap(vm.mm, vm.base, 8 << 20))
        case "memory":
            while (pfn := vm.host.allocator.alloc_pages(0, 9, 0)) >= 0:
                held.append(pfn)
        case "locked":
            vm.host.pages.flags[vm.pfn(0)] |= 1
        case "cgroup":
            memcg = vm.host.memcg.create("small")
            vm.task(lambda: vm.host.memcg.attach(vm.process, memcg))
            vm.task(lambda: vm.host.memcg.write_max(memcg, 100))
    if order is not None:
        order.take()
    assert collapse(vm) == error
    assert order is None or "pmd-clear" not in order.take()


def test_5_10_has_no_such_advice() -> None:
    vm, _ = small(profile=LINUX_5_10)
    assert collapse(vm) == EINVAL


@pytest.mark.parametrize("seed", range(10))
def test_a_fault_a_store_and_a_pin_beside_a_collapse_lose_nothing(seed: int) -> None:
    vm, _ = small()
    host = vm.host
    host.sched.set_strategy(RandomStrategy(seed, period=2))
    left = [4]

    def stores(word: int) -> None:
        for page in range(seed, 512, 37):
            vm.host_write(page * PAGE + word * 8, page + word)
            pfn = pin_user_page(vm.mm, vm.base + page * PAGE, FOLL_WRITE)
            host.sched.point("dma")
            host.ram.u64[(pfn << 9) + 4 + word] = page
            unpin_user_page(host, pfn, dirty=True)
        left[0] -= 1

    def collapses() -> None:
        for _ in range(12):
            try:
                do_madvise(vm.mm, vm.base, HUGE, MADV_COLLAPSE)
                split_huge_pages(vm.mm, vm.base, vm.base + PAGE)
            except KernelError as error:
                assert error.errno in (EAGAIN, EINVAL)  # noqa: PT017
        left[0] -= 1

    for word in (1, 2, 3):
        host.sched.spawn(f"stores{word}", lambda word=word: stores(word))
    host.sched.spawn("collapses", collapses)
    host.sched.run_until(lambda: not left[0])
    host.sched.set_strategy(None)
    pages = range(seed, 512, 37)
    for word in (1, 2, 3):
        stored = vm.task(lambda word=word: [vm.host_read(page * PAGE + word * 8) for page in pages])
        assert stored == [page + word for page in pages]
        by_dma = vm.task(lambda word=word: [vm.host_read(page * PAGE + (4 + word) * 8) for page in pages])
        assert by_dma == list(pages)
    assert host.vmstat["thp_collapse_alloc"] > 0
    vm.audit()


def test_a_host_that_goes_down_waits_for_khugepaged_to_leave_the_address_space_it_sleeps_in() -> None:
    vm, _ = small(params={"khugepaged.pages_to_scan": "1"})
    state = vm.host.khugepaged
    vm.host.start_daemons()
    vm.task(vm.host.wake_khugepaged)
    vm.task(lambda: vm.host.sched.sleep(1_000_000))
    assert state.mm is vm.mm, "asleep in the middle of a round"
    vm.task(lambda: exit_process(vm.process))
    holders = vm.mm.mm_count
    vm.task(vm.host.shutdown)
    assert not state.mms
    assert vm.mm.mm_count == holders - 1

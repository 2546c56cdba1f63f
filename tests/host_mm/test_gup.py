"""get_user_pages: what is answered, what is counted, what must be unshared (host_mm/gup.py)."""

from __future__ import annotations

from errno import EAGAIN, EFAULT

import pytest

from host_mm.arch.x86.pgtable import _PAGE_ACCESSED, lookup_address_in_mm
from host_mm.fork import exit_process, fork_process
from host_mm.gup import (
    FOLL_FORCE,
    FOLL_LONGTERM,
    FOLL_NOWAIT,
    FOLL_WRITE,
    get_user_page_fast_only,
    get_user_pages_unlocked,
)
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.memory import handle_mm_fault
from host_mm.mm_types import FAULT_FLAG_WRITE, VM_IO, VM_PFNMAP
from host_mm.mmap import do_mmap, do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.page import put_page
from host_mm.task_mmu import CLEAR_REFS_ALL, clear_refs_write
from host_mm.truths import audit
from host_mm.uaccess import copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import ANON, PAGE, RW, Vmm
from trace_events.event import Event
from trace_events.stream import Listener


@pytest.fixture
def vm() -> Vmm:
    return Vmm()


def test_fast_gup_takes_only_what_is_mapped_with_the_rights_asked_for(vm: Vmm) -> None:
    assert get_user_page_fast_only(vm.mm, vm.base, 0) == -1
    vm.host_read(0)
    assert get_user_page_fast_only(vm.mm, vm.base, 0) == -1, "the zero page is special"
    vm.host_write(0, 1)
    pfn = get_user_page_fast_only(vm.mm, vm.base, FOLL_WRITE)
    assert vm.host.ram.u64[(pfn << 12) // 8] == 1
    put_page(vm.host, pfn)
    child = fork_process(vm.process)
    assert get_user_page_fast_only(vm.mm, vm.base, FOLL_WRITE) == -1
    assert get_user_page_fast_only(vm.mm, vm.base, 0) == pfn
    put_page(vm.host, pfn)
    exit_process(child)
    audit(vm.host)


def test_slow_gup_answers_with_the_zero_page_for_reads(vm: Vmm) -> None:
    count = vm.host.pages.refcount[vm.host.zero_pfn]
    assert get_user_pages_unlocked(vm.mm, vm.base, 0) == vm.host.zero_pfn
    put_page(vm.host, vm.host.zero_pfn)
    assert vm.host.pages.refcount[vm.host.zero_pfn] == count


def test_no_mapping_no_rights_and_device_mappings_are_efault(vm: Vmm) -> None:
    hole = vm.base + (64 << 20)
    assert get_user_pages_unlocked(vm.mm, hole, 0) == -EFAULT
    do_mprotect(vm.mm, vm.base, PAGE, 1)
    assert get_user_pages_unlocked(vm.mm, vm.base, FOLL_WRITE) == -EFAULT
    do_mprotect(vm.mm, vm.base, PAGE, 0)
    assert get_user_pages_unlocked(vm.mm, vm.base, 0) == -EFAULT
    device = do_mmap(vm.mm, hole, PAGE, RW, ANON, vm_flags=VM_IO | VM_PFNMAP)
    assert get_user_pages_unlocked(vm.mm, device, 0) == -EFAULT
    do_munmap(vm.mm, device, PAGE)


def test_a_forced_write_copies_without_granting_the_right(vm: Vmm) -> None:
    vm.host_write(0, 1)
    child = fork_process(vm.process)
    do_mprotect(vm.mm, vm.base, PAGE, 1)
    pfn = get_user_pages_unlocked(vm.mm, vm.base, FOLL_WRITE | FOLL_FORCE)
    assert pfn >= 0
    vm.host.ram.u64[(pfn << 12) // 8] = 9
    put_page(vm.host, pfn)
    assert vm.host_read(0) == 9
    assert get_user_page_fast_only(vm.mm, vm.base, FOLL_WRITE) == -1
    exit_process(child)


def test_nowait_answers_eagain_while_the_page_must_be_read(vm: Vmm) -> None:
    vm.host_write(0, 5)
    run = vm.host.sched.run_task
    run("pageout", lambda: do_madvise(vm.mm, vm.base, PAGE, MADV_PAGEOUT))
    vm.host.swap_device.drain()
    run("pageout", lambda: do_madvise(vm.mm, vm.base, PAGE, MADV_PAGEOUT))
    run("reclaim", lambda: vm.host.reclaim(0, 0))
    assert run("gup", lambda: get_user_pages_unlocked(vm.mm, vm.base, FOLL_NOWAIT)) == -EAGAIN
    assert not vm.mm.mmap_lock.readers
    pfn = run("gup", lambda: get_user_pages_unlocked(vm.mm, vm.base, 0))
    assert vm.host.ram.u64[(pfn << 12) // 8] == 5
    put_page(vm.host, pfn)


def test_pins_count_their_bias_and_must_be_given_back_once(vm: Vmm) -> None:
    vm.host_write(0, 1)
    pfn = pin_user_page(vm.mm, vm.base, FOLL_WRITE)
    assert vm.host.pages.refcount[pfn] >= 1024
    audit(vm.host)
    unpin_user_page(vm.host, pfn)
    with pytest.raises(BrokenTruth, match="page-pins"):
        unpin_user_page(vm.host, pfn)


def test_a_longterm_read_pin_of_a_shared_page_unshares_it_first(vm: Vmm) -> None:
    vm.host_write(0, 1)
    child = fork_process(vm.process)
    vm.brackets()
    pfn = pin_user_page(vm.mm, vm.base, FOLL_LONGTERM)
    assert vm.brackets() == [("clear", 0, PAGE)]
    vm.host_write(0, 2)
    assert vm.host.ram.u64[(pfn << 12) // 8] == 2
    unpin_user_page(vm.host, pfn)
    exit_process(child)
    audit(vm.host)


def test_each_answer_is_an_event_caused_by_nothing_and_its_fault_by_the_access(vm: Vmm) -> None:
    events: list[Event] = []
    vm.host.stream.listen(Listener(["refault:*"], events.append))
    vm.guest_store(0x3000, 1)
    gups = [event for event in events if event.name == "gup"]
    answers = [(event.args["path"], event.args["pfn"] >= 0) for event in gups]
    assert answers == [("fast", False), ("slow", True)]
    done = next(event for event in events if event.name == "host_fault_done")
    fault = next(event for event in events if event.name == "host_fault")
    assert done.cause == fault.seq
    assert done.args["kind"] == "anon"


def test_a_read_fault_on_a_mapped_old_page_leaves_the_accessed_bit_to_the_cpu(vm: Vmm) -> None:
    vm.host_write(0, 1)
    run = vm.host.sched.run_task
    run("clear", lambda: clear_refs_write(vm.mm, CLEAR_REFS_ALL))
    vma = vm.mm.vma_lookup(vm.base)
    assert vma is not None
    old = lookup_address_in_mm(vm.mm, vm.base)[0]
    assert not old & _PAGE_ACCESSED
    run("read", lambda: handle_mm_fault(vma, vm.base, 0))
    assert lookup_address_in_mm(vm.mm, vm.base)[0] == old
    run("write", lambda: handle_mm_fault(vma, vm.base, FAULT_FLAG_WRITE))
    assert lookup_address_in_mm(vm.mm, vm.base)[0] == old | _PAGE_ACCESSED


def test_a_longterm_pin_for_writing_is_refused_where_a_file_must_know_of_writes() -> None:
    disk, memory = Shared(disk=b"disk"), Shared()
    for s, expected in ((disk, -EFAULT), (memory, 0)):
        answers: list[int] = []

        def pin(s: Shared = s, answers: list[int] = answers) -> None:
            copy_to_user(s.a, s.at, b"x")
            for flags in (FOLL_WRITE | FOLL_LONGTERM, FOLL_WRITE, FOLL_LONGTERM):
                pfn = pin_user_page(s.a.mm, s.at, flags)
                answers.append(min(pfn, 0))
                if pfn >= 0:
                    unpin_user_page(s.host, pfn)

        s.do(pin)
        assert answers == [expected, 0, 0]
        s.end()

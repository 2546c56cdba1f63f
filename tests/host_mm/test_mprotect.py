"""mprotect's brackets over large ranges, entries that are not present, pages that are writable at once."""

from __future__ import annotations

import pytest

from host_mm.arch.x86.pgtable import pte_present, pte_protnone, pte_write, walk_lockless
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_EXCLUSIVE,
    SWP_MIGRATION_READ_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    is_migration_entry,
    pte_to_swp_entry,
    swp_type,
)
from host_mm.fork import exit_process, fork_process
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mm_types import VM_MAYWRITE
from host_mm.mmap import PROT_EXEC, PROT_READ, PROT_WRITE, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.process import Process
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.task_mmu import clear_refs_write
from host_mm.truths import audit
from host_mm.uaccess import copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, Recorder, Vmm, make_host
from tests.host_mm.test_order_classes import BASE, record
from tests.host_mm.uffd_machine import errno_of

R, X, NONE = PROT_READ, PROT_EXEC, 0
GIB = 1 << 30
TIB = 1 << 40


def entry(vm: Vmm, offset: int) -> int:
    return walk_lockless(vm.host.ram, vm.mm.pgd, vm.base + offset)[0]


def sparse(populated: list[int], length: int, at: int) -> tuple[Process, Recorder]:
    """A mapping of `length` bytes with one page at each populated offset."""
    host = make_host()
    process = host.create_process("p")
    do_mmap(process.mm, at, length, RW, ANON | 0x10)
    for offset in populated:
        copy_to_user(process, at + offset, b"x")
    recorder = Recorder(at)
    mmu_notifier_register(recorder, process.mm)
    return process, recorder


@pytest.mark.parametrize(("populated", "brackets"), [
    ([], []),
    ([3 * GIB], [(3 * GIB, 512 * GIB)]),
    ([3 * GIB, 400 * GIB], [(3 * GIB, 512 * GIB)]),
    ([3 * GIB + 5 * PAGE], [(3 * GIB, 512 * GIB)]),
    ([600 * GIB], [(600 * GIB, TIB)]),
    ([3 * GIB, 600 * GIB, 700 * GIB], [(3 * GIB, 512 * GIB), (600 * GIB, TIB)]),
])
def test_each_512_gib_has_one_bracket_from_its_first_populated_gib(
    populated: list[int], brackets: list[tuple[int, int]]
) -> None:
    process, recorder = sparse(populated, TIB, TIB)
    do_mprotect(process.mm, TIB, TIB, R)
    assert recorder.take() == [("protection-vma", start, end) for start, end in brackets]
    assert recorder.depth == 0


def test_a_range_that_starts_in_a_populated_gib_is_bracketed_from_its_own_start() -> None:
    process, recorder = sparse([GIB], 4 * GIB, TIB)
    do_mprotect(process.mm, TIB + GIB + 7 * (2 << 20), 2 << 20, R)
    assert recorder.take()[-1] == ("protection-vma", GIB + 7 * (2 << 20), GIB + 8 * (2 << 20))


def test_taking_and_giving_rights_both_flush_after_the_end() -> None:
    def prepare(process: Process) -> None:
        do_mprotect(process.mm, BASE, PAGE, R)

    taken = record(lambda p: do_mprotect(p.mm, BASE, PAGE, R))
    given = record(lambda p: do_mprotect(p.mm, BASE, PAGE, RW), prepare=prepare)
    assert taken.log == given.log == ["start", "clear", "set", "end", "flush"]


def test_the_same_rights_again_do_nothing() -> None:
    seen = record(lambda p: do_mprotect(p.mm, BASE, PAGE, RW))
    assert seen.log == []


def test_bad_arguments_and_how_far_a_call_came() -> None:
    vm = Vmm()
    mm, base = vm.mm, vm.base
    assert errno_of(lambda: do_mprotect(mm, base + 1, PAGE, R)) == "EINVAL"
    assert errno_of(lambda: do_mprotect(mm, base, 0, R)) == "ok"
    do_munmap(mm, base + 2 * PAGE, PAGE)
    assert errno_of(lambda: do_mprotect(mm, base + 2 * PAGE, PAGE, R)) == "ENOMEM"
    assert errno_of(lambda: do_mprotect(mm, base, 4 * PAGE, R)) == "ENOMEM"
    assert errno_of(lambda: vm.host_write(PAGE, 1)) == "EFAULT", "what lies before the hole was changed"
    vm.host_write(3 * PAGE, 1)
    vma = mm.vma_lookup(base)
    assert vma is not None
    vma.flags &= ~VM_MAYWRITE
    assert errno_of(lambda: do_mprotect(mm, base, PAGE, RW)) == "EACCES"
    assert errno_of(lambda: do_mprotect(mm, base, PAGE, R | X)) == "ok"


def test_swap_entries_stay_and_the_swap_in_goes_by_the_new_rights() -> None:
    vm = Vmm()
    vm.guest_store(0, 7)

    def out() -> None:
        vm.host.lru.lru_add_drain_all()
        do_madvise(vm.mm, vm.base, PAGE, MADV_PAGEOUT)
        vm.host.swap_device.drain()

    vm.host.sched.run_task("out", out)
    slot = entry(vm, 0)
    assert slot & _PAGE_SWP_EXCLUSIVE
    do_mprotect(vm.mm, vm.base, PAGE, R)
    assert entry(vm, 0) == slot
    assert vm.host.sched.run_task("in", lambda: vm.host_read(0)) == 7
    assert not pte_write(entry(vm, 0))
    do_mprotect(vm.mm, vm.base, PAGE, RW)
    assert pte_write(entry(vm, 0)), "it came back exclusive"


def test_a_writable_migration_entry_loses_the_right_and_keeps_its_exclusivity() -> None:
    vm = Vmm()
    vm.guest_store(0, 7)
    kinds: list[int] = []
    finish = vm.host.ram.copy_page

    def copy_page(dst: int, src: int) -> None:
        kinds.append(swp_type(pte_to_swp_entry(entry(vm, 0))))
        assert is_migration_entry(pte_to_swp_entry(entry(vm, 0)))
        do_mprotect(vm.mm, vm.base, PAGE, R)
        kinds.append(swp_type(pte_to_swp_entry(entry(vm, 0))))
        finish(dst, src)

    vm.host.ram.copy_page = copy_page  # type: ignore[method-assign]
    vm.host.sched.run_task("move", lambda: move_pages(vm.process, [vm.base], [1]))
    assert kinds == [SWP_MIGRATION_WRITE, SWP_MIGRATION_READ_EXCLUSIVE]
    assert pte_present(entry(vm, 0))
    assert not pte_write(entry(vm, 0))
    assert vm.host_read(0) == 7
    do_mprotect(vm.mm, vm.base, PAGE, RW)
    assert pte_write(entry(vm, 0))
    vm.host.sched.run_task("rest", vm.host.quiesce)
    audit(vm.host)


def test_which_pages_are_writable_without_a_fault() -> None:
    vm = Vmm()
    vm.guest_load(0)
    vm.guest_store(PAGE, 1)
    child = fork_process(vm.process)
    vm.guest_store(2 * PAGE, 1)
    do_mprotect(vm.mm, vm.base, 4 * PAGE, R)
    do_mprotect(vm.mm, vm.base, 4 * PAGE, RW)
    writable = [pte_write(entry(vm, page * PAGE)) for page in range(3)]
    assert writable == [False, False, True], "zero page, shared with the child, exclusive"
    clear_refs_write(vm.mm, 4)
    do_mprotect(vm.mm, vm.base, 4 * PAGE, R)
    do_mprotect(vm.mm, vm.base, 4 * PAGE, RW)
    assert not pte_write(entry(vm, 2 * PAGE)), "its next write must make it soft-dirty"
    exit_process(child)


def test_no_rights_leave_a_mapped_page_that_only_the_kernel_reaches() -> None:
    vm = Vmm()
    vm.guest_store(0, 7)
    do_mprotect(vm.mm, vm.base, PAGE, NONE)
    assert pte_protnone(entry(vm, 0))
    assert errno_of(lambda: vm.host_read(0)) == "EFAULT"
    do_mprotect(vm.mm, vm.base, PAGE, PROT_WRITE | R)
    assert vm.host_read(0) == 7


@pytest.mark.parametrize(("profile", "vmas"), [
    (LINUX_6_18, [(0, 2), (2, 3), (3, 4), (4, 16)]), (LINUX_5_10, [(0, 2), (2, 4), (4, 16)]),
])
def test_what_was_never_touched_no_longer_counts_and_does_not_merge_with_what_was(
    profile: MmProfile, vmas: list[tuple[int, int]]
) -> None:
    host = make_host(profile=profile)
    process = host.create_process("p")
    do_mmap(process.mm, TIB, 16 * PAGE, RW, ANON | 0x10)
    do_mprotect(process.mm, TIB + 2 * PAGE, PAGE, NONE)
    copy_to_user(process, TIB + 3 * PAGE, b"x")
    do_mprotect(process.mm, TIB + 3 * PAGE, PAGE, NONE)
    assert [((v.start - TIB) // PAGE, (v.end - TIB) // PAGE) for v in process.mm.vmas] == vmas
    do_mprotect(process.mm, TIB + 2 * PAGE, 2 * PAGE, RW)
    assert [(v.start, v.end) for v in process.mm.vmas][-1][1] == TIB + 16 * PAGE

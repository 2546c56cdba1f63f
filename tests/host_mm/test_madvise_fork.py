"""What a child gets of ranges that madvise marked, and what may not be marked."""

from __future__ import annotations

import pytest

from host_mm.address_space import fput
from host_mm.fork import exit_process, fork_process
from host_mm.madvise import MADV_DOFORK, MADV_DONTFORK, MADV_KEEPONFORK, MADV_WIPEONFORK, do_madvise
from host_mm.memfd import memfd_create
from host_mm.mm_types import VM_IO
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, do_mmap, do_munmap
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, RW, Vmm
from tests.host_mm.uffd_machine import errno_of

FORK_ADVICE = [MADV_DONTFORK, MADV_DOFORK, MADV_WIPEONFORK, MADV_KEEPONFORK]


def first_byte(vm: Vmm, *advice: int) -> bytes | None:
    """What a child reads at the start of the slot after these; None: nothing is there."""
    vm.host_write(0, 7)
    for number in advice:
        do_madvise(vm.mm, vm.base, PAGE, number)
    child = fork_process(vm.process)
    mapped = child.mm.vma_lookup(vm.base) is not None
    found = copy_from_user(child, vm.base, 1) if mapped else None
    exit_process(child)
    audit(vm.host)
    assert vm.host_read(0) == 7
    return found


def test_what_the_child_gets() -> None:
    assert first_byte(Vmm()) == b"\x07"
    assert first_byte(Vmm(), MADV_DONTFORK) is None
    assert first_byte(Vmm(), MADV_DONTFORK, MADV_DOFORK) == b"\x07"
    assert first_byte(Vmm(), MADV_WIPEONFORK) == b"\0"
    assert first_byte(Vmm(), MADV_WIPEONFORK, MADV_KEEPONFORK) == b"\x07"
    assert first_byte(Vmm(), MADV_WIPEONFORK, MADV_DONTFORK) is None


def test_a_wiped_child_can_write_and_so_can_its_own_child() -> None:
    vm = Vmm()
    vm.host_write(0, 7)
    do_madvise(vm.mm, vm.base, PAGE, MADV_WIPEONFORK)
    child = fork_process(vm.process)
    copy_to_user(child, vm.base, b"\x09")
    grandchild = fork_process(child)
    assert copy_from_user(grandchild, vm.base, 1) == b"\0", "it is wiped again"
    copy_to_user(grandchild, vm.base, b"\x0a")
    assert (copy_from_user(child, vm.base, 1), vm.host_read(0)) == (b"\x09", 7)
    exit_process(grandchild)
    exit_process(child)
    audit(vm.host)


def test_ranges_that_are_not_copied_are_not_bracketed() -> None:
    vm = Vmm()
    vm.host_write(0, 7)
    do_madvise(vm.mm, vm.base, 8 << 20, MADV_DONTFORK)
    vm.brackets()
    exit_process(fork_process(vm.process))
    assert all(not 0 <= start < 8 << 20 for _, start, _ in vm.brackets())


@pytest.mark.parametrize("advice", FORK_ADVICE)
def test_bad_ranges(advice: int) -> None:
    vm = Vmm()
    assert errno_of(lambda: do_madvise(vm.mm, vm.base + 1, PAGE, advice)) == "EINVAL"
    assert errno_of(lambda: do_madvise(vm.mm, vm.base, -2 * PAGE, advice)) == "EINVAL"
    assert errno_of(lambda: do_madvise(vm.mm, vm.base, 0, advice)) == "ok"
    do_munmap(vm.mm, vm.base + PAGE, PAGE)
    assert errno_of(lambda: do_madvise(vm.mm, vm.base + PAGE, PAGE, advice)) == "ENOMEM"


def test_over_a_hole_the_rest_is_marked_all_the_same() -> None:
    vm = Vmm()
    do_munmap(vm.mm, vm.base + PAGE, PAGE)
    assert errno_of(lambda: do_madvise(vm.mm, vm.base, 3 * PAGE, MADV_DONTFORK)) == "ENOMEM"
    child = fork_process(vm.process)
    assert child.mm.vma_lookup(vm.base) is None
    assert child.mm.vma_lookup(vm.base + 2 * PAGE) is None
    exit_process(child)


def test_what_may_not_be_wiped_or_copied() -> None:
    vm = Vmm()
    file = memfd_create(vm.host, "f", PAGE)
    shared = do_mmap(vm.mm, 0, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS)
    private = do_mmap(vm.mm, 0, PAGE, RW, MAP_PRIVATE, file=file)
    for address in (shared, private):
        assert errno_of(lambda at=address: do_madvise(vm.mm, at, PAGE, MADV_WIPEONFORK)) == "EINVAL"
        assert errno_of(lambda at=address: do_madvise(vm.mm, at, PAGE, MADV_DONTFORK)) == "ok"
    vma = vm.mm.vma_lookup(vm.base)
    assert vma is not None
    vma.flags |= VM_IO
    assert errno_of(lambda: do_madvise(vm.mm, vm.base, PAGE, MADV_DOFORK)) == "EINVAL"
    vma.flags &= ~VM_IO
    fput(file)

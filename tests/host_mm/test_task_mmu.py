"""clear_refs, kind by kind."""

from __future__ import annotations

import pytest

from host_mm.arch.x86.pgtable import _PAGE_ACCESSED, _PAGE_SOFT_DIRTY, pte_write, walk_lockless
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.page import PG_referenced
from host_mm.pagemap import PM_SOFT_DIRTY, pagemap_read
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.task_mmu import clear_refs_write
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm
from tests.host_mm.uffd_machine import errno_of


def entry(vm: Vmm, offset: int) -> int:
    return walk_lockless(vm.host.ram, vm.mm.pgd, vm.base + offset)[0]


@pytest.mark.parametrize("kind", [-1, 0, 6])
def test_other_kinds_are_refused(kind: int) -> None:
    vm = Vmm()
    assert errno_of(lambda: clear_refs_write(vm.mm, kind)) == "EINVAL"
    assert vm.brackets() == []


@pytest.mark.parametrize(("kind", "cleared"), [(1, True), (2, True), (3, False)])
def test_kinds_1_to_3_forget_accesses_of_their_pages_and_tell_nobody(kind: int, cleared: bool) -> None:
    vm = Vmm()
    vm.host_write(0, 1)
    pfn = entry(vm, 0) >> 12 & 0xFFFFFFFFFF
    vm.host.pages.flags[pfn] |= PG_referenced
    clear_refs_write(vm.mm, kind)
    assert bool(entry(vm, 0) & _PAGE_ACCESSED) != cleared
    assert bool(vm.host.pages.flags[pfn] & PG_referenced) != cleared
    assert vm.brackets() == []


@pytest.mark.parametrize("profile", [LINUX_6_18, LINUX_5_10], ids=lambda profile: profile.name)
def test_kind_4_protects_and_forgets_writes_but_not_of_pinned_pages(profile: MmProfile) -> None:
    vm = Vmm(profile=profile)
    vm.guest_store(0, 1)
    vm.guest_store(PAGE, 1)
    pfn = pin_user_page(vm.mm, vm.base + PAGE, FOLL_WRITE | FOLL_LONGTERM)
    vm.notifier.base = 0
    clear_refs_write(vm.mm, 4)
    assert vm.brackets() == [("soft-dirty", 0, (1 << 64) - 1)]
    assert not pte_write(entry(vm, 0))
    assert not entry(vm, 0) & _PAGE_SOFT_DIRTY
    assert pte_write(entry(vm, PAGE))
    vm.guest_store(0, 2)
    assert entry(vm, 0) & _PAGE_SOFT_DIRTY
    unpin_user_page(vm.host, pfn, dirty=True)


def test_without_the_bit_kind_4_is_a_bracket_that_protects_nothing() -> None:
    vm = Vmm(params={"mm.soft_dirty": "N"})
    vm.guest_store(0, 1)
    before = entry(vm, 0)
    vm.notifier.base = 0
    clear_refs_write(vm.mm, 4)
    assert vm.brackets() == [("soft-dirty", 0, (1 << 64) - 1)]
    assert entry(vm, 0) == before
    assert pte_write(before)
    assert not pagemap_read(vm.mm, vm.base, 1)[0] & PM_SOFT_DIRTY


def test_kind_5_makes_the_peak_what_is_mapped_now() -> None:
    vm = Vmm()
    for page in range(8):
        vm.guest_store(page * PAGE, 1)
    do_madvise(vm.mm, vm.base, 8 * PAGE, MADV_DONTNEED)
    now = vm.mm.get_mm_rss()
    assert vm.mm.hiwater_rss == now + 8
    vm.brackets()
    clear_refs_write(vm.mm, 5)
    assert vm.mm.hiwater_rss == now
    assert vm.brackets() == []
    audit(vm.host)

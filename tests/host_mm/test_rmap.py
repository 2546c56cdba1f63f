"""Reverse mapping: who is found, who is counted, and what unmapping leaves (host_mm/rmap*.py)."""

from __future__ import annotations

import pytest

from host_mm.arch.x86 import pgtable as pt
from host_mm.arch.x86.swapops import is_writable_migration_entry, pte_to_swp_entry
from host_mm.filemap import folio_lock, folio_unlock
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.mmap import do_munmap
from host_mm.mprotect import do_mprotect
from host_mm.page import PG_anon_exclusive
from host_mm.process import Process
from host_mm.rmap import folio_referenced, rmap_walk
from host_mm.rmap_unmap import TTU_BATCH_FLUSH, remove_migration_ptes, try_to_migrate
from host_mm.tlb import try_to_unmap_flush
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, Vmm


def entry(process: Process, address: int) -> int:
    value, level = pt.lookup_address_in_mm(process.mm, address)
    assert level == 1
    return value


def frame(process: Process, address: int) -> int:
    return pt.pte_pfn(entry(process, address))


def mapped_by(vm: Vmm, pfn: int) -> list[int]:
    found: list[int] = []

    def one(vma: object, address: int) -> bool:
        mm = vma.mm  # type: ignore[attr-defined]
        value, level = pt.lookup_address_in_mm(mm, address)
        if level == 1 and pt.pte_present(value) and pt.pte_pfn(value) == pfn:
            found.append(mm.process.pid)
        return True

    rmap_walk(vm.host, pfn, one)
    return found


def test_a_shared_page_is_found_in_every_generation() -> None:
    vm = Vmm()
    vm.host_write(0, 1)
    pfn = frame(vm.process, vm.base)
    child = fork_process(vm.process)
    grandchild = fork_process(child)
    pids = [vm.process.pid, child.pid, grandchild.pid]
    assert mapped_by(vm, pfn) == pids
    assert vm.host.pages.mapcount[pfn] == 3
    copy_to_user(child, vm.base, b"mine")
    assert mapped_by(vm, pfn) == [vm.process.pid, grandchild.pid]
    own = frame(child, vm.base)
    assert mapped_by(vm, own) == [child.pid]
    exit_process(child)
    assert mapped_by(vm, pfn) == [vm.process.pid, grandchild.pid]
    audit(vm.host)


def test_the_last_owner_of_a_once_shared_page_writes_it_in_place() -> None:
    vm = Vmm()
    vm.host_write(0, 1)
    vm.host.lru.lru_add_drain_all()
    pfn = frame(vm.process, vm.base)
    child = fork_process(vm.process)
    assert not vm.host.pages.flags[pfn] & PG_anon_exclusive
    exit_process(child)
    vm.brackets()
    vm.host_write(0, 2)
    assert frame(vm.process, vm.base) == pfn
    assert vm.host.pages.flags[pfn] & PG_anon_exclusive
    assert vm.brackets() == []


def test_chains_do_not_grow_with_dead_children() -> None:
    vm = Vmm()
    vm.host_write(0, 1)
    vma = vm.mm.vma_lookup(vm.base)
    assert vma is not None
    process = vm.process
    for _ in range(6):
        child = fork_process(process)
        if process is not vm.process:
            exit_process(process)
        process = child
    last = process.mm.vma_lookup(vm.base)
    assert last is not None
    assert len(last.anon_vma_chain) <= 3
    exit_process(process)
    assert vma.anon_vma is not None
    assert len(vma.anon_vma.chains) == 1


def test_a_page_is_found_after_its_vma_was_split_and_merged() -> None:
    vm = Vmm()
    vm.host_write(5 * PAGE, 1)
    pfn = frame(vm.process, vm.base + 5 * PAGE)
    do_mprotect(vm.mm, vm.base + 3 * PAGE, 4 * PAGE, 1)
    assert mapped_by(vm, pfn) == [vm.process.pid]
    do_mprotect(vm.mm, vm.base + 3 * PAGE, 4 * PAGE, 3)
    assert mapped_by(vm, pfn) == [vm.process.pid]
    do_munmap(vm.mm, vm.base, 2 * PAGE)
    assert mapped_by(vm, pfn) == [vm.process.pid]


def test_referenced_counts_each_mapping_once_and_asks_the_notifier() -> None:
    vm = Vmm()
    vm.host_write(0, 1)
    pfn = frame(vm.process, vm.base)
    child = fork_process(vm.process)
    copy_from_user(child, vm.base, 1)
    vm.brackets()
    assert folio_referenced(vm.host, pfn)[0] == 2
    assert vm.brackets() == [("young", 0, PAGE)]
    assert folio_referenced(vm.host, pfn)[0] == 0


@pytest.mark.parametrize("flags", [0, TTU_BATCH_FLUSH])
def test_migration_entries_come_back_with_rights_history_and_exclusivity(flags: int) -> None:
    vm = Vmm()
    vm.host_write(0, 7)
    before = entry(vm.process, vm.base)
    pfn = pt.pte_pfn(before)
    host = vm.host
    host.pages.refcount[pfn] += 1
    folio_lock(host, pfn)
    anon_vma = host.pages.mapping[pfn]
    assert try_to_migrate(host, pfn, flags)
    try_to_unmap_flush(host)
    away = pte_to_swp_entry(entry(vm.process, vm.base))
    assert is_writable_migration_entry(away)
    assert host.pages.mapcount[pfn] == 0
    remove_migration_ptes(host, pfn, pfn, anon_vma)
    assert entry(vm.process, vm.base) == before
    assert host.pages.flags[pfn] & PG_anon_exclusive
    folio_unlock(host, pfn)
    host.pages.refcount[pfn] -= 1
    audit(host)


def test_a_pinned_exclusive_page_refuses_to_be_unmapped() -> None:
    vm = Vmm()
    vm.host_write(0, 7)
    before = entry(vm.process, vm.base)
    pfn = pin_user_page(vm.mm, vm.base, FOLL_WRITE | FOLL_LONGTERM)
    folio_lock(vm.host, pfn)
    assert not try_to_migrate(vm.host, pfn)
    folio_unlock(vm.host, pfn)
    assert entry(vm.process, vm.base) == before
    unpin_user_page(vm.host, pfn)
    audit(vm.host)

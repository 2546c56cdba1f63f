"""What an audit finds of anon_vmas and of mlocked pages (host_mm/truths_rmap.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host_mm.arch.x86.pgtable import lookup_address_in_mm, pte_pfn
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth
from host_mm.mlock import do_mlock
from host_mm.mm_types import VM_LOCKED, AnonVma, AnonVmaChain, VmArea
from host_mm.mprotect import do_mprotect
from host_mm.page import PG_mlocked, PG_unevictable
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm
from tests.host_mm.thp_machine import ThpVmm

LOCKED = 64 * PAGE


def make() -> Vmm:
    """A process with a forked child: page 0 is of both, page 1 of each; 4 pages elsewhere are mlocked."""
    vm = Vmm()
    for page in range(2):
        vm.guest_store(page * PAGE, 1)
    vm.child = fork_process(vm.process)  # type: ignore[attr-defined]
    vm.guest_store(PAGE, 2)
    do_mlock(vm.mm, vm.base + LOCKED, 4 * PAGE, 0)
    vm.host.lru.lru_add_drain_all()
    audit(vm.host)
    return vm


def area(vm: Vmm, offset: int = 0) -> VmArea:
    vma = vm.mm.vma_lookup(vm.base + offset)
    assert vma is not None
    return vma


def frame(vm: Vmm, offset: int = 0) -> int:
    return pte_pfn(lookup_address_in_mm(vm.mm, vm.base + offset)[0])


def _unlinked(vm: Vmm) -> None:
    area(vm).anon_vma.chains.clear()  # type: ignore[union-attr]


def _lost_link(vm: Vmm) -> None:
    vma = area(vm)
    vma.anon_vma_chain = [avc for avc in vma.anon_vma_chain if avc.anon_vma is not vma.anon_vma]


def _two_roots(vm: Vmm) -> None:
    vma, other = area(vm), AnonVma(vm.host, None)
    avc = AnonVmaChain(vma, other)
    vma.anon_vma_chain.append(avc)
    other.chains[id(avc)] = avc


def _gone_vma(vm: Vmm) -> None:
    avc = AnonVmaChain(VmArea(vm.mm, 0, PAGE, 0, 0), area(vm).anon_vma)  # type: ignore[arg-type]
    avc.anon_vma.chains[id(avc)] = avc


def _active(vm: Vmm) -> None:
    area(vm).anon_vma.num_active_vmas += 1  # type: ignore[union-attr]


def _children(vm: Vmm) -> None:
    area(vm).anon_vma.root.num_children -= 1  # type: ignore[union-attr]


def _mapping(vm: Vmm) -> None:
    vm.host.pages.mapping[frame(vm)] = AnonVma(vm.host, None)


def _index(vm: Vmm) -> None:
    vm.host.pages.index[frame(vm)] += 1


def _childs_mapping(vm: Vmm) -> None:
    # The page is the parent's, too, which is not in the chain of what the child made since.
    vma = vm.child.mm.vma_lookup(vm.base)  # type: ignore[attr-defined]
    vm.host.pages.mapping[frame(vm)] = vma.anon_vma


def _marked(vm: Vmm) -> None:
    vm.host.pages.flags[frame(vm)] |= PG_mlocked


def _evictable(vm: Vmm) -> None:
    pfn, lru = frame(vm, LOCKED), vm.host.lru
    vec = lru.lruvec(pfn)
    vec.remove(pfn, vm.host.pages.flags[pfn])
    vm.host.pages.flags[pfn] &= ~PG_unevictable
    vec.add(pfn, vm.host.pages.flags[pfn])


def _count(vm: Vmm) -> None:
    vm.host.lru.mlock.count[frame(vm, LOCKED)] += 1


def _unlocked(vm: Vmm) -> None:
    area(vm, LOCKED).flags &= ~VM_LOCKED


@pytest.mark.parametrize(("spoil", "truth"), [
    (_unlinked, "anon-vma"), (_lost_link, "anon-vma"), (_two_roots, "anon-vma"), (_gone_vma, "anon-vma"),
    (_active, "anon-vma"), (_children, "anon-vma"), (_mapping, "anon-rmap"), (_index, "anon-rmap"),
    (_childs_mapping, "anon-rmap"), (_marked, "mlock"), (_evictable, "mlock"), (_count, "mlock"),
    (_unlocked, "mlock"),
])
def test_what_a_walk_would_miss_is_found(spoil: Callable[[Vmm], None], truth: str) -> None:
    vm = make()
    spoil(vm)
    with pytest.raises(BrokenTruth) as caught:
        audit(vm.host)
    assert caught.value.truth == truth


def test_a_chain_that_says_too_little_of_a_huge_page_is_found() -> None:
    vm = ThpVmm()
    vm.fill(0, 2)
    vm.audit()
    vm.host.pages.index[frame(vm)] += 1
    with pytest.raises(BrokenTruth, match="anon-rmap"):
        vm.audit()


def test_a_batch_may_still_have_what_is_to_be_unlocked() -> None:
    vm = make()
    area(vm, LOCKED).flags &= ~VM_LOCKED
    for page in range(4):
        vm.host.lru.mlock.munlock_folio(frame(vm, LOCKED + page * PAGE))
    audit(vm.host)
    vm.host.lru.lru_add_drain_all()
    audit(vm.host)


def test_cut_and_merged_areas_and_the_end_of_a_child_keep_the_chains() -> None:
    vm = make()
    do_mprotect(vm.mm, vm.base, PAGE, 1)
    audit(vm.host)
    do_mprotect(vm.mm, vm.base, PAGE, 3)
    audit(vm.host)
    exit_process(vm.child)  # type: ignore[attr-defined]
    audit(vm.host)

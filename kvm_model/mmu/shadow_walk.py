"""The walk of an address down a vCPU's own tables, where they are not the TDP MMU's.

Source of truth: arch/x86/kvm/mmu/mmu.c (Linux 6.18): shadow_walk_init_using_root, shadow_walk_okay,
shadow_walk_next, get_walk, shadow_page_table_clear_flood; spte.h: root_to_sp; mmu.h: kvm_mmu_get_dummy_root.

The address is the guest's linear one, or a gpa where pages are direct. The root of a guest outside 64-bit
paging is a page of four entries, which no struct kvm_mmu_page stands for; a guest whose CR3 points to no
memslot runs on the dummy root, the zero page.

Not modelled: the 4-level roots over 32-bit ones that shadowing a nested guest's NPT needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_model.mmu.spte import is_last_spte, is_shadow_present_pte, spte_to_pfn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.kvm_main import Kvm
    from kvm_model.mmu.mmu_internal import KvmMmuPage
    from kvm_model.vcpu import Vcpu

__all__ = [
    "for_each_shadow_entry", "get_walk", "kvm_mmu_get_dummy_root", "kvm_mmu_is_dummy_root",
    "shadow_page_table_clear_flood", "shadow_root_to_sp",
]

_PT32E_ROOT_LEVEL = 3


def kvm_mmu_get_dummy_root(kvm: Kvm) -> int:
    """The address of a root that maps nothing."""
    return kvm.host.zero_pfn << 12


def kvm_mmu_is_dummy_root(kvm: Kvm, root_hpa: int) -> bool:
    """Whether it is that root."""
    return root_hpa >> 12 == kvm.host.zero_pfn


def shadow_root_to_sp(kvm: Kvm, root_hpa: int) -> KvmMmuPage | None:
    """The page of a root; None of a special one: four PAE entries, or the dummy."""
    return kvm.sps.get(root_hpa >> 12)


def for_each_shadow_entry(vcpu: Vcpu, root_hpa: int, addr: int) -> Iterator[tuple[int, int]]:
    """(level, index in Ram.u64) of the entries that translate `addr`, from the root down.

    What stands in each is read only when the walk goes on.
    """
    u64 = vcpu.kvm.ram.u64
    level = vcpu.mmu.root_level
    table = root_hpa >> 3
    if level == _PT32E_ROOT_LEVEL:
        table = spte_to_pfn(u64[table + (addr >> 30 & 3)]) << 9
        if not table:
            return
        level -= 1
    while True:
        sptep = table + (addr >> 12 + 9 * (level - 1) & 511)
        yield level, sptep
        spte = u64[sptep]
        if not is_shadow_present_pte(spte) or is_last_spte(spte, level):
            return
        table = spte_to_pfn(spte) << 9
        level -= 1


def get_walk(vcpu: Vcpu, addr: int) -> list[tuple[int, int, int]]:
    """(level, index in Ram.u64, SPTE) of each step of the walk of `addr`; without mmu_lock."""
    kvm = vcpu.kvm
    kvm.rcu.read_lock()
    steps = [
        (level, sptep, kvm.ram.u64[sptep])
        for level, sptep in for_each_shadow_entry(vcpu, vcpu.root_hpa, addr)
    ]
    kvm.rcu.read_unlock()
    return steps


def shadow_page_table_clear_flood(vcpu: Vcpu, addr: int) -> None:
    """The tables that translate `addr` are in use: emulated writes to them are counted anew."""
    for _, sptep, _ in get_walk(vcpu, addr):
        sp = vcpu.kvm.sps.get(sptep >> 9)
        if sp is not None:
            sp.write_flooding_count = 0

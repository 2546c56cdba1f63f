"""The truth about reverse maps: rmap-matches-sptes.

    every present leaf of a page outside the TDP MMU is in the rmap of its gfn and level, once
    every SPTE in an rmap is such a leaf
    every SPTE that points to a table is in the table's parent_ptes, once, and nothing else is
    what is on the list of active pages, in the hash and counted are the same pages

Source of truth: the rules themselves (arch/x86/kvm/mmu/mmu.c: "About rmap_head encoding"); Linux 6.18.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from kvm_model.mmu.rmap import rmap_sptes
from kvm_model.mmu.shadow_spte import kvm_mmu_page_get_gfn
from kvm_model.mmu.spte import SPTE_MMU_PRESENT_MASK, is_last_spte, spte_to_pfn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.kvm_main import Kvm
    from kvm_model.mmu.mmu_internal import KvmMmuPage

__all__ = ["check_rmaps", "shadow_entries"]

_TRUTH = "rmap-matches-sptes"


def shadow_entries(kvm: Kvm, sp: KvmMmuPage) -> Iterator[tuple[int, int, int]]:
    """(sptep, gfn, SPTE) of the present entries of a page; the gfn is of leaves only."""
    table = sp.spt << 9
    for sptep, spte in enumerate(kvm.ram.u64[table : table + 512].tolist(), table):
        if spte & SPTE_MMU_PRESENT_MASK:
            yield sptep, kvm_mmu_page_get_gfn(sp, sptep & 511), spte


def check_rmaps(kvm: Kvm) -> None:
    """Compare all rmaps and parent_ptes with all SPTEs; nobody has mmu_lock."""
    mapped: Counter[tuple[int, ...]] = Counter()
    links: Counter[tuple[int, ...]] = Counter()
    for sp in kvm.sps.values():
        for sptep, gfn, spte in shadow_entries(kvm, sp):
            if is_last_spte(spte, sp.level):
                mapped[sp.level, gfn, sptep] += 1
            else:
                links[spte_to_pfn(spte), sptep] += 1
    in_rmaps: Counter[tuple[int, ...]] = Counter()
    for slot in (slot for slots in kvm.memslots for slot in slots):
        for level in (1, 2, 3):
            shift = 9 * (level - 1)
            for index, head in slot.rmap[level - 1].items():
                gfn = (index + (slot.base_gfn >> shift)) << shift
                in_rmaps.update((level, gfn, sptep) for sptep in rmap_sptes(head))
    _compare("the rmap of level {}, gfn {:#x}", mapped, in_rmaps)
    parents: Counter[tuple[int, ...]] = Counter(
        (sp.spt, sptep) for sp in kvm.sps.values() for sptep in rmap_sptes(sp.parent_ptes)
    )
    _compare("parent_ptes of table {:#x}", links, parents)
    _check_lists(kvm)


def _compare(where: str, want: Counter[tuple[int, ...]], have: Counter[tuple[int, ...]]) -> None:
    if want == have:
        return
    key = min(set(want - have) | set(have - want))
    times = f"{have[key]} times, the tables have it {want[key]} times"
    raise BrokenTruth(_TRUTH, f"{where.format(*key)} has SPTE {key[-1] << 3:#x} {times}")


def _check_lists(kvm: Kvm) -> None:
    hashed = {sp.spt for pages in kvm.mmu_page_hash.values() for sp in pages}
    if hashed != set(kvm.sps):
        raise BrokenTruth(_TRUTH, f"tables {sorted(hashed ^ set(kvm.sps))} are hashed or exist, not both")
    listed = {spt for spt, sp in kvm.sps.items() if not sp.invalid}
    if set(kvm.active_mmu_pages) != listed or kvm.n_used_mmu_pages != len(kvm.sps):
        raise BrokenTruth(
            _TRUTH, f"{len(kvm.active_mmu_pages)} tables are active, {kvm.n_used_mmu_pages} counted, "
            f"{len(listed)} valid of {len(kvm.sps)}",
        )

"""A VM without the TDP MMU, for the tests of direct pages and rmaps."""

from __future__ import annotations

from typing import Any

from host_mm.madvise import MADV_DONTNEED, MADV_HUGEPAGE, do_madvise
from host_mm.uaccess import copy_to_user
from kvm_model.instrument import leaf_spte
from kvm_model.mmu.rmap import RmapHead, gfn_to_rmap, rmap_sptes
from tests.kvm_model.machine import BASE, PAGE, Machine

__all__ = ["direct", "direct_huge", "dontneed", "huge_in_2m", "lines", "populate", "rmap"]


def direct(*, params: dict[str, str] | None = None, **options: Any) -> Machine:
    return Machine(params={"kvm.tdp_mmu": "N"} | (params or {}), **options)


def direct_huge(**options: Any) -> Machine:
    """Two aligned huge pages, both mapped huge by the host as soon as they are touched."""
    m = direct(**{"pages": 1024, "ram": 32 << 20} | options)
    m.do(lambda: do_madvise(m.mm, BASE, 1024 * PAGE, MADV_HUGEPAGE))
    return m


def dontneed(m: Machine, first: int, pages: int = 1) -> None:
    m.do(lambda: do_madvise(m.mm, BASE + first * PAGE, pages * PAGE, MADV_DONTNEED))


def populate(m: Machine, *gfns: int) -> None:
    """The host maps these pages writable; no vCPU has touched them."""
    for gfn in gfns:
        m.do(lambda gfn=gfn: copy_to_user(m.process, BASE + gfn * PAGE, bytes([gfn % 251 + 1])))


def rmap(m: Machine, gfn: int, level: int = 1) -> list[int]:
    """Addresses of the SPTEs that the rmap has."""
    slot = m.kvm.slots().gfn_to_memslot(gfn)
    assert slot is not None
    head: RmapHead | None = gfn_to_rmap(gfn, level, slot)
    return [sptep << 3 for sptep in rmap_sptes(head)]


def huge_in_2m(m: Machine) -> bool:
    """Whether gfn 0 is mapped by a huge leaf."""
    return leaf_spte(m.kvm, 0)[1] == 2


def lines(m: Machine, *names: str, since: int = 0) -> list[str]:
    """The names of these events, in order."""
    return [event.name for event in m.events[since:] if event.name in names]

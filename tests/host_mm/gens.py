"""A small host with generations, a VMM on it, and a secondary MMU that has accessed bits."""

from __future__ import annotations

from typing import Any

from host_mm.lru_gen import GenLruvec
from host_mm.tlb import flush_tlb_mm
from tests.host_mm.machine import PAGE, Vmm, run
from tests.host_mm.young import YoungMmu


def machine(pages: int = 8, *, secondary: bool = True, **kw: Any) -> tuple[Vmm, YoungMmu | None]:
    """`pages` pages at the base, written, on their lists, nothing of them young in the entries."""
    params = {"mm.lru_gen": "Y", **kw.pop("params", {})}
    vmm = Vmm(params=params, **kw)
    mmu = YoungMmu(vmm.mm, vmm.base) if secondary else None
    run(vmm.host, lambda: fill(vmm, pages))
    if mmu is not None:
        mmu.take()
    return vmm, mmu


def fill(vmm: Vmm, pages: int) -> None:
    for page in range(pages):
        vmm.host_write(page * PAGE, page + 1)
    vmm.host.lru.lru_add_drain_all()
    make_old(vmm, range(pages))


def make_old(vmm: Vmm, pages: range) -> None:
    """Clear the entries' accessed bits and the CPU's translations."""
    for page in pages:
        vmm.host.ram.u64[vmm.pte(page * PAGE) >> 3] &= ~0x20
    flush_tlb_mm(vmm.mm)


def vec_of(vmm: Vmm, page: int = 0) -> GenLruvec:
    vec = vmm.host.lru.lruvec(vmm.pfn(page * PAGE))
    assert isinstance(vec, GenLruvec)
    return vec


def seq_of(vmm: Vmm, page: int) -> int:
    """The generation of a page, as a sequence number."""
    vec = vec_of(vmm, page)
    gen = vmm.host.gens.gen[vmm.pfn(page * PAGE)] - 1
    assert gen >= 0
    return next(seq for seq in range(vec.max_seq, vec.max_seq - 4, -1) if seq % 4 == gen)

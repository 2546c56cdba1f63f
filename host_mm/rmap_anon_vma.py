"""The anon_vmas of a VMA: made at its first page, shared with neighbours, cloned and forked.

Source of truth: mm/rmap.c (__anon_vma_prepare, anon_vma_clone, anon_vma_fork, unlink_anon_vmas), mm/vma.c:
find_mergeable_anon_vma; Linux 6.18.

A page belongs to the anon_vma of the VMA that faulted it; a fork gives the child VMA an anon_vma of its
own and links it to all of its parent's, so that an old page is found in both and a new one only where
it was made. All anon_vmas of one fork tree share their root's rwsem.

Not modelled: the interval tree of each anon_vma (its chain is a list).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.mm_types import VM_ACCESS_FLAGS, VM_SOFTDIRTY, AnonVma, AnonVmaChain

if TYPE_CHECKING:
    from host_mm.mm_types import VmArea

__all__ = [
    "anon_vma_clone", "anon_vma_fork", "anon_vma_prepare", "find_mergeable_anon_vma", "unlink_anon_vmas",
]


def _chain_link(vma: VmArea, anon_vma: AnonVma) -> None:
    avc = AnonVmaChain(vma, anon_vma)
    # Newest first, so that unlinking meets the root last.
    vma.anon_vma_chain.insert(0, avc)
    anon_vma.chains[id(avc)] = avc


def anon_vma_prepare(vma: VmArea) -> None:
    """See that the VMA has an anon_vma, a neighbour's if they could merge later."""
    if vma.anon_vma is not None:
        return
    mm = vma.mm
    anon_vma = find_mergeable_anon_vma(vma)
    if anon_vma is None:
        anon_vma = AnonVma(mm.host, None)
        anon_vma.num_children += 1
    anon_vma.root.rwsem.lock()
    mm.page_table_lock.lock()
    if vma.anon_vma is None:
        vma.anon_vma = anon_vma
        _chain_link(vma, anon_vma)
        anon_vma.num_active_vmas += 1
    mm.page_table_lock.unlock()
    anon_vma.root.rwsem.unlock()


def _compatible(a: VmArea, b: VmArea) -> bool:
    return (
        a.end == b.start and a.policy == b.policy and a.file is b.file
        and not (a.flags ^ b.flags) & ~(VM_ACCESS_FLAGS | VM_SOFTDIRTY)
        and b.pgoff == a.pgoff + ((b.start - a.start) >> 12)
    )


def _reusable(old: VmArea, a: VmArea, b: VmArea) -> AnonVma | None:
    if _compatible(a, b) and old.anon_vma is not None and len(old.anon_vma_chain) == 1:
        return old.anon_vma
    return None


def find_mergeable_anon_vma(vma: VmArea) -> AnonVma | None:
    """The next or previous VMA's anon_vma, if the two differ in protection only."""
    following = vma.mm.vma_lookup(vma.end)
    if following is not None and (found := _reusable(following, vma, following)) is not None:
        return found
    previous = vma.mm.vma_lookup(vma.start - 1) if vma.start else None
    return _reusable(previous, previous, vma) if previous is not None else None


def anon_vma_clone(dst: VmArea, src: VmArea) -> None:
    """Link `dst` to every anon_vma of `src`, under their root's lock."""
    root = src.anon_vma_chain[0].anon_vma.root if src.anon_vma_chain else None
    if root is not None:
        root.rwsem.lock()
    for pavc in reversed(src.anon_vma_chain):
        anon_vma = pavc.anon_vma
        _chain_link(dst, anon_vma)
        # An anon_vma whose own VMA is gone is reused, or chains would grow with every fork.
        if (dst.anon_vma is None and src.anon_vma is not None and anon_vma.num_children < 2
                and anon_vma.num_active_vmas == 0):
            dst.anon_vma = anon_vma
    if dst.anon_vma is not None:
        dst.anon_vma.num_active_vmas += 1
    if root is not None:
        root.rwsem.unlock()


def anon_vma_fork(vma: VmArea, pvma: VmArea) -> None:
    """A child's VMA: linked to the parent's anon_vmas, with one of its own for the pages it makes."""
    if pvma.anon_vma is None:
        return
    vma.anon_vma = None
    anon_vma_clone(vma, pvma)
    if vma.anon_vma is not None:
        return
    anon_vma = AnonVma(vma.mm.host, pvma.anon_vma)
    anon_vma.num_active_vmas += 1
    vma.anon_vma = anon_vma
    anon_vma.root.rwsem.lock()
    _chain_link(vma, anon_vma)
    anon_vma.parent.num_children += 1
    anon_vma.root.rwsem.unlock()


def unlink_anon_vmas(vma: VmArea) -> None:
    """The VMA goes away: hide it from every rmap walk."""
    if vma.anon_vma_chain:
        root = vma.anon_vma_chain[0].anon_vma.root
        root.rwsem.lock()
        for avc in vma.anon_vma_chain:
            anon_vma = avc.anon_vma
            del anon_vma.chains[id(avc)]
            if not anon_vma.chains:
                anon_vma.parent.num_children -= 1
        vma.anon_vma_chain = []
        if vma.anon_vma is not None:
            vma.anon_vma.num_active_vmas -= 1
            vma.anon_vma = None
        root.rwsem.unlock()

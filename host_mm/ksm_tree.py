"""The stable and the unstable tree.

Source of truth: mm/ksm.c (ksm_get_folio, remove_node_from_stable_tree, remove_rmap_item_from_tree,
stable_tree_search, stable_tree_insert, stable_tree_append, stable_node_dup,
unstable_tree_search_insert); Linux 6.18.

Both are ordered by the pages' bytes, as memcmp orders them. The stable tree holds KSM pages, which
nobody writes; the unstable one pages that did not change since the last scan but may at any moment,
so that its order can rot; every full scan starts it anew. A KSM page takes max_page_sharing places;
then another page with the same bytes begins, chained to the first.

Not modelled: the red-black shape (sorted lists, searched by halves), merge_across_nodes=0 with its tree
for each node.
"""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING

from host_mm.filemap import folio_lock, folio_trylock, folio_unlock
from host_mm.kernel.costs import COST_KSM_COMPARE
from host_mm.ksm_break import get_mergeable_page
from host_mm.ksm_types import (
    SEQNR_MASK,
    STABLE_FLAG,
    UNSTABLE_FLAG,
    KsmStableChain,
    KsmStableNode,
    folio_set_stable_node,
    folio_stable_node,
)
from host_mm.page import PG_swapcache, get_page, put_page, try_get_page
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.ksm_types import KsmRmapItem

__all__ = [
    "TRACEPOINTS", "ksm_get_folio", "memcmp_pages", "remove_rmap_item_from_tree", "remove_stable_node",
    "stable_tree_append", "stable_tree_insert", "stable_tree_search", "unstable_tree_search_insert",
]

KSM_REMOVE_KSM_PAGE = Tracepoint("ksm", "ksm_remove_ksm_page", ("pfn",), lambda pfn: f"pfn {pfn}")
KSM_REMOVE_RMAP_ITEM = Tracepoint(
    "ksm", "ksm_remove_rmap_item", ("pfn", "rmap_item", "mm"),
    lambda pfn, rmap_item, mm: f"pfn {pfn} rmap_item {rmap_item:016x} mm {mm:016x}",
    doc="For the pointers: the address that the rmap_item tracks, and the pid of the mm.",
)
TRACEPOINTS = (KSM_REMOVE_KSM_PAGE, KSM_REMOVE_RMAP_ITEM)

_NOLOCK, _LOCK, _TRYLOCK = range(3)
_MSEC = 1_000_000


def memcmp_pages(host: HostMm, a: int, b: int) -> int:
    """The order of two frames' bytes: negative, 0 or positive."""
    host.sched.advance(COST_KSM_COMPARE)
    one, two = host.ram.read(a << 12, 4096), host.ram.read(b << 12, 4096)
    return (one > two) - (one < two)


def _cond_resched(host: HostMm) -> None:
    if host.sched.preempt:
        host.sched.point("cond_resched")


# -- stable nodes -----------------------------------------------------------------------------
def _stable_node_del(host: HostMm, node: KsmStableNode) -> None:
    """stable_node_dup_del: out of its chain or out of the tree."""
    if node.chain is not None:
        node.chain.dups.remove(node)
        node.chain = None
        host.ksm.ksm_stable_node_dups -= 1
    else:
        host.ksm.stable_tree.remove(node)


def _remove_node_from_stable_tree(host: HostMm, node: KsmStableNode) -> None:
    ksm = host.ksm
    while node.hlist:
        item = node.hlist.pop(0)
        if node.hlist:
            ksm.ksm_pages_sharing -= 1
            if (t := host.trace.ksm_remove_rmap_item) is not None:
                t(node.kpfn, item.address, item.mm.process.pid)
        else:
            ksm.ksm_pages_shared -= 1
        _forget_stable(item)
        _cond_resched(host)
    if (t := host.trace.ksm_remove_ksm_page) is not None:
        t(node.kpfn)
    _stable_node_del(host, node)


def _forget_stable(item: KsmRmapItem) -> None:
    item.mm.ksm_merging_pages -= 1
    assert item.anon_vma is not None
    item.anon_vma.refcount -= 1
    item.anon_vma = None
    item.head = None
    item.flags = 0


def ksm_get_folio(host: HostMm, node: KsmStableNode, how: int = _NOLOCK) -> int:
    """The node's page with a reference, locked if asked; -EBUSY if a trylock failed.

    -1: the page is gone; the node and all its rmap_items have left the tree.
    """
    pages = host.pages
    while True:
        kpfn = node.kpfn
        if folio_stable_node(host, kpfn) is node:
            # A count of 0 is a page that is being freed, or one that migration froze for a moment.
            while not (got := try_get_page(host, kpfn)) and pages.flags[kpfn] & PG_swapcache:
                host.sched.yield_()
            if got:
                if folio_stable_node(host, kpfn) is node:
                    if how == _TRYLOCK and not folio_trylock(host, kpfn):
                        put_page(host, kpfn)
                        return -EBUSY
                    if how == _LOCK:
                        folio_lock(host, kpfn)
                    if folio_stable_node(host, kpfn) is node:
                        return kpfn
                    if how != _NOLOCK:
                        folio_unlock(host, kpfn)
                put_page(host, kpfn)
        if node.kpfn == kpfn:
            _remove_node_from_stable_tree(host, node)
            return -1


def remove_rmap_item_from_tree(host: HostMm, item: KsmRmapItem) -> None:
    """Take the item out of whichever tree it is in."""
    ksm = host.ksm
    if item.flags & STABLE_FLAG:
        node = item.head
        assert node is not None
        pfn = ksm_get_folio(host, node, _LOCK)
        if pfn >= 0:
            node.hlist.remove(item)
            folio_unlock(host, pfn)
            put_page(host, pfn)
            if node.hlist:
                ksm.ksm_pages_sharing -= 1
            else:
                ksm.ksm_pages_shared -= 1
            _forget_stable(item)
    elif item.flags & UNSTABLE_FLAG:
        # An item of an earlier scan went with the tree of that scan.
        if not (ksm.seqnr - item.flags) & SEQNR_MASK:
            ksm.unstable_tree.remove(item)
        ksm.ksm_pages_unshared -= 1
        item.flags = 0
    _cond_resched(host)


def remove_stable_node(host: HostMm, node: KsmStableNode) -> bool:
    """Take a node out whose page nobody maps; false if it is mapped."""
    pfn = ksm_get_folio(host, node, _LOCK)
    if pfn < 0:
        return True
    free = not host.pages.mapcount[pfn]
    if free:
        folio_set_stable_node(host, pfn, None)
        _remove_node_from_stable_tree(host, node)
    folio_unlock(host, pfn)
    put_page(host, pfn)
    return free


# -- chains -----------------------------------------------------------------------------------
def _is_page_sharing_candidate(host: HostMm, node: KsmStableNode, offset: int = 0) -> bool:
    return bool(node.hlist) and len(node.hlist) + offset < host.ksm.max_page_sharing


def _best_dup(host: HostMm, chain: KsmStableChain, *, prune: bool) -> tuple[int, KsmStableNode | None]:
    """The page of the chain that takes one more, the fullest of them when pruning; stale ones go."""
    ksm = host.ksm
    now = host.sched.now
    if prune and now < chain.prune_time + ksm.stable_node_chains_prune_millisecs * _MSEC:
        prune = False
    elif prune:
        chain.prune_time = now
    found: KsmStableNode | None = None
    tree = -1
    for dup in list(chain.dups):
        _cond_resched(host)
        pfn = ksm_get_folio(host, dup)
        if pfn < 0:
            continue
        if found is None or (_is_page_sharing_candidate(host, dup) and (
            not _is_page_sharing_candidate(host, found) or len(dup.hlist) > len(found.hlist)
        )):
            if found is not None:
                put_page(host, tree)
            found, tree = dup, pfn
            if not prune and _is_page_sharing_candidate(host, found):
                break
            continue
        put_page(host, pfn)
    return tree, found


_Entry = KsmStableNode | KsmStableChain


def _look(host: HostMm, index: int, *, prune: bool) -> tuple[int, _Entry, KsmStableNode | None]:
    """__stable_node_chain: (page with a reference or -1, entry of the tree, node of the page)."""
    ksm = host.ksm
    entry = ksm.stable_tree[index]
    if isinstance(entry, KsmStableNode):
        return ksm_get_folio(host, entry), entry, entry
    tree, found = _best_dup(host, entry, prune=prune)
    if found is None:
        ksm.stable_tree.remove(entry)
        ksm.ksm_stable_node_chains -= 1
        return -1, entry, None
    if len(entry.dups) == 1:
        ksm.stable_tree[index] = found
        found.chain = None
        ksm.ksm_stable_node_chains -= 1
        ksm.ksm_stable_node_dups -= 1
        return tree, found, found
    if entry.dups[0] is not found and _is_page_sharing_candidate(host, found, 1):
        entry.dups.remove(found)
        entry.dups.insert(0, found)
    return tree, entry, found


def _search(host: HostMm, pfn: int, *, prune: bool) -> tuple[int, _Entry | None, KsmStableNode | None]:
    """(index, entry, node) of the KSM page with the bytes of `pfn`; (where it would be, None, None)."""
    ksm = host.ksm
    low, high = 0, len(ksm.stable_tree)
    while low < high:
        _cond_resched(host)
        middle = (low + high) // 2
        tree, entry, node = _look(host, middle, prune=prune)
        if tree < 0:
            # What was stale has left the tree: everything may be elsewhere.
            low, high = 0, len(ksm.stable_tree)
            continue
        order = memcmp_pages(host, pfn, tree)
        put_page(host, tree)
        if not order:
            return middle, entry, node
        low, high = (low, middle) if order < 0 else (middle + 1, high)
    return low, None, None


# -- the stable tree --------------------------------------------------------------------------
def stable_tree_search(host: HostMm, pfn: int) -> int:
    """The KSM page with the same bytes, with a reference; -1: none, or full; -EBUSY: it is locked."""
    if folio_stable_node(host, pfn) is not None:
        # A fork has brought a KSM page to another address space.
        get_page(host, pfn)
        return pfn
    while True:
        _, _, node = _search(host, pfn, prune=True)
        if node is None or not _is_page_sharing_candidate(host, node):
            return -1
        tree = ksm_get_folio(host, node, _TRYLOCK)
        if tree >= 0:
            folio_unlock(host, tree)
        if tree != -1:
            return tree


def _chain_add_dup(host: HostMm, chain: KsmStableChain, node: KsmStableNode) -> None:
    node.chain = chain
    chain.dups.insert(0, node)
    host.ksm.ksm_stable_node_dups += 1


def stable_tree_insert(host: HostMm, pfn: int) -> KsmStableNode:
    """A node for a new, locked KSM page."""
    ksm = host.ksm
    index, entry, _ = _search(host, pfn, prune=False)
    node = KsmStableNode(pfn)
    if entry is None:
        ksm.stable_tree.insert(index, node)
    else:
        if isinstance(entry, KsmStableNode):
            chain = ksm.stable_tree[index] = KsmStableChain(host.sched.now)
            ksm.ksm_stable_node_chains += 1
            _chain_add_dup(host, chain, entry)
        else:
            chain = entry
        _chain_add_dup(host, chain, node)
    folio_set_stable_node(host, pfn, node)
    return node


def stable_tree_append(host: HostMm, item: KsmRmapItem, node: KsmStableNode) -> None:
    """One more place shares the node's locked page."""
    ksm = host.ksm
    item.head = node
    item.flags |= STABLE_FLAG
    if node.hlist:
        ksm.ksm_pages_sharing += 1
    else:
        ksm.ksm_pages_shared += 1
    node.hlist.insert(0, item)
    item.mm.ksm_merging_pages += 1


# -- the unstable tree ------------------------------------------------------------------------
def unstable_tree_search_insert(host: HostMm, item: KsmRmapItem, pfn: int) -> tuple[KsmRmapItem | None, int]:
    """(item whose page has the same bytes, that page with a reference); or the item is in the tree now."""
    ksm = host.ksm
    tree = ksm.unstable_tree
    low, high = 0, len(tree)
    while low < high:
        _cond_resched(host)
        middle = (low + high) // 2
        other = tree[middle]
        page = get_mergeable_page(other)
        if page < 0:
            return None, -1
        if page == pfn:
            put_page(host, page)
            return None, -1
        order = memcmp_pages(host, pfn, page)
        if not order:
            return other, page
        put_page(host, page)
        low, high = (low, middle) if order < 0 else (middle + 1, high)
    item.flags |= UNSTABLE_FLAG | (ksm.seqnr & SEQNR_MASK)
    tree.insert(low, item)
    ksm.ksm_pages_unshared += 1
    return None, -1

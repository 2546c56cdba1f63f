"""A frame whose memory has failed: who uses it is told, and nobody gets it again.

Source of truth: mm/memory-failure.c (memory_failure, hwpoison_user_mappings, unmap_poisoned_folio,
kill_procs, identify_page_state and the me_* actions, soft_offline_page, page_handle_poison),
include/ras/ras_event.h; Linux 6.18.

memory_failure marks the frame (PG_hwpoison) and takes a reference that is never given back. A free frame is
taken off its list. A mapped one is unmapped; its entries become poison entries, whose user gets SIGBUS, or
swap entries where the swap cache keeps the page. Who must know gets a signal at once: the process that hit
the error (BUS_MCEERR_AR), and those that asked to be told early (BUS_MCEERR_AO), if the lost bytes were the
only ones. A clean page of the swap cache is dropped and read again from its slot; a dirty one stays in the
cache, so that whoever faults on it is killed rather than given old bytes. A page of a file leaves the page
cache, with its bytes if it was dirty, and is read again; shmem, which has no other place, keeps it.

soft_offline_page loses nothing: the frame only aged. Its page is migrated, and the frame kept out of the
lists as above.

A huge page is split first.

Not modelled: pages of hugetlb, who is told when a huge page cannot be split, fsync's error for lost bytes of
a file, DAX, unpoisoning, the hwpoison filter, panic, the work queue of asynchronous errors.
"""

from __future__ import annotations

from errno import EBUSY, EIO, ENXIO, EOPNOTSUPP
from typing import TYPE_CHECKING

from host_mm.filemap import folio_lock, folio_unlock, folio_wait_writeback
from host_mm.kernel.errors import EHWPOISON
from host_mm.migrate import (
    MIGRATE_SYNC,
    MR_MEMORY_FAILURE,
    MigrationTarget,
    migrate_pages,
    putback_movable_pages,
)
from host_mm.page import (
    PG_active,
    PG_anon,
    PG_dirty,
    PG_head,
    PG_hugetlb,
    PG_hwpoison,
    PG_ksm,
    PG_lru,
    PG_mlocked,
    PG_reserved,
    PG_swapcache,
    PG_unevictable,
    PG_uptodate,
    PG_writeback,
    folio_test_large,
    page_folio,
    put_page,
    set_page_dirty,
    try_get_page,
)
from host_mm.page_alloc import GFP_MOVABLE, GFP_RETRY_MAYFAIL, GFP_USER
from host_mm.page_writeback import folio_mkclean
from host_mm.pgtable_generic import pte_lockptr
from host_mm.process import BUS_MCEERR_AO, BUS_MCEERR_AR
from host_mm.rmap import page_vma_mapped_walk, rmap_walk
from host_mm.rmap_unmap import TTU_HWPOISON, TTU_IGNORE_MLOCK, TTU_SYNC, try_to_unmap
from host_mm.swap_state import swap_cache_del_folio
from host_mm.truncate import truncate_inode_folio
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.mm_types import VmArea
    from host_mm.process import Process

__all__ = [
    "MF_ACTION_REQUIRED", "MF_COUNT_INCREASED", "TRACEPOINTS", "memory_failure", "soft_offline_page",
]

MF_COUNT_INCREASED = 1 << 0
MF_ACTION_REQUIRED = 1 << 1

_MAX_RETRIES = 3

# enum mf_result
_IGNORED, _FAILED, _DELAYED, _RECOVERED = range(4)
_RESULTS = ("Ignored", "Failed", "Delayed", "Recovered")

MEMORY_FAILURE_EVENT = Tracepoint(
    "ras", "memory_failure_event", ("pfn", "type", "result"),
    lambda pfn, kind, result: f"pfn {pfn:#x}: recovery action for {kind}: {_RESULTS[result]}",
)
TRACEPOINTS = (MEMORY_FAILURE_EVENT,)

# error_states: (bits looked at, their value, what the page is called). The actions are in _act.
_STATES = (
    (PG_reserved, PG_reserved, "reserved kernel page"),
    (PG_head, PG_head, "huge page"),
    (PG_swapcache | PG_dirty, PG_swapcache | PG_dirty, "dirty swapcache page"),
    (PG_swapcache | PG_dirty, PG_swapcache, "clean swapcache page"),
    (PG_mlocked | PG_dirty, PG_mlocked | PG_dirty, "dirty mlocked LRU page"),
    (PG_mlocked | PG_dirty, PG_mlocked, "clean mlocked LRU page"),
    (PG_unevictable | PG_dirty, PG_unevictable | PG_dirty, "dirty unevictable LRU page"),
    (PG_unevictable | PG_dirty, PG_unevictable, "clean unevictable LRU page"),
    (PG_lru | PG_dirty, PG_lru | PG_dirty, "dirty LRU page"),
    (PG_lru | PG_dirty, PG_lru, "clean LRU page"),
    (0, 0, "unknown page"),
)


def _action_result(host: HostMm, pfn: int, kind: str, result: int, *, held: bool) -> int:
    """Count the frame, tell of it; 0 or -EBUSY. `held`: our reference stays on it."""
    if kind != "already poisoned page":
        host.allocator.hwpoisoned[pfn] = int(held)
    if (t := host.trace.memory_failure_event) is not None:
        t(pfn, kind, result)
    return 0 if result in (_RECOVERED, _DELAYED) else -EBUSY


# -- a reference ------------------------------------------------------------------------------------
def _handlable(host: HostMm, pfn: int) -> bool:
    listed = host.pages.flags[page_folio(host.pages, pfn)] & PG_lru
    return bool(listed) or host.allocator.zone_of(pfn).buddy_of(pfn) >= 0


def _get_hwpoison_page(host: HostMm, pfn: int, *, counted: bool) -> int:
    """get_any_page. 1: the caller has a reference; 0: nobody has one; -EIO: the page cannot be handled."""
    for _ in range(_MAX_RETRIES + 1):
        if _handlable(host, pfn):
            if counted or try_get_page(host, pfn):
                return 1
            if host.allocator.zone_of(pfn).buddy_of(pfn) >= 0:
                return 0
        elif not host.pages.refcount[pfn]:
            return 0
        # It may be in a batch on its way to a list.
        host.lru.lru_add_drain_all()
    if counted:
        put_page(host, pfn)
    return -EIO


# -- who uses it ------------------------------------------------------------------------------------
def _collect_procs(host: HostMm, pfn: int, current: Process | None) -> list[tuple[Process, int, bool]]:
    """(process, address, whether it hit the error itself) of those that are to be told now."""
    found: list[tuple[Process, int]] = []

    def one(vma: VmArea, address: int) -> bool:
        pte = page_vma_mapped_walk(host, pfn, vma, address)
        if pte:
            pte_lockptr(vma.mm, pte).unlock()
            found.append((vma.mm.process, address))
        return True

    rmap_walk(host, pfn, one)
    return [
        (process, address, process is current)
        for process in host.processes for owner, address in found
        if owner is process and (process is current or process.mce_kill_early)
    ]


def _user_mappings(host: HostMm, pfn: int, current: Process | None) -> bool:
    """hwpoison_user_mappings: unmap the locked page and tell its users; whether it is unmapped."""
    pages = host.pages
    if pages.flags[pfn] & PG_reserved or not pages.flags[pfn] & PG_lru or not pages.mapcount[pfn]:
        return True
    mlocked = pages.flags[pfn] & PG_mlocked
    tokill = _collect_procs(host, pfn, current)
    ttu = TTU_IGNORE_MLOCK | TTU_SYNC | TTU_HWPOISON
    if pages.flags[pfn] & PG_swapcache or _clean_in_a_file(host, pfn):
        ttu &= ~TTU_HWPOISON
    unmapped = try_to_unmap(host, pfn, ttu)
    if mlocked:
        host.lru.lru_add_drain_all()
    # Only now are the entries' dirty bits in the page: a clean page is no loss.
    if pages.flags[pfn] & PG_dirty or not unmapped:
        for process, address, required in tokill:
            process.send_sig_mceerr(BUS_MCEERR_AR if required else BUS_MCEERR_AO, address)
    return unmapped


def _clean_in_a_file(host: HostMm, pfn: int) -> bool:
    """Whether the bytes can be read again, after the entries' dirty bits are in the page."""
    mapping = _folio_mapping(host, pfn)
    if mapping is None or host.pages.flags[pfn] & PG_dirty or not mapping.a_ops.can_writeback:
        return False
    if folio_mkclean(host, pfn):
        set_page_dirty(host, pfn)
        return False
    return True


def _folio_mapping(host: HostMm, pfn: int) -> AddressSpace | None:
    """The file that the page belongs to, if it does."""
    if host.pages.flags[pfn] & (PG_anon | PG_ksm | PG_swapcache):
        return None
    return host.pages.mapping.get(pfn)


# -- what becomes of it -----------------------------------------------------------------------------
def _delete_from_lru_cache(host: HostMm, pfn: int) -> bool:
    if not host.lru.folio_isolate_lru(pfn):
        return False
    host.pages.flags[pfn] &= ~(PG_active | PG_unevictable)
    put_page(host, pfn)
    return True


def _has_extra_refcount(host: HostMm, pfn: int, expected: int) -> bool:
    return host.pages.refcount[pfn] > expected


def _act(host: HostMm, pfn: int, kind: str) -> int:
    """The me_* function of this kind of page, which is locked and unlocked here."""
    pages = host.pages
    if kind == "dirty swapcache page":
        pages.flags[pfn] &= ~(PG_dirty | PG_uptodate)
        gone = _delete_from_lru_cache(host, pfn)
        folio_unlock(host, pfn)
        return _DELAYED if gone and not _has_extra_refcount(host, pfn, 2) else _FAILED
    if kind == "clean swapcache page":
        swap_cache_del_folio(host, pfn)
        gone = _delete_from_lru_cache(host, pfn)
        folio_unlock(host, pfn)
        return _RECOVERED if gone and not _has_extra_refcount(host, pfn, 1) else _FAILED
    result = _FAILED
    if kind.endswith("LRU page"):
        _delete_from_lru_cache(host, pfn)
        result = _RECOVERED if pages.flags[pfn] & PG_anon else _truncate_error_folio(host, pfn)
    elif kind == "reserved kernel page":
        result = _IGNORED
    folio_unlock(host, pfn)
    return result


def _truncate_error_folio(host: HostMm, pfn: int) -> int:
    """A page of a file leaves it; one of shmem stays, so that nobody gets zeros for its bytes."""
    mapping = _folio_mapping(host, pfn)
    if mapping is None:
        return _FAILED
    if mapping.a_ops.error_remove_folio is not None:
        if mapping.a_ops.error_remove_folio(mapping, pfn):
            return _FAILED
    elif not mapping.a_ops.is_shmem:
        truncate_inode_folio(mapping, pfn)
    return _FAILED if _has_extra_refcount(host, pfn, 1 + mapping.a_ops.is_shmem) else _RECOVERED


def _identify(flags: int) -> str:
    return next(kind for mask, value, kind in _STATES if flags & mask == value)


def _handle_used(host: HostMm, pfn: int, current: Process | None) -> int:
    """The page of a frame that has our reference."""
    pages = host.pages
    host.lru.lru_add_drain_all()
    folio_lock(host, pfn)
    saved = pages.flags[pfn]
    if saved & (PG_lru | PG_writeback):
        folio_wait_writeback(host, pfn)
        if not _user_mappings(host, pfn, current):
            folio_unlock(host, pfn)
            return _action_result(host, pfn, "unmapping failed page", _FAILED, held=True)
    kind = _identify(pages.flags[pfn])
    if kind == "unknown page":
        kind = _identify(saved | (pages.flags[pfn] & PG_dirty))
    return _action_result(host, pfn, kind, _act(host, pfn, kind), held=True)


def memory_failure(host: HostMm, pfn: int, flags: int = 0, current: Process | None = None) -> int:
    """The memory of a frame has failed. 0: contained; -EBUSY: not wholly; -ENXIO: no frame of RAM.

    -EHWPOISON: it had failed before; -EOPNOTSUPP: a hugetlb page, which is not modelled.
    MF_ACTION_REQUIRED: `current` was just about to use it. MF_COUNT_INCREASED: the caller's reference
    passes to us. May sleep.
    """
    if not 0 <= pfn < host.device_frames.start or _is_offline(host, pfn):
        return -ENXIO
    if _refuses(host, pfn, flags):
        return -EOPNOTSUPP
    required = current if flags & MF_ACTION_REQUIRED else None
    with host.mf_mutex:
        return _memory_failure_locked(host, pfn, flags, required)


def _memory_failure_locked(host: HostMm, pfn: int, flags: int, current: Process | None) -> int:
    pages = host.pages
    counted = bool(flags & MF_COUNT_INCREASED)
    if pages.flags[pfn] & PG_hwpoison:
        if counted:
            put_page(host, pfn)
        _action_result(host, pfn, "already poisoned page", _FAILED, held=False)
        return -EHWPOISON
    got = _get_hwpoison_page(host, pfn, counted=counted)
    if got < 0:
        pages.flags[pfn] |= PG_hwpoison
        return _action_result(host, pfn, "get hwpoison page", _IGNORED, held=False)
    if not got:
        if not host.allocator.zone_of(pfn).take_page_off_buddy(pfn):
            return _action_result(host, pfn, "high-order kernel page", _IGNORED, held=False)
        pages.flags[pfn] = PG_hwpoison
        pages.refcount[pfn] = 1
        return _action_result(host, pfn, "free buddy page", _RECOVERED, held=True)
    pages.flags[pfn] |= PG_hwpoison
    if not _try_to_split_thp_page(host, pfn):
        put_page(host, pfn)
        _action_result(host, pfn, "unsplit thp", _FAILED, held=False)
        return -EHWPOISON
    return _handle_used(host, pfn, current)


def _try_to_split_thp_page(host: HostMm, pfn: int) -> bool:
    """Whether the page, to which we have a reference, is a folio of its own now."""
    if not folio_test_large(host.pages, page_folio(host.pages, pfn)):
        return True
    folio_lock(host, page_folio(host.pages, pfn))
    err = host.split_folio(pfn)
    folio_unlock(host, page_folio(host.pages, pfn))
    return not err


def _refuses(host: HostMm, pfn: int, flags: int) -> bool:
    """Whether it is a page of hugetlb; the caller's reference is given back then."""
    folio = page_folio(host.pages, pfn)
    if not host.pages.flags[folio] & PG_hugetlb:
        return False
    if flags & MF_COUNT_INCREASED:
        put_page(host, folio)
    return True


def _is_offline(host: HostMm, pfn: int) -> bool:
    return any(start <= pfn < start + nr for start, nr in host.allocator.offline.items())


# -- before it fails --------------------------------------------------------------------------------
def soft_offline_page(host: HostMm, pfn: int, flags: int = 0) -> int:
    """Take a frame out of use that is still good. May sleep.

    0, or -EBUSY, -EIO (it stays), -EOPNOTSUPP (hugetlb, not modelled) or -ENXIO.
    """
    if not 0 <= pfn < host.device_frames.start:
        return -ENXIO
    if _is_offline(host, pfn):
        return -EIO
    if _refuses(host, pfn, flags):
        return -EOPNOTSUPP
    with host.mf_mutex:
        counted = bool(flags & MF_COUNT_INCREASED)
        if host.pages.flags[pfn] & PG_hwpoison:
            if counted:
                put_page(host, pfn)
            return 0
        got = _get_hwpoison_page(host, pfn, counted=counted)
        if got > 0:
            return _soft_offline_in_use_page(host, pfn)
        if not got and host.allocator.zone_of(pfn).take_page_off_buddy(pfn):
            _page_handle_poison(host, pfn)
            return 0
        return got or -EBUSY


def _soft_offline_in_use_page(host: HostMm, pfn: int) -> int:
    if not _try_to_split_thp_page(host, pfn):
        put_page(host, pfn)
        return -EBUSY
    folio_lock(host, pfn)
    folio_wait_writeback(host, pfn)
    folio_unlock(host, pfn)
    isolated = host.lru.folio_isolate_lru(pfn)
    put_page(host, pfn)
    if not isolated:
        return -EBUSY
    source = [pfn]
    target = MigrationTarget(-1, GFP_USER | GFP_MOVABLE | GFP_RETRY_MAYFAIL)
    failed = migrate_pages(host, source, target, MR_MEMORY_FAILURE, MIGRATE_SYNC)
    if failed:
        putback_movable_pages(host, source)
        return min(failed, 0) or -EBUSY
    # Migration left us its last reference: with it the frame goes, but not to the lists.
    host.pages.flags[pfn] |= PG_hwpoison
    put_page(host, pfn)
    _page_handle_poison(host, pfn)
    return 0


def _page_handle_poison(host: HostMm, pfn: int) -> None:
    host.pages.flags[pfn] = PG_hwpoison
    host.pages.refcount[pfn] = 1
    host.allocator.hwpoisoned[pfn] = 1

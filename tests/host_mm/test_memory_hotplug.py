"""Memory goes offline and comes back, and what was in it lives on elsewhere (host_mm/memory_hotplug.py)."""

from __future__ import annotations

from errno import EBUSY, EINVAL

import pytest

from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.memory_failure import memory_failure
from host_mm.memory_hotplug import offline_pages, online_pages
from host_mm.mmzone import PAGEBLOCK_NR_PAGES
from host_mm.page import PG_reserved
from host_mm.page_alloc import GFP_HIGHUSER_MOVABLE, GFP_NORETRY, alloc_pages
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user
from tests.host_mm.machine import run
from tests.host_mm.test_contig import on_node_1
from tests.host_mm.test_migrate import BASE, PAGE, pfn_of
from trace_events.stream import Listener

BLOCK = PAGEBLOCK_NR_PAGES


def offline(host: HostMm, start: int, nr: int = BLOCK) -> None:
    host.sched.run_task("offline", lambda: offline_pages(host, start, nr))


def refused(host: HostMm, start: int, nr: int = BLOCK) -> int:
    with pytest.raises(KernelError) as caught:
        offline(host, start, nr)
    assert caught.value.errno is not None
    return caught.value.errno


def test_pages_leave_for_the_other_node_and_the_frames_are_nobody_s() -> None:
    host, process, first = on_node_1()
    zone = host.zones[1]
    managed, mark = zone.managed, zone.wmark_low
    reasons: list[str] = []
    points = {tp.full_name: tp for tp in host.stream.tracepoints()}
    host.stream.listen(Listener(
        ["migrate:mm_migrate_pages"],
        lambda e: reasons.append(points[e.event].format(tuple(e.args.values())).split("=")[-1]),
        ancestors=False,
    ))
    offline(host, first)
    assert set(reasons) == {"memory_hotplug"}
    assert (zone.managed, zone.present) == (managed - BLOCK, 2048 - BLOCK)
    assert zone.wmark_low < mark
    for page in range(64):
        assert host.allocator.nid_of(pfn_of(process, page)) == 0
        assert copy_from_user(process, BASE + page * PAGE, 8).rstrip(b"\0") == f"page {page}".encode()
    assert all(host.pages.flags[pfn] & PG_reserved for pfn in range(first, first + BLOCK))
    audit(host)
    taken = []
    while (pfn := alloc_pages(host, GFP_HIGHUSER_MOVABLE | GFP_NORETRY, 0, 1)) >= 0:
        taken.append(pfn)
    assert not [pfn for pfn in taken if first <= pfn < first + BLOCK]


def test_what_comes_online_again_is_handed_out_again() -> None:
    host, _, first = on_node_1()
    free = host.zones[1].nr_free
    offline(host, first)
    host.sched.run_task("online", lambda: online_pages(host, first, BLOCK))
    assert host.zones[1].nr_free == free + 64
    assert alloc_pages(host, GFP_HIGHUSER_MOVABLE, 0, 1) == first
    assert not host.allocator.offline
    with pytest.raises(KernelError, match="are not offline"):
        online_pages(host, first, BLOCK)


def test_a_pinned_page_keeps_its_memory_online() -> None:
    host, process, first = on_node_1()
    held: list[int] = []
    run(host, lambda: held.append(pin_user_page(process.mm, BASE + 9 * PAGE, FOLL_WRITE)))
    assert refused(host, first) == EBUSY
    assert pfn_of(process, 9) == held[0]
    assert not host.allocator.blocks.isolated
    audit(host)
    unpin_user_page(host, held[0])
    offline(host, first)
    audit(host)


def test_page_tables_and_ranges_that_are_no_blocks_are_refused() -> None:
    host, process, first = on_node_1()
    assert refused(host, (process.mm.pgd >> 12) & -BLOCK) == EBUSY
    assert refused(host, first + 1) == EINVAL
    assert refused(host, first, BLOCK - 1) == EINVAL
    assert refused(host, first, 0) == EINVAL
    assert refused(host, 1536, 1024) == EINVAL, "two zones"
    assert refused(host, 1 << 30) == EINVAL
    offline(host, first)
    assert refused(host, first) == EINVAL


def test_a_poisoned_frame_goes_offline_with_its_block_and_comes_back_poisoned() -> None:
    host, process, first = on_node_1()
    run(host, lambda: memory_failure(host, first + 2))
    offline(host, first)
    audit(host)
    host.sched.run_task("online", lambda: online_pages(host, first, BLOCK))
    audit(host)
    taken = [alloc_pages(host, GFP_HIGHUSER_MOVABLE, 0, 1) for _ in range(BLOCK)]
    assert first + 2 not in taken
    assert pfn_of(process, 2) == -1


def test_the_audit_sees_an_offline_frame_that_somebody_uses() -> None:
    host, _, first = on_node_1()
    offline(host, first)
    host.pages.refcount[first + 3] = 1
    with pytest.raises(BrokenTruth, match="offline"):
        audit(host)
    host.pages.refcount[first + 3] = 0
    host.pages.flags[first + 4] = 0
    with pytest.raises(BrokenTruth, match="frame-refcount"):
        audit(host)

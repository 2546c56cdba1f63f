"""migrate_vma_setup, pages, finalize, step by step, with a driver that only keeps pages (migrate_device.py).

What a device makes of them is in tests/emu/test_hmm_device.py.
"""

from __future__ import annotations

from errno import EINVAL
from typing import Any

import pytest

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import walk_lockless
from host_mm.arch.x86.swapops import decode_pte
from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth
from host_mm.memremap import memremap_pages, zone_device_page_init
from host_mm.migrate_device import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from host_mm.migrate_device_collect import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
    MIGRATE_VMA_SELECT_SYSTEM,
    MigrateVma,
    migrate_pfn,
    migrate_pfn_to_page,
)
from host_mm.mm_types import VM_PFNMAP, VmFault
from host_mm.mmap import do_mmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_locked, PG_lru
from host_mm.process import Process
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, make_host, run

OWNER = object()


class Driver:
    def __init__(self, **kw: Any) -> None:
        self.host: HostMm = make_host(**kw)
        self.process: Process = self.host.create_process("p")
        self.base = do_mmap(self.process.mm, 0, 8 * PAGE, RW, ANON)
        self.freed: list[int] = []
        self.pgmap = memremap_pages(self.host, 4, OWNER, self.fault, self.freed.append)

    def fault(self, vmf: VmFault) -> int:
        raise AssertionError("nobody touches device memory here")

    def args(self, first: int, pages: int, **kw: Any) -> MigrateVma:
        start = self.base + first * PAGE
        vma = self.process.mm.vma_lookup(start)
        flags = {"pgmap_owner": OWNER, "flags": MIGRATE_VMA_SELECT_SYSTEM} | kw
        return MigrateVma(vma, start, start + pages * PAGE, **flags)

    def entry(self, page: int) -> str:
        return decode_pte(walk_lockless(self.host.ram, self.process.mm.pgd, self.base + page * PAGE)[0])

    def audit(self) -> None:
        run(self.host, self.host.quiesce)
        audit(self.host)


def test_setup_says_of_each_page_whether_it_moves_and_locks_it() -> None:
    driver = Driver()

    def body() -> None:
        copy_to_user(driver.process, driver.base, b"x")
        copy_from_user(driver.process, driver.base + PAGE, 1)
        args = driver.args(0, 3)
        assert migrate_vma_setup(args) == 0
        moving = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE | MIGRATE_PFN_WRITE
        assert [word & 15 for word in args.src] == [moving, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_MIGRATE]
        assert args.cpages == 3
        pfn = migrate_pfn_to_page(args.src[0])
        assert driver.host.pages.flags[pfn] & (PG_locked | PG_lru) == PG_locked
        assert driver.entry(0).startswith("migration-write")
        # A driver that has no room gives no destination: all is as it was.
        migrate_vma_pages(args)
        assert args.src[0] & 15 == moving & ~MIGRATE_PFN_MIGRATE
        migrate_vma_finalize(args)
        assert copy_from_user(driver.process, driver.base, 1) == b"x"
        assert driver.entry(2) == "none"

    run(driver.host, body)
    driver.audit()


def test_finalize_leaves_a_device_private_entry_that_counts_as_a_mapping() -> None:
    driver = Driver()

    def body() -> None:
        copy_to_user(driver.process, driver.base, b"x")
        args = driver.args(0, 1)
        migrate_vma_setup(args)
        zone_device_page_init(driver.host, driver.pgmap.start)
        args.dst[0] = migrate_pfn(driver.pgmap.start) | MIGRATE_PFN_WRITE
        migrate_vma_pages(args)
        migrate_vma_finalize(args)

    run(driver.host, body)
    pages, pfn = driver.host.pages, driver.pgmap.start
    assert driver.entry(0) == f"device-write pfn {pfn:#x}"
    assert (pages.refcount[pfn], pages.mapcount[pfn]) == (1, 1)
    assert driver.process.mm.rss[1] == 1
    driver.audit()


def test_only_its_owners_migration_finds_a_page_in_device_memory() -> None:
    driver = Driver()
    test_finalize = driver.args(0, 1)

    def body() -> None:
        copy_to_user(driver.process, driver.base, b"x")
        migrate_vma_setup(test_finalize)
        zone_device_page_init(driver.host, driver.pgmap.start)
        test_finalize.dst[0] = migrate_pfn(driver.pgmap.start)
        migrate_vma_pages(test_finalize)
        migrate_vma_finalize(test_finalize)
        for owner, flags, found in (
            (object(), MIGRATE_VMA_SELECT_DEVICE_PRIVATE, 0), (OWNER, MIGRATE_VMA_SELECT_SYSTEM, 0),
            (OWNER, MIGRATE_VMA_SELECT_DEVICE_PRIVATE, 1),
        ):
            args = driver.args(0, 1, pgmap_owner=owner, flags=flags)
            assert migrate_vma_setup(args) == 0
            assert args.cpages == found
            migrate_vma_pages(args)
            migrate_vma_finalize(args)

    run(driver.host, body)
    driver.audit()


def test_ranges_that_are_not_of_one_ordinary_vma_are_refused() -> None:
    driver = Driver()
    assert migrate_vma_setup(driver.args(0, 0)) == -EINVAL
    assert migrate_vma_setup(driver.args(4, 8)) == -EINVAL
    assert migrate_vma_setup(MigrateVma(None, 0, PAGE, pgmap_owner=OWNER, flags=1)) == -EINVAL
    vma = driver.process.mm.vmas[0]
    vma.flags |= VM_PFNMAP
    assert migrate_vma_setup(driver.args(0, 1)) == -EINVAL


@pytest.mark.parametrize("pfn", [1, 77])
def test_a_word_holds_its_page(pfn: int) -> None:
    assert migrate_pfn_to_page(migrate_pfn(pfn) | MIGRATE_PFN_WRITE) == pfn
    assert migrate_pfn_to_page(MIGRATE_PFN_MIGRATE) == -1


@pytest.mark.parametrize(("profile", "event", "owner"), [
    (LINUX_6_18, "migrate", OWNER), (LINUX_5_10, "clear", None),
])
def test_the_bracket_in_which_holes_are_filled_is_the_kernels(
    profile: MmProfile, event: str, owner: object
) -> None:
    driver = Driver(profile=profile)
    seen: list[tuple[str, object]] = []

    class Watch(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            seen.append((mn.EVENT_NAMES[range_.event], range_.owner))
            return 0

    mmu_notifier_register(Watch(), driver.process.mm)

    def body() -> None:
        args = driver.args(0, 1)
        migrate_vma_setup(args)
        zone_device_page_init(driver.host, driver.pgmap.start)
        args.dst[0] = migrate_pfn(driver.pgmap.start) | MIGRATE_PFN_WRITE
        migrate_vma_pages(args)
        migrate_vma_finalize(args)

    run(driver.host, body)
    assert seen == [("migrate", OWNER), (event, owner)]
    driver.audit()


def test_a_charge_that_stays_on_a_free_device_page_is_found() -> None:
    d = Driver()
    memcg = d.host.memcg.create("g")
    d.host.memcg.attach(d.process, memcg)
    run(d.host, lambda: copy_to_user(d.process, d.base, b"x"))
    audit(d.host)
    pfn = walk_lockless(d.host.ram, d.process.mm.pgd, d.base)[0] >> 12 & 0xFFFFF
    d.host.memcg.folios[d.pgmap.start] = d.host.memcg.folios.pop(pfn)
    with pytest.raises(BrokenTruth, match=r"memcg-charge.*free"):
        audit(d.host)

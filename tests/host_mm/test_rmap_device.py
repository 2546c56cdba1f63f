"""make_device_exclusive locks the page and takes it out of the CPU's reach (host_mm/rmap_device.py)."""

from __future__ import annotations

from errno import EFAULT, EOPNOTSUPP

from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import walk_lockless
from host_mm.arch.x86.swapops import decode_pte
from host_mm.filemap import folio_unlock
from host_mm.fork import fork_process
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, do_mmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.page import PG_dirty, PG_locked, put_page
from host_mm.profile import LINUX_5_10
from host_mm.rmap_device import make_device_exclusive
from host_mm.truths import audit
from host_mm.uaccess import copy_to_user
from tests.host_mm.machine import PAGE, RW, Vmm, run


def test_it_answers_with_the_page_locked_and_the_entry_exclusive() -> None:
    vmm = Vmm()
    host, mm = vmm.host, vmm.mm

    def body() -> None:
        vmm.host_write(0, 5)
        mm.mmap_lock.read_lock()
        pfn = make_device_exclusive(mm, vmm.base + 100, "me")
        mm.mmap_lock.read_unlock()
        assert decode_pte(walk_lockless(host.ram, mm.pgd, vmm.base)[0]) == f"device-exclusive pfn {pfn:#x}"
        flags = host.pages.flags[pfn]
        assert flags & PG_locked
        assert flags & PG_dirty, "what the CPU wrote before is known by the folio now"
        assert (host.pages.mapcount[pfn], mm.rss[1]) == (1, 2)
        folio_unlock(host, pfn)
        put_page(host, pfn)
        assert vmm.host_read(0) == 5

    run(host, body)
    assert vmm.brackets() == [("exclusive", 0, PAGE), ("clear", 0, PAGE)]
    run(host, host.quiesce)
    audit(host)


def test_a_shared_page_is_copied_first_and_an_exclusive_one_given_back_first() -> None:
    vmm = Vmm()

    def make() -> None:
        vmm.mm.mmap_lock.read_lock()
        pfn = make_device_exclusive(vmm.mm, vmm.base, "me")
        vmm.mm.mmap_lock.read_unlock()
        folio_unlock(vmm.host, pfn)
        put_page(vmm.host, pfn)

    run(vmm.host, lambda: vmm.host_write(0, 5))
    fork_process(vmm.process)
    vmm.brackets()
    run(vmm.host, make)
    assert vmm.brackets() == [("clear", 0, PAGE), ("exclusive", 0, PAGE)]
    run(vmm.host, make)
    assert vmm.brackets() == [("clear", 0, PAGE), ("exclusive", 0, PAGE)]


def test_the_owner_is_in_the_bracket_of_making_and_not_in_that_of_giving_back() -> None:
    vmm = Vmm()
    owners: list[object] = []

    class Owners(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            owners.append(range_.owner)
            return 0

    mmu_notifier_register(Owners(), vmm.mm)

    def body() -> None:
        vmm.mm.mmap_lock.read_lock()
        pfn = make_device_exclusive(vmm.mm, vmm.base, "me")
        vmm.mm.mmap_lock.read_unlock()
        folio_unlock(vmm.host, pfn)
        put_page(vmm.host, pfn)
        vmm.host_read(0)

    run(vmm.host, body)
    assert owners == ["me", None]


def test_what_is_not_mapped_is_efault_and_an_older_kernel_has_no_such_entries() -> None:
    vmm = Vmm()
    assert make_device_exclusive(vmm.mm, 0x10000, None) == -EFAULT
    vmm = Vmm(profile=LINUX_5_10)
    assert make_device_exclusive(vmm.mm, vmm.base, None) == -EOPNOTSUPP


def test_a_page_of_a_file_cannot_be_made_exclusive() -> None:
    vmm = Vmm()
    base = do_mmap(vmm.mm, 0, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS)
    assert vmm.host.sched.run_task("t", lambda: make_device_exclusive(vmm.mm, base, None)) == -EOPNOTSUPP


def test_a_page_in_a_huge_mapping_is_refused() -> None:
    vmm = Vmm(ram=16 << 20, params={"thp.enabled": "always"})
    mm = vmm.mm
    address = do_mmap(mm, 0x7FFFE0000000, 2 << 20, RW, MAP_PRIVATE | MAP_ANONYMOUS)

    def body() -> int:
        copy_to_user(mm.process, address, b"x")
        mm.mmap_lock.read_lock()
        try:
            return make_device_exclusive(mm, address, None)
        finally:
            mm.mmap_lock.read_unlock()

    assert vmm.host.sched.run_task("t", body) == -EOPNOTSUPP
    assert walk_lockless(vmm.host.ram, mm.pgd, address)[1] == 2

"""Pages go to a device's memory, come back with the CPU's touch, or are the device's alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from errno import EFAULT, EINVAL
from typing import Any

import pytest

from emu.devices.hmm_device import HmmDevice
from host_mm import mmu_notifier as mn
from host_mm.arch.x86.pgtable import walk_lockless
from host_mm.arch.x86.swapops import decode_pte
from host_mm.fork import exit_process, fork_process
from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import PROT_READ, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register, mmu_notifier_unregister
from host_mm.mprotect import do_mprotect
from host_mm.process import Process
from host_mm.profile import LINUX_5_10
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, Recorder, make_host, run
from tests.host_mm.storm import storm

PAGES = 16


def machine(nr: int = 2 * PAGES, **kw: Any) -> tuple[HmmDevice, Process, int]:
    host = make_host(ram=4 << 20, **kw)
    process = host.create_process("p")
    base = do_mmap(process.mm, 0, PAGES * PAGE, RW, ANON)
    device = HmmDevice(process, nr)
    device.open(base, PAGES * PAGE)
    return device, process, base


def at_rest(host: HostMm) -> None:
    host.sched.run_task("rest", host.quiesce)
    audit(host)


def entry(process: Process, address: int) -> str:
    return decode_pte(walk_lockless(process.host.ram, process.mm.pgd, address)[0])


def test_a_page_goes_to_the_device_and_comes_back_with_the_cpus_touch() -> None:
    device, process, base = machine()

    def body() -> None:
        copy_to_user(process, base, b"from the cpu")
        assert device.migrate_to_device(base, 1) == 1
        assert entry(process, base).startswith("device-write")
        assert device.read(base, 12) == b"from the cpu"
        device.write(base, b"from the dev")
        assert len(device.free) == 2 * PAGES - 1
        assert copy_from_user(process, base, 12) == b"from the dev"
        assert len(device.free) == 2 * PAGES
        assert not device.table.entries

    run(device.host, body)
    at_rest(device.host)


def test_holes_and_the_zero_page_become_zeros_in_device_memory() -> None:
    device, process, base = machine()

    def body() -> None:
        copy_from_user(process, base, 1)
        assert device.migrate_to_device(base, 2) == 2
        assert device.read(base, 8) == device.read(base + PAGE, 8) == bytes(8)
        device.write(base + PAGE, b"x")
        assert copy_from_user(process, base + PAGE, 1) == b"x"

    run(device.host, body)
    at_rest(device.host)
    assert process.mm.rss[1] == 2


def recorded(device: HmmDevice, process: Process, operation: Callable[[], object]) -> list[Any]:
    recorder = Recorder()
    mmu_notifier_register(recorder, process.mm)
    run(device.host, operation)
    mmu_notifier_unregister(recorder, process.mm)
    return [event for event in recorder.take() if event[0] != "release"]


def test_the_charge_goes_with_the_bytes_and_a_hole_that_is_filled_is_charged() -> None:
    device, process, base = machine()
    host = device.host
    memcg = host.memcg.create("vm")
    host.memcg.attach(process, memcg)

    def body() -> None:
        copy_to_user(process, base, b"x")
        assert device.migrate_to_device(base, 2) == 2
        host.memcg.drain_all_stock(memcg)
        assert memcg.usage == 2
        copy_to_user(process, base, b"y")
        copy_to_user(process, base + PAGE, b"y")
        host.memcg.drain_all_stock(memcg)
        assert memcg.usage == 2

    run(host, body)
    at_rest(host)


def test_in_5_10_holes_are_filled_in_a_bracket_that_is_nobodys_and_ends_short() -> None:
    device, process, base = machine(profile=LINUX_5_10)
    run(device.host, lambda: (copy_to_user(process, base, b"x"), copy_from_user(process, base + PAGE, 1)))
    log: list[Any] = []

    class Old(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            log.append((mn.EVENT_NAMES[range_.event], range_.owner))
            return 0

        def invalidate_range_end(self, range_: mn.MmuNotifierRange) -> None:
            log.append("end")

        def invalidate_range(self, mm: object, start: int, end: int) -> None:
            log.append("range")

        def change_pte(self, mm: object, address: int, pte: int) -> None:
            log.append("change")

    mmu_notifier_register(Old(), process.mm)
    run(device.host, lambda: device.migrate_to_device(base, 3))
    collected = [("migrate", device), "range", "end"]
    # The zero page is taken away and its place told; where nothing was nothing is.
    assert log == [*collected, ("clear", None), "range", "change", "end"]
    device.close()


def test_the_brackets_bear_the_migration_and_its_owner() -> None:
    device, process, base = machine()
    run(device.host, lambda: copy_to_user(process, base, b"x"))
    owners: list[Any] = []

    class Owners(mn.MmuNotifier):
        def invalidate_range_start(self, range_: mn.MmuNotifierRange) -> int:
            owners.append(range_.owner)
            return 0

    mmu_notifier_register(Owners(), process.mm)
    seen = recorded(device, process, lambda: device.migrate_to_device(base, 4))
    # Collecting; then, from the first hole on, filling.
    assert seen == [("migrate", base, base + 4 * PAGE), ("migrate", base + PAGE, base + 4 * PAGE)]
    seen = recorded(device, process, lambda: copy_from_user(process, base, 1))
    assert seen == [("migrate", base, base + PAGE)]
    seen = recorded(device, process, lambda: device.fetch_add(base, 1))
    assert seen == [("exclusive", base, base + PAGE)]
    assert all(owner is device for owner in owners)
    owners.clear()
    seen = recorded(device, process, lambda: copy_from_user(process, base, 1))
    assert seen == [("clear", base, base + PAGE)]
    assert owners == [None]


def order(device: HmmDevice, process: Process, operation: Callable[[], object]) -> list[str]:
    from tests.host_mm.test_order_classes import Recorder as Order

    seen = Order(device.host, process.mm)
    mmu_notifier_register(seen, process.mm)
    run(device.host, operation)
    mmu_notifier_unregister(seen, process.mm)
    return seen.log


def test_an_entry_is_flushed_inside_the_bracket_before_it_is_a_migration_entry() -> None:
    device, process, base = machine()
    run(device.host, lambda: copy_to_user(process, base, b"x"), device.host.lru.lru_add_drain_all)
    seen = order(device, process, lambda: device.migrate_to_device(base, 1))
    # An exclusive page is flushed by itself first, so that fast GUP cannot pin it; then the range.
    assert seen == ["start", "clear", "flush", "swap-entry", "flush", "end", "swap-entry", "free"]


def test_a_page_is_made_exclusive_and_given_back_inside_brackets() -> None:
    device, process, base = machine()
    run(device.host, lambda: copy_to_user(process, base, b"x"))
    seen = order(device, process, lambda: device.atomic(base))
    assert seen == ["start", "clear", "flush", "swap-entry", "end"]
    assert order(device, process, lambda: copy_from_user(process, base, 1)) == ["start", "set", "end"]


def test_an_atomic_of_the_device_excludes_the_cpu_until_it_asks() -> None:
    device, process, base = machine()

    def body() -> None:
        copy_to_user(process, base, (40).to_bytes(8, "little"))
        assert device.fetch_add(base, 1) == 40
        assert entry(process, base).startswith("device-exclusive")
        assert process.tlb.lookup(base, False) == -1
        device.write(base + 8, b"more, without a fault")
        assert copy_from_user(process, base, 8) == (41).to_bytes(8, "little")
        assert not device.table.entries
        assert device.fetch_add(base, 1) == 41
        copy_to_user(process, base, (0).to_bytes(8, "little"))
        assert device.fetch_add(base, 1) == 0

    run(device.host, body)
    at_rest(device.host)


def test_a_page_that_is_the_devices_alone_can_be_swapped_and_moved() -> None:
    device, process, base = machine()

    def body() -> None:
        for value in range(3):
            assert device.fetch_add(base, 1) == 2 * value
            do_madvise(process.mm, base, PAGE, MADV_PAGEOUT)
            assert device.fetch_add(base, 1) == 2 * value + 1
            move_pages(process, [base], [value & 1])
        assert copy_from_user(process, base, 8) == (6).to_bytes(8, "little")

    run(device.host, body)
    at_rest(device.host)


@pytest.mark.parametrize("how", ["private", "exclusive"])
def test_fork_shares_what_the_device_has_and_each_side_gets_its_own(how: str) -> None:
    device, process, base = machine()
    children: list[Process] = []

    def body() -> None:
        copy_to_user(process, base, b"old")
        if how == "private":
            device.migrate_to_device(base, 1)
        else:
            device.atomic(base)
        children.append(fork_process(process))
        device.write(base, b"dev")
        assert copy_from_user(children[0], base, 3) == b"old"
        assert copy_from_user(process, base, 3) == b"dev"

    run(device.host, body)
    at_rest(device.host)
    exit_process(children[0])
    at_rest(device.host)


@pytest.mark.parametrize("operation", ["dontneed", "munmap", "exit"])
def test_what_is_zapped_goes_back_to_the_driver(operation: str) -> None:
    device, process, base = machine()

    def body() -> None:
        copy_to_user(process, base, b"x" * PAGE * 4)
        assert device.migrate_to_device(base, 2) == 2
        device.atomic(base + 2 * PAGE)
        if operation == "dontneed":
            do_madvise(process.mm, base, 4 * PAGE, MADV_DONTNEED)
        elif operation == "munmap":
            do_munmap(process.mm, base, 4 * PAGE)
        else:
            exit_process(process)

    run(device.host, body)
    assert len(device.free) == 2 * PAGES
    assert not device.table.entries
    at_rest(device.host)
    run(device.host, device.close)
    at_rest(device.host)
    assert not device.host.device_frames.busy


def test_mprotect_leaves_the_page_where_it_is_and_takes_the_right_to_write() -> None:
    device, process, base = machine()

    def body() -> None:
        copy_to_user(process, base, b"x")
        device.migrate_to_device(base, 1)
        do_mprotect(process.mm, base, PAGE, PROT_READ)
        assert entry(process, base).startswith("device-read")
        assert device.read(base, 1) == b"x"
        with pytest.raises(KernelError):
            device.write(base, b"y")

    run(device.host, body)
    at_rest(device.host)


def test_a_device_that_goes_gives_everything_back_first() -> None:
    device, process, base = machine()

    def body() -> None:
        copy_to_user(process, base, b"keep me")
        device.migrate_to_device(base, PAGES)
        child = fork_process(process)
        device.close()
        assert copy_from_user(process, base, 7) == copy_from_user(child, base, 7) == b"keep me"
        exit_process(child)

    run(device.host, body)
    at_rest(device.host)
    assert not device.host.device_frames.busy


def test_a_pinned_page_and_one_too_many_stay_in_ram() -> None:
    from host_mm.gup import FOLL_LONGTERM, FOLL_WRITE
    from host_mm.gup_pin import pin_user_page, unpin_user_page

    device, process, base = machine(nr=2)

    def body() -> None:
        copy_to_user(process, base, b"x" * PAGE * 4)
        pfn = pin_user_page(process.mm, base, FOLL_WRITE | FOLL_LONGTERM)
        assert device.migrate_to_device(base, 4) == 2
        assert process.tlb.lookup(base + 3 * PAGE, False) == -1
        assert copy_from_user(process, base + 3 * PAGE, 1) == b"x"
        assert device.read(base, 1) == b"x"
        unpin_user_page(device.host, pfn)

    run(device.host, body)
    at_rest(device.host)


def test_what_the_device_refuses() -> None:
    device, process, base = machine()

    def refused(call: Callable[[], object], errno: int) -> None:
        with pytest.raises(KernelError) as caught:
            run(device.host, call)
        assert caught.value.errno == errno

    refused(lambda: device.migrate_to_device(base + PAGES * PAGE, 1), EINVAL)
    refused(lambda: device.atomic(base + PAGES * PAGE), EFAULT)
    refused(lambda: device.fetch_add(base + 4, 1), EFAULT)
    do_mprotect(process.mm, base, PAGE, PROT_READ)
    refused(lambda: device.atomic(base), EFAULT)


def together(seed: int) -> HmmDevice:
    device, process, base = machine(nr=6)

    def driver(busy: Callable[[], bool]) -> None:
        rng = random.Random(seed * 5)
        while busy():
            first = rng.randrange(PAGES - 4)
            if rng.random() < 0.6:
                device.migrate_to_device(base + first * PAGE, rng.randrange(1, 5))
            elif rng.random() < 0.8:
                device.atomic(base + first * PAGE)
            else:
                device.evict()
            device.host.sched.sleep(rng.randrange(1, 4000))

    # A fork that meets a page whose lock the device holds is -ENOMEM in Linux, too.
    storm(
        process, base, PAGES, seed, lambda at: device.read(base + at, 8),
        lambda at, data: device.write(base + at, data), driver, fork_may_fail=True,
    )
    return device


@pytest.mark.parametrize("seed", range(16))
def test_no_byte_is_lost_in_any_order(seed: int) -> None:
    device = together(seed)
    at_rest(device.host)
    run(device.host, device.close)
    at_rest(device.host)


def test_a_device_that_does_not_account_for_what_it_leaves_out_publishes_what_was_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgetful(self: HmmDevice, start: int, end: int) -> None:
        with self.lock:
            self.drop(start, end)

    monkeypatch.setattr(HmmDevice, "_let_go", forgetful)

    def until_broken() -> None:
        for seed in range(60):
            together(seed)

    with pytest.raises(BrokenTruth, match="secondary-stale"):
        until_broken()

"""A device behind an IOMMU walks the CPU's tables, and forgets what the CPU forgets (emu/devices/sva.py)."""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EINVAL, EIO
from typing import Any

import pytest

from emu.devices.sva import SvaDevice
from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.mm_types import MmStruct
from host_mm.mmap import PROT_READ, do_mmap, do_munmap
from host_mm.mmu_notifier import MmuNotifier, MmuNotifierRange
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.process import Process
from host_mm.profile import LINUX_5_10
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, make_host, run
from tests.host_mm.storm import storm
from trace_events.stream import Listener

PAGES = 16
PROFILES: list[dict[str, Any]] = [{}, {"profile": LINUX_5_10}]


def machine(**kw: Any) -> tuple[SvaDevice, Process, int]:
    host = make_host(ram=4 << 20, **kw)
    process = host.create_process("p")
    base = do_mmap(process.mm, 0, PAGES * PAGE, RW, ANON)
    return SvaDevice(process), process, base


@pytest.mark.parametrize("kw", PROFILES)
def test_the_device_uses_the_processs_addresses_and_faults_like_it(kw: dict[str, Any]) -> None:
    device, process, base = machine(**kw)

    def body() -> None:
        copy_to_user(process, base, b"cpu")
        assert device.read(base, 3) == b"cpu"
        device.write(base + PAGE, b"device")
        assert copy_from_user(process, base + PAGE, 6) == b"device"
        do_madvise(process.mm, base, 2 * PAGE, MADV_PAGEOUT)
        process.host.swap_device.drain()
        assert device.iotlb.entries == {}
        assert device.read(base + PAGE, 6) == b"device"

    run(device.host, body)


def test_its_walks_set_accessed_and_dirty_in_the_shared_entries() -> None:
    device, process, base = machine()

    def body() -> None:
        device.write(base, b"one")
        do_madvise(process.mm, base, PAGE, MADV_PAGEOUT)
        process.host.swap_device.drain()
        assert device.read(base, 3) == b"one"
        # Clean and writable now: only the walk's dirty bit tells reclaim of this write.
        device.write(base, b"two")
        do_madvise(process.mm, base, PAGE, MADV_PAGEOUT)
        process.host.swap_device.drain()
        assert copy_from_user(process, base, 3) == b"two"

    run(device.host, body)


def order(device: SvaDevice, process: Process, operation: Callable[[], object]) -> list[str]:
    """Entry stores, brackets, primary flushes, IOTLB flushes and frees of an operation, in order."""
    host, log = device.host, []
    hook = lambda mm, _, old, new: log.append("set" if new else "clear") if mm is process.mm else None  # noqa: E731
    host.pte_hooks.append(hook)
    names = {
        "primary_flush": "flush", "iotlb_flush": "iotlb", "frame_free": "free", "mmu_notifier_start": "start",
        "mmu_notifier_end": "end",
    }
    listener = Listener(
        [f"refault:{name}" for name in names], lambda event: log.append(names[event.name]), ancestors=False
    )
    host.stream.listen(listener)
    run(host, operation)
    host.pte_hooks.remove(hook)
    return log


def touched(device: SvaDevice, base: int) -> None:
    run(device.host, lambda: device.write(base, b"x"), device.host.lru.lru_add_drain_all)


def test_linux_6_18_flushes_it_with_the_cpu_whatever_the_bracket_does() -> None:
    device, process, base = machine()
    touched(device, base)
    seen = order(device, process, lambda: do_madvise(process.mm, base, PAGE, MADV_DONTNEED))
    assert seen == ["start", "clear", "end", "flush", "iotlb", "free"]
    touched(device, base)
    seen = order(device, process, lambda: do_munmap(process.mm, base, PAGE))
    assert [step for step in seen if step in ("clear", "flush", "iotlb")][:3] == ["clear", "flush", "iotlb"]


def test_linux_6_18_tells_it_at_once_of_an_entry_whose_own_flush_is_put_off() -> None:
    device, process, base = machine()
    touched(device, base)
    seen = order(device, process, lambda: do_madvise(process.mm, base, PAGE, MADV_PAGEOUT))
    assert seen[:5] == ["start", "clear", "iotlb", "set", "end"]


def test_a_copy_on_write_flushes_it_before_the_new_entry_is_set() -> None:
    for kw in PROFILES:
        device, process, base = machine(**kw)
        touched(device, base)
        child = fork_process(process)
        run(device.host, lambda device=device, base=base: device.read(base, 1))  # type: ignore[misc]
        assert device.iotlb.entries
        seen = order(device, process, lambda p=process, b=base: copy_to_user(p, b, b"y"))  # type: ignore[misc]
        assert seen == ["start", "clear", "flush", "iotlb", "set", "end"]
        exit_process(child)


def test_linux_5_10_tells_it_where_the_entry_changes_and_again_at_the_end() -> None:
    device, process, base = machine(profile=LINUX_5_10)
    touched(device, base)
    seen = order(device, process, lambda: do_madvise(process.mm, base, PAGE, MADV_DONTNEED))
    assert seen[:3] == ["start", "clear", "iotlb"], "before the bracket ends"
    assert "free" not in seen[: seen.index("iotlb")]


def test_mprotect_takes_the_right_to_write_from_the_device_too() -> None:
    device, process, base = machine()
    touched(device, base)
    run(device.host, lambda: do_mprotect(process.mm, base, PAGE, PROT_READ))
    assert device.iotlb.entries == {}
    with pytest.raises(KernelError) as caught:
        run(device.host, lambda: device.write(base, b"x"))
    assert caught.value.errno == EFAULT


def test_what_is_not_mapped_is_an_invalid_page_request() -> None:
    device, _, base = machine()
    with pytest.raises(KernelError) as caught:
        run(device.host, lambda: device.read(base + PAGES * PAGE, 1))
    assert caught.value.errno == EFAULT


def test_a_process_that_exits_leaves_the_device_with_nothing() -> None:
    device, process, base = machine()
    touched(device, base)
    run(device.host, lambda: exit_process(process))
    audit(device.host)
    with pytest.raises(KernelError) as caught:
        run(device.host, lambda: device.read(base, 1))
    assert caught.value.errno == EIO
    device.unbind()
    assert not device.host.mms


def test_both_kinds_of_callbacks_at_once_are_refused() -> None:
    class Both(MmuNotifier):
        def invalidate_range_start(self, range_: MmuNotifierRange) -> int:
            return 0

        def arch_invalidate_secondary_tlbs(self, mm: MmStruct, start: int, end: int) -> None:
            pass

    _, process, _ = machine()
    both = Both()
    assert mmu_notifier_register(both, process.mm) == -EINVAL
    assert not both.hashed

    class Greedy(SvaDevice):
        def invalidate_range_end(self, range_: MmuNotifierRange) -> None:
            pass

    with pytest.raises(KernelError, match="EINVAL"):
        Greedy(process)


def test_an_iotlb_that_nobody_flushes_reaches_a_frame_that_is_somebody_elses() -> None:
    class Deaf(SvaDevice):
        def _invalidate(self, mm: MmStruct, start: int, end: int) -> None:
            pass

    host = make_host()
    process = host.create_process("p")
    base = do_mmap(process.mm, 0, PAGE, RW, ANON)
    device = Deaf(process)
    touched(device, base)
    with pytest.raises(BrokenTruth, match=r"freed-frame-translated.*IOTLB"):
        run(host, lambda: do_madvise(process.mm, base, PAGE, MADV_DONTNEED))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kw", PROFILES)
def test_no_translation_outlives_its_frame_in_any_order(kw: dict[str, Any], seed: int) -> None:
    device, process, base = machine(**kw)
    storm(
        process, base, PAGES, seed, lambda at: device.read(base + at, 8),
        lambda at, data: device.write(base + at, data),
    )
    device.host.sched.run_task("rest", device.host.quiesce)
    audit(device.host)

"""A process on an EPT of its own: what its faults' own GUP does to it, and what the retry is for."""

from __future__ import annotations

from errno import EFAULT
from typing import Any

import pytest

from emu.dune import Dune
from host_mm.fork import exit_process, fork_process
from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.migrate import move_pages
from host_mm.mmap import do_mmap
from host_mm.mmu_notifier import mmu_notifier_test_young
from host_mm.process import Process
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.rmap import folio_referenced
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, make_host, run
from tests.host_mm.storm import storm
from trace_events.event import Event
from trace_events.stream import Listener

PAGES = 16


def machine(**kw: Any) -> tuple[Dune, Process, int]:
    host = make_host(ram=4 << 20, **kw)
    process = host.create_process("p")
    base = do_mmap(process.mm, 0, PAGES * PAGE, RW, ANON)
    return host.sched.run_task("enter", lambda: Dune(process)), process, base


def at_rest(host: HostMm) -> None:
    host.sched.run_task("rest", host.quiesce)
    audit(host)


def test_the_process_sees_one_memory_in_and_out_of_dune_mode() -> None:
    dune, process, base = machine()

    def body() -> None:
        copy_to_user(process, base, b"outside")
        assert dune.load(base, 7) == b"outside"
        dune.store(base + PAGE, b"inside")
        assert copy_from_user(process, base + PAGE, 6) == b"inside"
        do_madvise(process.mm, base, 2 * PAGE, MADV_PAGEOUT)
        process.host.swap_device.drain()
        assert not dune.mapped.entries
        assert dune.load(base + PAGE, 6) == b"inside"

    run(dune.host, body)
    at_rest(dune.host)
    dune.close()
    at_rest(dune.host)


def test_the_faults_own_copy_on_write_hits_the_entry_that_is_being_filled() -> None:
    """The seed of this file: an EPT fault, get_user_pages, wp_page_copy, the notifier, in one stack."""
    dune, process, base = machine()
    host = dune.host
    run(host, lambda: dune.store(base, b"old"))
    child = fork_process(process)
    run(host, lambda: dune.load(base, 3))
    before = dune.mapped.entries[base >> 12] >> 1
    seen: list[Event] = []
    names = ("dune_*", "gup", "host_fault", "mmu_notifier_*")
    host.stream.listen(Listener([f"refault:{name}" for name in names], seen.append))
    run(host, lambda: dune.store(base, b"new"))
    assert [event.name for event in seen] == [
        "dune_ept_fault",
        "gup", "host_fault",                            # fast GUP finds a read-only entry; slow GUP faults
        "mmu_notifier_start", "dune_drop", "mmu_notifier_end",
        "gup", "dune_retry",                            # it has the copy; but a bracket came by: its own
        "dune_ept_fault", "gup", "dune_map",
    ]
    number = {event.seq: event for event in seen}
    chain, event = [], seen[4]
    while event is not None:
        chain.append(event.name)
        event = number.get(event.cause)  # type: ignore[arg-type]
    assert chain == ["dune_drop", "mmu_notifier_start", "host_fault", "dune_ept_fault"]
    assert dune.mapped.entries[base >> 12] >> 1 != before
    assert copy_from_user(process, base, 3) == b"new"
    assert copy_from_user(child, base, 3) == b"old"
    exit_process(child)


def fork_in_the_middle(*breaks: str, checks: bool = True) -> tuple[Dune, Process, Process, int]:
    """A store's GUP has answered with a page of the process's own; before it is entered, a fork shares it."""
    dune, process, base = machine(breaks=frozenset(breaks), checks=checks)
    host = dune.host
    run(host, lambda: copy_to_user(process, base, b"old"))
    children: list[Process] = []
    gup = dune._get_user_pages_fast

    def slow(address: int, flags: int) -> int:
        pfn = gup(address, flags)
        if not children:
            children.append(fork_process(process))
        return pfn

    dune._get_user_pages_fast = slow  # type: ignore[method-assign]
    run(host, lambda: dune.store(base, b"new"))
    return dune, process, children[0], base


def test_an_answer_that_a_bracket_overtook_is_thrown_away() -> None:
    dune, process, child, base = fork_in_the_middle()
    assert copy_from_user(process, base, 3) == b"new"
    assert copy_from_user(child, base, 3) == b"old"
    exit_process(child)
    at_rest(dune.host)


def test_without_the_retry_the_store_lands_in_the_childs_page() -> None:
    _, _, child, base = fork_in_the_middle("dune-no-retry", checks=False)
    assert copy_from_user(child, base, 3) == b"new", "the child sees what its parent wrote after the fork"
    with pytest.raises(BrokenTruth, match="secondary-stale"):
        fork_in_the_middle("dune-no-retry")


def test_without_the_retry_the_process_reads_a_page_that_it_has_dropped() -> None:
    dune, process, base = machine(breaks=frozenset({"dune-no-retry"}), checks=False)
    gup = dune._get_user_pages_fast

    def slow(address: int, flags: int) -> int:
        pfn = gup(address, flags)
        do_madvise(process.mm, base, PAGE, MADV_DONTNEED)
        return pfn

    def body() -> None:
        copy_to_user(process, base, b"old")
        dune._get_user_pages_fast = slow  # type: ignore[method-assign]
        assert dune.load(base, 3) == b"old"
        assert copy_from_user(process, base, 3) == bytes(3)

    run(dune.host, body)


def test_an_entry_keeps_its_page_until_a_bracket_takes_it() -> None:
    dune, process, base = machine()
    host = dune.host
    run(host, lambda: dune.store(base, b"x"), host.lru.lru_add_drain_all)
    pfn = dune.mapped.entries[base >> 12] >> 1
    assert host.pages.refcount[pfn] == 2
    run(host, lambda: move_pages(process, [base], [1]))
    assert not dune.mapped.entries
    assert host.allocator.nid_of(process.tlb.lookup(base, False)) in (-1, 0, 1)
    assert host.pages.refcount[pfn] == 0, "moved, although the entry held a reference when it began"
    at_rest(host)


def test_aging_takes_the_entry_and_says_young_once() -> None:
    dune, process, base = machine()
    host = dune.host
    run(host, lambda: dune.store(base, b"x"), host.lru.lru_add_drain_all)
    pfn = dune.mapped.entries[base >> 12] >> 1
    assert mmu_notifier_test_young(process.mm, base) == 1
    assert folio_referenced(host, pfn)[0] == 1
    assert not dune.mapped.entries
    assert mmu_notifier_test_young(process.mm, base) == 0
    assert folio_referenced(host, pfn)[0] == 0


def test_what_is_not_mapped_cannot_be_reached() -> None:
    dune, _, base = machine()
    with pytest.raises(KernelError) as caught:
        run(dune.host, lambda: dune.load(base + PAGES * PAGE, 1))
    assert caught.value.errno == EFAULT
    at_rest(dune.host)


def test_a_process_may_exit_with_its_ept_filled() -> None:
    dune, process, base = machine()
    host = dune.host
    run(host, lambda: dune.store(base, b"x"), lambda: dune.load(base + PAGE, 1))
    run(host, lambda: exit_process(process))
    assert not dune.mapped.entries, "no bracket tells of an address space that goes away"
    at_rest(host)
    dune.close()
    at_rest(host)
    assert not host.mms


def together(seed: int, *breaks: str, profile: MmProfile = LINUX_6_18) -> HostMm:
    dune, process, base = machine(breaks=frozenset(breaks), profile=profile)
    storm(
        process, base, PAGES, seed, lambda at: dune.load(base + at, 8),
        lambda at, data: dune.store(base + at, data),
    )
    return dune.host


@pytest.mark.parametrize("profile", [LINUX_6_18, LINUX_5_10], ids=lambda profile: profile.name)
@pytest.mark.parametrize("seed", range(12))
def test_the_two_memories_are_one_in_any_order(seed: int, profile: MmProfile) -> None:
    at_rest(together(seed, profile=profile))


def test_a_missing_retry_breaks_a_truth() -> None:
    def until_broken() -> None:
        for seed in range(40):
            together(seed, "dune-no-retry")

    with pytest.raises(BrokenTruth, match="secondary-stale"):
        until_broken()

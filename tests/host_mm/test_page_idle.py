"""Idle page tracking: clear_young of one page for each mapping, and what it says of use."""

from __future__ import annotations

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.kernel.errors import KernelError
from host_mm.page import PG_idle, PG_young
from host_mm.page_idle import page_idle_bitmap_read, page_idle_bitmap_write, page_is_idle, page_set_idle
from host_mm.rmap import folio_referenced
from host_mm.tlb import flush_tlb_mm
from host_mm.truths import audit
from tests.host_mm.machine import PAGE, Vmm, run
from tests.host_mm.young import YoungMmu


def machine(pages: int = 4) -> tuple[Vmm, YoungMmu, list[int]]:
    vmm = Vmm()
    secondary = YoungMmu(vmm.mm, vmm.base)
    pfns: list[int] = []

    def ready() -> None:
        for page in range(pages):
            vmm.host_write(page * PAGE, page + 1)
        vmm.host.lru.lru_add_drain_all()
        pfns.extend(vmm.pfn(page * PAGE) for page in range(pages))

    run(vmm.host, ready)
    secondary.take()
    return vmm, secondary, pfns


def host_uses(vmm: Vmm, offset: int) -> None:
    """A load whose translation is not cached: else the CPU would not look at the accessed bit."""

    def body() -> None:
        flush_tlb_mm(vmm.mm)
        vmm.host_read(offset)

    run(vmm.host, body)


def test_making_idle_clears_one_page_through_clear_young_and_opens_no_bracket() -> None:
    vmm, secondary, pfns = machine()
    assert page_set_idle(vmm.host, pfns[2])
    assert secondary.take() == [("clear_young", 2, 1)]
    assert secondary.brackets == 0
    assert vmm.host.pages.flags[pfns[2]] & PG_idle


def test_a_page_that_only_the_guest_used_is_not_idle() -> None:
    vmm, secondary, pfns = machine()
    page_set_idle(vmm.host, pfns[1])
    assert page_is_idle(vmm.host, pfns[1])
    secondary.young.add(1)
    assert not page_is_idle(vmm.host, pfns[1])
    assert not page_is_idle(vmm.host, pfns[1]), "it stays so until it is made idle again"


def test_a_page_that_the_host_used_is_not_idle() -> None:
    vmm, _, pfns = machine()
    page_set_idle(vmm.host, pfns[0])
    host_uses(vmm, 0)
    assert not page_is_idle(vmm.host, pfns[0])


def test_what_tracking_cleared_still_counts_for_reclaim() -> None:
    vmm, _, pfns = machine()
    page_set_idle(vmm.host, pfns[0])
    assert vmm.host.pages.flags[pfns[0]] & PG_young
    referenced: list[int] = []
    run(vmm.host, lambda: referenced.append(folio_referenced(vmm.host, pfns[0])[0]))
    assert referenced == [1]
    assert not vmm.host.pages.flags[pfns[0]] & PG_young


def test_every_mapping_of_a_shared_page_is_asked() -> None:
    vmm, secondary, pfns = machine()

    def body() -> None:
        child = fork_process(vmm.process)
        page_set_idle(vmm.host, pfns[0])
        assert page_is_idle(vmm.host, pfns[0])
        from host_mm.uaccess import copy_from_user

        copy_from_user(child, vmm.base, 1)
        assert not page_is_idle(vmm.host, pfns[0])
        exit_process(child)

    run(vmm.host, body)
    assert ("clear_young", 0, 1) in secondary.take()
    run(vmm.host, vmm.host.quiesce)
    audit(vmm.host)


def test_the_bitmap_has_one_bit_a_frame_and_goes_by_words() -> None:
    vmm, _, pfns = machine()
    host = vmm.host
    start = pfns[0] // 64 * 64
    bits = bytearray(8)
    bits[(pfns[0] - start) >> 3] |= 1 << ((pfns[0] - start) & 7)
    assert page_idle_bitmap_write(host, start, bytes(bits)) == 8
    assert page_idle_bitmap_read(host, start, 64) == bytes(bits)
    host_uses(vmm, 0)
    assert page_idle_bitmap_read(host, start, 64) == bytes(8)


def test_the_bitmap_answers_bad_positions_as_the_file_does() -> None:
    vmm, _, _ = machine(1)
    host = vmm.host
    with pytest.raises(KernelError, match="multiples of 64") as refused:
        page_idle_bitmap_read(host, 1, 64)
    assert refused.value.name == "EINVAL"
    with pytest.raises(KernelError) as refused:
        page_idle_bitmap_write(host, 0, bytes(7))
    assert refused.value.name == "EINVAL"
    with pytest.raises(KernelError) as refused:
        page_idle_bitmap_write(host, host.pages.nr_frames, bytes(8))
    assert refused.value.name == "ENXIO"
    assert page_idle_bitmap_read(host, host.pages.nr_frames, 64) == b""


def test_a_frame_on_no_list_takes_no_idle_bit() -> None:
    vmm, _, _ = machine(1)
    assert not page_set_idle(vmm.host, vmm.mm.pgd >> 12)
    assert not page_set_idle(vmm.host, -1)

"""The VMM and the dirty log, in every form, on the real CPU model: what the guest wrote is what is read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from host_mm.kernel.errors import KernelError
from refault.scenarios.api import DATA_GPA, PAGE
from refault.scenarios.emulator import EmulatorBackend

FORMS: dict[str, dict[str, str]] = {
    "wrprot": {},
    "wrprot-ad": {"kvm_intel.eptad": "1"},
    "pml": {"kvm_intel.eptad": "1", "kvm_intel.pml": "1"},
    "ring": {"vmm.dirty_ring_size": "256"},
    "ring-pml": {"kvm_intel.eptad": "1", "kvm_intel.pml": "1", "vmm.dirty_ring_size": "1024"},
}


@contextmanager
def guest(**params: str) -> Iterator[EmulatorBackend]:
    names = {name.replace("__", "."): value for name, value in params.items()}
    with machine(names) as backend:
        yield backend


@contextmanager
def machine(params: dict[str, str]) -> Iterator[EmulatorBackend]:
    backend = EmulatorBackend(params=params, check=True, mmu="ept")
    try:
        yield backend
    except BaseException:
        backend.vm.abandon()
        raise
    backend.close()


def dirty(backend: EmulatorBackend, pages: int = 2048) -> set[int]:
    host: Any = backend.vm.host
    host.get_dirty(DATA_GPA, pages, DATA_GPA + 2047 * PAGE)
    raw = backend._host(lambda: backend.board.vmm.read(backend.data_hva + 2047 * PAGE, pages // 8))
    bits = int.from_bytes(raw, "little")
    return {n for n in range(pages) if bits >> n & 1}


@pytest.mark.parametrize("form", FORMS)
def test_what_the_guest_wrote_is_what_get_dirty_answers(form: str) -> None:
    with machine(FORMS[form]) as g:
        for page in range(6):
            g.store(page * PAGE, 1)
        g.vm.host.dirty_log(DATA_GPA, 1)
        g.store(2 * PAGE, 2)
        g.read_modify_write(4 * PAGE)
        g.load(3 * PAGE)
        g.host_write(5 * PAGE, 7)
        assert dirty(g) == {2, 4}
        assert dirty(g) == set()
        g.store(4 * PAGE, 3)
        assert dirty(g) == {4}
        g.vm.host.dirty_log(DATA_GPA, 0)
        g.store(4 * PAGE, 4)
        with pytest.raises(KernelError) as info:
            g.vm.host.get_dirty(DATA_GPA, 1)
        assert info.value.errno == errno.ENOENT


@pytest.mark.parametrize("form", ["ring", "ring-pml", "pml"])
def test_a_guest_that_fills_its_log_is_served_and_loses_no_page(form: str) -> None:
    with machine(FORMS[form]) as g:
        count = 1100
        for page in range(count):
            g.store(page * PAGE, page)
        g.vm.host.dirty_log(DATA_GPA, 1)
        for page in range(count):
            assert g.store(page * PAGE, page + 1) == "ok"
        assert dirty(g) >= set(range(count))
        assert g.load(5 * PAGE) == 6


def test_harvested_entries_are_answered_later_and_protected_only_by_the_reset() -> None:
    with machine(FORMS["ring"]) as g:
        g.vm.host.dirty_log(DATA_GPA, 1)
        g.store(PAGE, 1)
        assert g.vm.host.harvest_rings(0) == 1
        assert g.vm.host.harvest_rings(0) == 0
        g.store(PAGE, 2)
        assert g.vm.host.harvest_rings(1) == 0, "the page is still writable"
        g.store(PAGE, 3)
        assert g.vm.host.harvest_rings(1) == 1
        assert dirty(g) == {1}


def test_without_rings_there_is_nothing_to_harvest() -> None:
    with guest() as g:
        assert g.vm.host.harvest_rings() == 0
        with pytest.raises(KernelError) as info:
            g.vm.host.harvest_rings(2)
        assert info.value.errno == errno.EINVAL


@pytest.mark.parametrize("form", ["wrprot", "pml"])
def test_manual_protection_clears_just_the_range_it_is_told(form: str) -> None:
    with machine(FORMS[form]) as g:
        for page in (70, 71, 72):
            g.store(page * PAGE, 1)
        g.vm.host.manual_dirty(1)
        g.vm.host.dirty_log(DATA_GPA, 1)
        for page in (70, 71, 72):
            g.store(page * PAGE, 2)
        assert dirty(g) == {70, 71, 72} == dirty(g)
        g.vm.host.clear_dirty(DATA_GPA + 71 * PAGE, 1)
        assert dirty(g) == {70, 72}
        g.store(71 * PAGE, 3)
        assert dirty(g) == {70, 71, 72}
        g.vm.host.manual_dirty(0)
        assert dirty(g) == {70, 71, 72}
        assert dirty(g) == set()


@pytest.mark.parametrize(
    ("call", "why"),
    [(("manual_dirty", 2), errno.EINVAL), (("clear_dirty", DATA_GPA, 1), errno.ENOENT),
     (("clear_dirty", DATA_GPA + 1, 1), errno.EINVAL), (("clear_dirty", DATA_GPA, 2049), errno.EFAULT),
     (("clear_dirty", 0x9000_0000, 1), errno.EFAULT)],
)
def test_bad_arguments_are_answered_with_their_errno(call: tuple[Any, ...], why: int) -> None:
    with guest() as g:
        with pytest.raises(KernelError) as info:
            getattr(g.vm.host, call[0])(*call[1:])
        assert info.value.errno == why


def test_a_vm_with_rings_has_no_bitmap_to_clear() -> None:
    with machine(FORMS["ring"]) as g:
        g.vm.host.dirty_log(DATA_GPA, 1)
        with pytest.raises(KernelError) as info:
            g.vm.host.clear_dirty(DATA_GPA, 1)
        assert info.value.errno == errno.ENXIO


def test_ring_sizes_that_kvm_refuses_are_refused() -> None:
    with pytest.raises(KernelError) as info:
        EmulatorBackend(params={"vmm.dirty_ring_size": "100"})
    assert info.value.errno == errno.EINVAL


def test_the_cpus_log_needs_its_dirty_flags() -> None:
    with machine(FORMS["pml"]) as g:
        with pytest.raises(KernelError) as info:
            g.vm.host.ept_ad(0)
        assert info.value.errno == errno.EINVAL


@pytest.mark.parametrize("form", FORMS)
def test_what_kvm_writes_through_its_own_mapping_is_logged_for_the_vcpu(form: str) -> None:
    with machine(FORMS[form]) as g:
        g.store(2 * PAGE, 1)
        g.vm.host.dirty_log(DATA_GPA, 1)
        g.vm.host.kvm_map_write(DATA_GPA + 2 * PAGE, 7)
        assert dirty(g) == {2}
        assert g.load(2 * PAGE) == 7

"""Every counter of pages that lies is found (host_mm/truths_vmstat.py)."""

from __future__ import annotations

import pytest

from host_mm import truths_vmstat
from host_mm.kernel.errors import BrokenTruth
from host_mm.mlock import do_mlock
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, Vmm
from tests.host_mm.thp_machine import ThpVmm


@pytest.mark.parametrize("name", truths_vmstat._COUNTED)
def test_a_counter_that_lies_is_found(name: str) -> None:
    vm = Vmm()
    before = vm.host.vmstat["nr_anon_pages"]
    vm.guest_store(0, 1)
    do_mlock(vm.mm, vm.base + PAGE, PAGE, 0)
    vm.host.lru.lru_add_drain_all()
    audit(vm.host)
    assert vm.host.vmstat["nr_anon_pages"] == before + 2
    assert vm.host.vmstat["nr_mlock"] == 1
    vm.host.vmstat[name] += 1
    with pytest.raises(BrokenTruth, match=f"vmstat.*{name}"):
        audit(vm.host)


def test_pages_of_files_count_as_cached_mapped_and_dirty() -> None:
    s = Shared(disk=b"disk" * 3000)
    s.do(lambda: copy_from_user(s.a, s.at, 1))
    s.do(lambda: copy_to_user(s.a, s.at + PAGE, b"x"))
    audit(s.host)
    assert s.host.vmstat["nr_file_pages"] >= s.host.vmstat["nr_file_mapped"] >= 2
    assert s.host.vmstat["nr_dirty"] == 1
    s.file.dirty.clear()
    with pytest.raises(BrokenTruth):
        audit(s.host)


def test_a_huge_page_counts_as_its_pages_and_as_one() -> None:
    vm = ThpVmm()
    before = vm.host.vmstat["nr_anon_pages"]
    vm.fill(0, 2)
    vm.audit()
    assert vm.host.vmstat["nr_anon_pages"] == before + 512
    assert vm.host.vmstat["nr_anon_transparent_hugepages"] == 1

"""Guest memory in huge pages: the operations, SPTEs of 2 MiB, and a process that shares the page tables."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import refault
from emu.hugetlb import GIB
from host_mm.kernel.errors import BrokenTruth
from host_mm.mmu_notifier import (
    MMU_NOTIFY_CLEAR,
    mmu_notifier_invalidate_range_end,
    mmu_notifier_invalidate_range_start,
    mmu_notifier_range_init,
)
from refault.scenarios.api import DATA_GPA, DATA_SIZE, Scenario
from refault.scenarios.emulator import EmulatorBackend

GPA = 0x8000_0000
HUGE = 2 << 20
PAGES = HUGE >> 12


@pytest.fixture
def vm() -> Iterator[refault.VM]:
    with refault.VM("4M", host_ram="48M", check=True) as machine:
        machine.load("first-touch")
        machine.run(max_insns=100_000)
        machine.host.nr_hugepages(4)
        yield machine


def pool(vm: refault.VM) -> tuple[int, int]:
    h = vm.board.host.mm.hstate
    return h.free, h.resv


@pytest.mark.parametrize("shared", [0, 1])
def test_a_region_is_promised_its_pages_and_gives_them_back_with_the_vm(vm: refault.VM, shared: int) -> None:
    slot = vm.host.hugetlb_create(gpa=GPA, pages=2 * PAGES, shared=shared)
    assert slot >= 1
    assert pool(vm) == (4, 2)
    vm.host.host_write(gpa=GPA + 0x3000, value=7)
    assert pool(vm) == (3, 1)
    vm.host.slot_delete(slot)
    assert pool(vm) == (3, 1), "the VMM keeps the memory"
    vm.host.slot_restore(slot)
    assert vm.host.host_read(gpa=GPA + 0x3000) == 7


@pytest.mark.parametrize(("call", "number"), [
    (lambda host: host.hugetlb_create(gpa=GPA + 0x1000, pages=PAGES), errno.EINVAL),
    (lambda host: host.hugetlb_create(gpa=GPA, pages=1), errno.EINVAL),
    (lambda host: host.hugetlb_create(gpa=GPA, pages=PAGES, shared=2), errno.EINVAL),
    (lambda host: host.hugetlb_create(gpa=GPA, pages=5 * PAGES), errno.ENOMEM),
    (lambda host: host.hugetlb_create(gpa=GPA, pages=5 * PAGES, shared=0), errno.ENOMEM),
    (lambda host: host.hugetlb_create(gpa=0, pages=PAGES), errno.EEXIST),
    (lambda host: host.hugetlb_peer_read(gpa=0), errno.EINVAL),
    (lambda host: host.hugetlb_sharers(gpa=0), errno.EINVAL),
    (lambda host: host.hugetlb_unshare(gpa=GPA), errno.EINVAL),
    (lambda host: host.nr_hugepages(-1), errno.EINVAL),
])
def test_what_cannot_be_is_refused_and_nothing_is_left_of_it(
    vm: refault.VM, call: Callable[[Any], int], number: int
) -> None:
    with pytest.raises(refault.KernelError) as caught:
        call(vm.host)
    assert caught.value.errno == number
    assert pool(vm) == (4, 0)
    assert not vm.board.host.mm.mappings


def test_a_private_region_has_no_file_to_cut_holes_into_and_no_peer(vm: refault.VM) -> None:
    vm.host.hugetlb_create(gpa=GPA, pages=PAGES, shared=0)
    with pytest.raises(refault.KernelError):
        vm.host.hugetlb_peer_read(gpa=GPA)
    with pytest.raises(refault.KernelError):
        vm.host.remove(gpa=GPA, pages=PAGES)
    assert vm.host.hugetlb_sharers(gpa=GPA) == 0
    assert vm.host.hugetlb_unshare(gpa=GPA) == 0


def test_a_hole_gives_whole_pages_back_and_zeroes_the_rest(vm: refault.VM) -> None:
    vm.host.hugetlb_create(gpa=GPA, pages=2 * PAGES)
    for gpa in (GPA, GPA + 0x3000, GPA + HUGE):
        vm.host.host_write(gpa=gpa, value=7)
    vm.host.punch_hole(gpa=GPA + 0x3000, pages=1)
    assert [vm.host.host_read(gpa=gpa) for gpa in (GPA, GPA + 0x3000)] == [7, 0]
    vm.host.punch_hole(gpa=GPA, pages=2 * PAGES)
    assert pool(vm) == (4, 0)
    assert vm.host.host_read(gpa=GPA + HUGE) == 0


def test_a_peer_sees_the_memory_and_shares_the_table_where_a_whole_gib_is_mapped(vm: refault.VM) -> None:
    vm.host.hugetlb_create(gpa=GPA, pages=GIB >> 12, reserve=0)
    vm.host.host_write(gpa=GPA + 0x5000, value=7)
    assert vm.host.hugetlb_sharers(gpa=GPA) == 0
    assert vm.host.hugetlb_peer_read(gpa=GPA + 0x5000) == 7
    assert vm.host.hugetlb_sharers(gpa=GPA) == 1
    vm.host.hugetlb_peer_write(gpa=GPA + 0x5000, value=8, size=1)
    assert vm.host.host_read(gpa=GPA + 0x5000) == 8
    vm.host.hugetlb_unshare(gpa=GPA)
    assert vm.host.hugetlb_sharers(gpa=GPA) == 0
    assert vm.host.host_read(gpa=GPA + 0x5000) == 8


def test_a_smaller_region_is_seen_by_the_peer_through_tables_of_its_own(vm: refault.VM) -> None:
    vm.host.hugetlb_create(gpa=GPA, pages=PAGES)
    vm.host.host_write(gpa=GPA, value=7)
    assert vm.host.hugetlb_peer_read(gpa=GPA) == 7
    assert vm.host.hugetlb_sharers(gpa=GPA) == 0


def test_huge_pages_move_and_are_not_swapped(vm: refault.VM) -> None:
    vm.host.hugetlb_create(gpa=GPA, pages=PAGES)
    vm.host.host_write(gpa=GPA, value=7)
    assert vm.host.migrate(gpa=GPA, pages=PAGES) == PAGES
    assert vm.host.host_read(gpa=GPA) == 7
    with pytest.raises(refault.KernelError):
        vm.host.swap_out(gpa=GPA, pages=PAGES)
    assert vm.host.age(gpa=GPA, pages=PAGES) == 0


class Sharing(EmulatorBackend):
    """D shows the first 8 MiB of a file of 1 GiB, which a peer maps as well.

    Made with thp=True: MADV_NOHUGEPAGE of D alone would part the mapping, and no table were shared.
    """

    def create_hugetlb(self, kind: str) -> None:
        vmm = self.board.vmm
        self.data_hva = self.normal.data = 0x6000_0000_0000
        self.memfd = vmm.memfd_hugetlb(GIB)
        vmm.mmap_hugetlb(GIB, self.data_hva, self.memfd, reserve=False)
        self.board.memory.show(DATA_GPA, DATA_SIZE, self.data_hva)
        host = self.board.host.mm
        self.peer = host.create_process("peer")

    def share(self) -> None:
        """The peer maps the file and reads it: it uses the VMM's table then."""
        from emu.vmm import Vmm

        peer = Vmm(self.board.host.mm, self.peer)

        def read() -> None:
            peer.mmap_hugetlb(GIB, 0x7000_0000_0000, self.memfd, reserve=False)
            peer.read(0x7000_0000_0000, 1)

        self._host(read)
        assert self.board.vmm.pt_share_count(self.data_hva) == 1

    def close(self) -> None:
        from host_mm.fork import exit_process

        self._host(lambda: exit_process(self.peer))
        super().close()


def backend(kind: type[EmulatorBackend], **kw: Any) -> EmulatorBackend:
    return kind(hugetlb="shared", check=True, mmu="ept", params={"hugetlb.nr_hugepages": "6"}, **kw)


def test_the_guests_mappings_are_of_2_mib_and_come_back_so() -> None:
    machine = backend(EmulatorBackend)
    s = Scenario(machine)
    s.st(0x3000, 1)
    assert machine.vm.host.map_level(DATA_GPA + 0x3000) == 2
    assert s.ld(0x7000) == 0
    assert s.punch_hole(0, HUGE, "hole") == 0
    assert machine.vm.host.map_level(DATA_GPA + 0x3000) == 0
    assert s.ld(0x3000) == 0
    assert machine.vm.host.map_level(DATA_GPA + 0x3000) == 2
    machine.close()


def drop_one_page_of_a_shared_table(machine: Sharing) -> None:
    s = Scenario(machine)
    s.st(0x3000, 1)
    s.st(0x203000, 2)
    machine.share()
    s.madv(0, HUGE, "DONTNEED")
    assert s.ld(0x203000) == 2
    machine.close()


def test_dropping_a_page_of_a_shared_table_takes_every_spte_of_that_gib() -> None:
    machine = backend(Sharing, thp=True)
    assert isinstance(machine, Sharing)
    drop_one_page_of_a_shared_table(machine)
    at = machine.lines.index(">> host madvise(D+0x0,0x200000,DONTNEED)")
    assert machine.lines[at + 1] == f"kvm_unmap_hva_range [D+0x0..D+{GIB:#x}]"


def test_telling_of_the_dropped_page_only_leaves_sptes_to_memory_that_is_not_mapped() -> None:
    machine = backend(Sharing, thp=True)
    assert isinstance(machine, Sharing)
    machine.board.host.mm.breaks = frozenset({"hugetlb-narrow-unshare"})
    with pytest.raises(BrokenTruth):
        drop_one_page_of_a_shared_table(machine)
    machine.vm.abandon()


def test_a_guest_whose_ram_is_huge_pages_runs_on_sptes_of_2_mib() -> None:
    with refault.VM("8M", memory_backend="hugetlb", host_ram="32M", vcpus=2, seed=2, check=True) as machine:
        machine.load("smp")
        stop = machine.run(max_insns=3_000_000)
        assert (stop.kind, stop.status) == ("exit", 0), machine.serial
        assert machine.host.map_level(0x100000) == 2
        free, reserved = pool(machine)
        assert free == reserved < 4
        machine.finish()


def test_huge_ram_moves_and_forks_under_a_running_guest() -> None:
    params = {"hugetlb.nr_hugepages": "8"}
    with refault.VM("4M", memory_backend="hugetlb", host_ram="48M", params=params, check=True) as machine:
        machine.load("guest-paging")
        for _ in range(6):
            machine.run(max_insns=20_000)
            machine.host.migrate(gpa=0, pages=1024)
            machine.host.fork()
            machine.host.child_exit()
            machine.host.punch_hole(gpa=0x3FF000, pages=1)
        stop = machine.run(max_insns=5_000_000)
        assert (stop.kind, stop.status) == ("exit", 0), machine.serial
        machine.finish()


def test_ram_of_huge_pages_is_whole_huge_pages_and_the_pool_must_have_them() -> None:
    with pytest.raises(refault.UsageError, match="2 MiB"):
        refault.VM("3M", memory_backend="hugetlb")
    with pytest.raises(refault.KernelError) as caught:
        refault.VM("8M", memory_backend="hugetlb", params={"hugetlb.nr_hugepages": "1"})
    assert caught.value.errno == errno.ENOMEM


def test_a_pool_that_may_grow_has_pages_for_who_asks_and_gives_them_up_again() -> None:
    params = {"hugetlb.nr_overcommit_hugepages": "2"}
    with refault.VM("4M", host_ram="48M", params=params, check=True) as machine:
        machine.load("first-touch")
        machine.run(max_insns=100_000)
        machine.host.hugetlb_create(gpa=GPA, pages=2 * PAGES)
        assert machine.board.host.mm.hstate.surplus == 2
        with pytest.raises(refault.KernelError):
            machine.host.hugetlb_create(gpa=GPA + 8 * HUGE, pages=PAGES)
        machine.host.host_write(gpa=GPA, value=7)
        assert machine.host.host_read(gpa=GPA) == 7


def test_the_end_of_the_log_puts_huge_sptes_back_while_something_else_is_in_a_bracket() -> None:
    # Linux 6.18 would wait for the bracket before it changes the slots.
    options = {
        "memory_backend": "hugetlb", "host_ram": "32M", "profile": "linux-5.10", "check": True,
        "params": {"kvm.tdp_mmu": "Y"},
    }
    with refault.VM("4M", **options) as machine:
        machine.load("first-touch")
        machine.run(max_insns=30_000)
        machine.host.dirty_log(gpa=0, on=1)
        assert machine.host.map_level(0x100000) == 1
        board = machine.board
        elsewhere = mmu_notifier_range_init(MMU_NOTIFY_CLEAR, board.kvm.mm, 4096, 8192)
        board.host.sched.run_task("elsewhere", lambda: mmu_notifier_invalidate_range_start(elsewhere))
        machine.host.dirty_log(gpa=0, on=0)
        board.host.sched.run_task("elsewhere", lambda: mmu_notifier_invalidate_range_end(elsewhere))
        assert machine.host.map_level(0x100000) == 2
        machine.finish()


@pytest.mark.parametrize("shared", [0, 1])
def test_no_page_of_the_pool_is_a_devices_alone_or_the_devices_at_all(vm: refault.VM, shared: int) -> None:
    vm.host.hugetlb_create(gpa=GPA, pages=PAGES, shared=shared)
    vm.host.host_write(gpa=GPA, value=5)
    for gpa in (GPA, GPA + 0x3000):
        with pytest.raises(refault.KernelError) as caught:
            vm.host.device_add(gpa=gpa, value=1)
        assert caught.value.errno == errno.EOPNOTSUPP
        with pytest.raises(refault.KernelError) as caught:
            vm.host.device_migrate(gpa=gpa)
        assert caught.value.errno == errno.EINVAL
    assert vm.host.host_read(gpa=GPA) == 5
    vm.finish()

"""guest_memfd: pages of a file behind a memslot, holes, its end."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, AddressSpace, fput
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.memory_failure import memory_failure
from host_mm.mmap import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, do_mmap
from host_mm.page import PG_unevictable
from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model.guest_memfd import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from kvm_model.mem_attributes import KVM_X86_SW_PROTECTED_VM
from kvm_model.memslots import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from tests.kvm_model.machine import BASE, PAGE, Machine

SIZE = 16 * PAGE
GPA = 0x1000_0000
BOTH = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
RW = PROT_READ | PROT_WRITE
HOLE = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


def bound(m: Machine, flags: int = BOTH) -> tuple[AddressSpace, int]:
    """A guest_memfd of 16 pages in slot 4 at GPA, mapped where it may be: the file and the address."""
    file = m.do(lambda: m.kvm.create_guest_memfd(SIZE, flags))
    hva = BASE
    if flags == BOTH:
        hva = m.do(lambda: do_mmap(m.mm, 0, SIZE, RW, MAP_SHARED, file=file, pgoff=0))
    m.do(lambda: m.kvm.set_user_memory_region2(4, GPA, SIZE, hva, KVM_MEM_GUEST_MEMFD, file))
    return file, hva


def punch(m: Machine, file: AddressSpace, page: int, pages: int = 1) -> None:
    m.do(lambda: file.a_ops.fallocate(file, HOLE, page * PAGE, pages * PAGE))


def refused(m: Machine, fn: Any) -> int:
    with pytest.raises(KernelError) as info:
        m.do(fn)
    return info.value.errno or 0


@pytest.mark.parametrize("tdp", ["Y", "N"])
def test_guest_and_vmm_share_the_files_page_until_a_hole_takes_it_from_both(tdp: str) -> None:
    m = Machine(params={"kvm.tdp_mmu": tdp})
    file, hva = bound(m)
    m.run(("w", GPA + 3 * PAGE, 0x99))
    assert m.do(lambda: copy_from_user(m.process, hva + 3 * PAGE, 1)) == b"\x99"
    pfn = file.i_pages[3]
    assert m.leaf((GPA >> 12) + 3) >> 12 & 0xFFFFF == pfn
    before = len(m.events)
    punch(m, file, 3)
    assert not file.i_pages
    assert m.run(("r", GPA + 3 * PAGE)) == [0]
    order = [e.name for e in m.events[before:] if e.name in (
        "mmu_invalidate_begin", "mmu_invalidate_end", "kvm_unmap_hva_range", "kvm_flush_remote_tlbs",
        "mm_filemap_delete_from_page_cache",
    )]
    # The file's bracket holds the notifier's, which finds nothing left to zap and so flushes nothing.
    assert order == [
        "mmu_invalidate_begin", "kvm_flush_remote_tlbs",
        "kvm_unmap_hva_range", "mmu_invalidate_begin", "mmu_invalidate_end",
        "mm_filemap_delete_from_page_cache", "mmu_invalidate_end",
    ]
    m.truths.sweep()


def test_a_hole_of_what_no_guest_mapped_flushes_nothing() -> None:
    m = Machine()
    file, hva = bound(m)
    m.do(lambda: copy_to_user(m.process, hva, b"x"))
    m.run()
    before = m.kvm.stat["remote_tlb_flush_requests"]
    punch(m, file, 0)
    assert m.kvm.stat["remote_tlb_flush_requests"] == before


def test_a_fault_that_has_the_page_when_the_hole_comes_maps_another_one() -> None:
    m = Machine()
    file, _ = bound(m)
    struck: list[int] = []

    def strike(kind: str) -> None:
        # The fault has the file's page and is about to take mmu_lock.
        if kind == "lock" and file.i_pages and not struck:
            struck.append(file.i_pages[0])
            file.a_ops.fallocate(file, HOLE, 0, PAGE)
        m.truths.on_point(kind)

    m.sched.set_on_point(strike)
    assert m.run(("w", GPA, 2), ("r", GPA)) == [2]
    assert struck
    assert [e.args["reason"] for e in m.events if e.name == "fault_retry"] == ["stale-under-lock"]
    m.truths.sweep()


def test_pages_stay_where_they_are_and_are_never_reclaimed() -> None:
    m = Machine()
    file, hva = bound(m)
    m.run(*[("w", GPA + n * PAGE, n + 1) for n in range(16)])
    m.do(m.host.lru.lru_add_drain_all)
    pfns = dict(file.i_pages)
    assert all(m.host.pages.flags[pfn] & PG_unevictable for pfn in pfns.values())
    from host_mm.compaction import compact_nodes
    from host_mm.madvise import MADV_PAGEOUT, do_madvise
    from host_mm.migrate import move_pages

    m.do(lambda: [copy_from_user(m.process, hva + n * PAGE, 1) for n in range(16)])
    m.do(lambda: move_pages(m.process, [hva + n * PAGE for n in range(16)], [0] * 16))
    m.do(lambda: do_madvise(m.mm, hva, SIZE, MADV_PAGEOUT))
    m.do(lambda: compact_nodes(m.host))
    assert file.i_pages == pfns
    assert m.run(*[("r", GPA + n * PAGE) for n in range(16)]) == [n + 1 for n in range(16)]


def test_a_page_whose_memory_failed_leaves_the_sptes_and_its_next_fault_is_told() -> None:
    m = Machine()
    file, _ = bound(m)
    m.run(("w", GPA, 1), ("w", GPA + PAGE, 2))
    assert m.do(lambda: memory_failure(m.host, file.i_pages[0])) == -errno.EBUSY
    out = m.run_raw(("r", GPA))
    assert (out.kind, out.gpa) == ("memory-fault-exit", GPA)
    m.cpu.ops[0].clear()
    assert m.run(("r", GPA + PAGE)) == [2]


def test_closing_the_file_leaves_a_slot_without_memory() -> None:
    m = Machine()
    file, _ = bound(m, GUEST_MEMFD_FLAG_MMAP)
    m.run(("w", GPA, 1))
    m.do(lambda: fput(file))
    assert not m.kvm.gmems
    assert m.run_raw(("r", GPA)).kind == "memory-fault-exit"
    assert not m.do(lambda: m.kvm.set_user_memory_region(4, GPA, 0, BASE))


def test_a_deleted_slot_lets_go_of_its_range_and_the_bytes_stay_in_the_file() -> None:
    m = Machine()
    file, hva = bound(m)
    m.run(("w", GPA, 7))
    again = lambda: m.kvm.set_user_memory_region2(5, 2 * GPA, SIZE, hva, KVM_MEM_GUEST_MEMFD, file)  # noqa: E731
    assert refused(m, again) == errno.EINVAL
    m.do(lambda: m.kvm.set_user_memory_region(4, GPA, 0, hva))
    m.do(again)
    assert m.run(("r", 2 * GPA)) == [7]


def test_only_what_may_be_mapped_is_mapped_and_only_if_it_starts_shared_it_can_be_touched() -> None:
    m = Machine()
    plain, _ = bound(m, 0)
    mapped = m.do(lambda: m.kvm.create_guest_memfd(SIZE, GUEST_MEMFD_FLAG_MMAP))
    assert refused(m, lambda: do_mmap(m.mm, 0, SIZE, RW, MAP_SHARED, file=plain, pgoff=0)) == errno.ENODEV
    assert refused(m, lambda: do_mmap(m.mm, 0, SIZE, RW, MAP_PRIVATE, file=mapped, pgoff=0)) == errno.EINVAL
    hva = m.do(lambda: do_mmap(m.mm, 0, SIZE, RW, MAP_SHARED, file=mapped, pgoff=0))
    assert refused(m, lambda: copy_from_user(m.process, hva, 1)) == errno.EFAULT
    # Nothing is private here, so the guest's memory is the slot's address as ever.
    m.run(("w", GPA, 5))
    assert m.do(lambda: copy_from_user(m.process, BASE, 1)) == b"\x05"


@pytest.mark.parametrize(("size", "flags"), [(0, 0), (-PAGE, 0), (PAGE + 1, 0), (PAGE, 4)])
def test_bad_files_are_refused(size: int, flags: int) -> None:
    m = Machine()
    assert refused(m, lambda: m.kvm.create_guest_memfd(size, flags)) == errno.EINVAL


def test_bad_slots_are_refused_with_the_kernels_errno() -> None:
    m = Machine()
    other = Machine()
    file, hva = bound(m)
    foreign, _ = bound(other)
    memfd = m.do(lambda: __import__("host_mm.memfd", fromlist=["x"]).memfd_create(m.host, "x", SIZE))
    flag, set2 = KVM_MEM_GUEST_MEMFD, m.kvm.set_user_memory_region2
    cases = [
        (lambda: set2(5, 2 * GPA, SIZE, hva, flag, None), errno.EBADF),
        (lambda: set2(5, 2 * GPA, SIZE, hva, flag, foreign), errno.EBADF),
        (lambda: set2(5, 2 * GPA, SIZE, hva, flag, memfd), errno.EINVAL),
        (lambda: set2(5, 2 * GPA, SIZE, hva, flag, file, 1), errno.EINVAL),
        (lambda: set2(5, 2 * GPA, SIZE, hva, flag, file, PAGE), errno.EINVAL),
        (lambda: set2(5, 2 * GPA, SIZE, hva, flag | KVM_MEM_READONLY, file), errno.EINVAL),
        (lambda: set2(5, 2 * GPA, SIZE, hva, flag | KVM_MEM_LOG_DIRTY_PAGES, file), errno.EINVAL),
        (lambda: set2(4, 2 * GPA, SIZE, hva, flag, file), errno.EINVAL),
        (lambda: m.kvm.set_user_memory_region(5, 2 * GPA, SIZE, hva, flag), errno.EINVAL),
        (lambda: file.a_ops.fallocate(file, 0, 0, PAGE), errno.EOPNOTSUPP),
        (lambda: file.a_ops.fallocate(file, HOLE, 1, PAGE), errno.EINVAL),
        (lambda: file.a_ops.fallocate(file, FALLOC_FL_KEEP_SIZE, 0, SIZE + PAGE), errno.EINVAL),
        (lambda: file.a_ops.set_size(file, PAGE), errno.EINVAL),
        (lambda: file.a_ops.fsync(file), errno.EINVAL),
    ]
    assert [refused(m, fn) for fn, _ in cases] == [want for _, want in cases]


def test_an_allocation_makes_pages_that_the_guest_sees_as_zeros() -> None:
    m = Machine()
    file, _ = bound(m)
    m.do(lambda: file.a_ops.fallocate(file, FALLOC_FL_KEEP_SIZE, 0, 4 * PAGE))
    assert sorted(file.i_pages) == [0, 1, 2, 3]
    assert m.run(("r", GPA + PAGE)) == [0]


def test_linux_5_10_has_none_of_it() -> None:
    m = Machine(profile="linux-5.10")
    assert refused(m, lambda: m.kvm.create_guest_memfd(SIZE, 0)) == errno.ENOTTY
    assert refused(m, lambda: m.kvm.set_memory_attributes(0, PAGE, 0)) == errno.ENOTTY
    assert refused(
        m, lambda: m.kvm.set_user_memory_region2(4, GPA, SIZE, BASE, KVM_MEM_GUEST_MEMFD)
    ) == errno.ENOTTY
    with pytest.raises(KernelError):
        Machine(profile="linux-5.10", vm_type=KVM_X86_SW_PROTECTED_VM)


def test_a_hole_that_does_not_unmap_first_breaks_a_truth() -> None:
    m = Machine(breaks=("gmem-no-unmap",))
    file, _ = bound(m)
    m.run(("w", GPA, 1))
    with pytest.raises(BrokenTruth, match="no-spte-in-bracket"):
        punch(m, file, 0)


def test_at_the_end_no_frame_is_left() -> None:
    m = Machine()
    file, _ = bound(m)
    m.run(("w", GPA, 1))
    with pytest.raises(BrokenTruth, match="file-count"):
        m.do(m.kvm.destroy)
    m.do(lambda: fput(file))
    assert not m.kvm.gmems or file.i_mmap

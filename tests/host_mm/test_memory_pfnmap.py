"""Mappings of frames that nobody counts (host_mm/memory_pfnmap.py)."""

from __future__ import annotations

from errno import EFAULT, EINVAL

import pytest

from host_mm.address_space import VmOperations
from host_mm.arch.x86.pgtable import _PAGE_SPECIAL, pte_pfn, pte_write, walk_lockless
from host_mm.fork import exit_process, fork_process
from host_mm.gup import FOLL_WRITE, get_user_page_fast_only, get_user_pages_unlocked
from host_mm.kernel.errors import KernelError
from host_mm.memory_pfnmap import fixup_user_fault, follow_pfnmap_end, follow_pfnmap_start, remap_pfn_range
from host_mm.memremap import release_reserved, request_reserved
from host_mm.mm_types import VM_PFNMAP
from host_mm.mmap import MAP_PRIVATE, MAP_SHARED, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.process import Process
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import PAGE, RW, Recorder, make_host, run

PAGES = 4


class NoFault(VmOperations):
    fault = None  # type: ignore[assignment]


class Mapped:
    """Four frames of device memory in a process."""

    def __init__(self, *, shared: bool = True) -> None:
        self.host = make_host()
        self.process: Process = self.host.create_process("p")
        self.pfn = request_reserved(self.host, PAGES)
        flags = MAP_SHARED if shared else MAP_PRIVATE
        self.base = do_mmap(self.process.mm, 0, PAGES * PAGE, RW, flags, ops=NoFault())
        vma = self.process.mm.vma_lookup(self.base)
        assert vma is not None
        self.vma = vma
        assert remap_pfn_range(vma, self.base, self.pfn, PAGES * PAGE, vma.page_prot) == 0

    def entry(self, process: Process, page: int = 0) -> int:
        return walk_lockless(self.host.ram, process.mm.pgd, self.base + page * PAGE)[0]


def test_the_process_reaches_the_frames_and_nobody_counts_it() -> None:
    m = Mapped()
    run(m.host, lambda: copy_to_user(m.process, m.base + PAGE, b"device"))
    assert m.host.ram.read((m.pfn + 1) << 12, 6) == b"device"
    assert m.entry(m.process, 1) & _PAGE_SPECIAL
    assert (m.host.pages.refcount[m.pfn], m.host.pages.mapcount[m.pfn], sum(m.process.mm.rss)) == (1, 0, 0)
    audit(m.host)
    run(m.host, lambda: do_munmap(m.process.mm, m.base, PAGES * PAGE))
    release_reserved(m.host, m.pfn, PAGES)
    audit(m.host)


def test_get_user_pages_refuses_it_and_follow_pfnmap_says_what_is_there() -> None:
    m = Mapped()
    assert get_user_page_fast_only(m.process.mm, m.base, FOLL_WRITE) == -1
    assert get_user_pages_unlocked(m.process.mm, m.base, 0) == -EFAULT
    args = follow_pfnmap_start(m.vma, m.base + 2 * PAGE)
    assert args is not None
    assert (args.pfn, args.writable, args.special) == (m.pfn + 2, True, True)
    follow_pfnmap_end(args)
    assert follow_pfnmap_start(m.vma, m.base + PAGES * PAGE) is None


def test_a_hole_that_no_driver_fills_is_a_bus_error() -> None:
    m = Mapped()
    run(m.host, lambda: do_munmap(m.process.mm, m.base + PAGE, 3 * PAGE))
    mm = m.process.mm
    base = do_mmap(mm, 0, PAGE, RW, MAP_SHARED, ops=NoFault(), vm_flags=VM_PFNMAP)
    vma = mm.vma_lookup(base)
    assert vma is not None
    assert follow_pfnmap_start(vma, base) is None
    mm.mmap_lock.read_lock()
    assert fixup_user_fault(mm, base, write=True) == -EFAULT
    assert fixup_user_fault(mm, 0x10000, write=False) == -EFAULT
    mm.mmap_lock.read_unlock()
    with pytest.raises(KernelError, match="bus error"):
        run(m.host, lambda: copy_from_user(m.process, base, 1))


def test_fork_gives_the_child_the_same_frames_of_a_shared_mapping() -> None:
    m = Mapped()
    recorder = Recorder(m.base)
    mmu_notifier_register(recorder, m.process.mm)
    child = fork_process(m.process)
    assert recorder.take() == [], "nothing is write-protected"
    run(m.host, lambda: copy_to_user(child, m.base, b"child"))
    assert copy_from_user(m.process, m.base, 5) == b"child"
    exit_process(child)
    audit(m.host)


def test_a_write_to_a_private_mapping_copies_the_frame() -> None:
    m = Mapped(shared=False)
    m.host.ram.write(m.pfn << 12, b"rom")
    assert not pte_write(m.entry(m.process))
    recorder = Recorder(m.base)
    mmu_notifier_register(recorder, m.process.mm)
    run(m.host, lambda: copy_to_user(m.process, m.base, b"R"))
    assert recorder.take() == [("clear", 0, PAGE)]
    assert copy_from_user(m.process, m.base, 3) == b"Rom"
    assert m.host.ram.read(m.pfn << 12, 3) == b"rom"
    assert not m.entry(m.process) & _PAGE_SPECIAL
    assert m.process.mm.rss[1] == 1
    child = fork_process(m.process)
    assert recorder.take() == [("protection-page", 0, PAGES * PAGE)]
    assert pte_pfn(m.entry(child)) == pte_pfn(m.entry(m.process)) != m.pfn
    assert pte_pfn(m.entry(child, 1)) == m.pfn + 1
    run(m.host, lambda: copy_to_user(child, m.base, b"C"))
    assert copy_from_user(m.process, m.base, 3) == b"Rom"
    run(m.host, m.host.quiesce)
    audit(m.host)
    exit_process(child)
    exit_process(m.process)
    audit(m.host)


def test_a_part_of_a_private_mapping_cannot_be_remapped() -> None:
    host = make_host()
    process = host.create_process("p")
    base = do_mmap(process.mm, 0, PAGES * PAGE, RW, MAP_PRIVATE, ops=NoFault())
    vma = process.mm.vma_lookup(base)
    assert vma is not None
    pfn = request_reserved(host, PAGES)
    assert remap_pfn_range(vma, base, pfn, PAGE, vma.page_prot) == -EINVAL
    assert remap_pfn_range(vma, base + 1, pfn, PAGE, vma.page_prot) == -EINVAL
    assert remap_pfn_range(vma, base, pfn, (PAGES + 1) * PAGE, vma.page_prot) == -EINVAL

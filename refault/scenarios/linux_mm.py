"""Scenarios of Linux mm against KVM, as they were run on a real Linux 6.18."""

from __future__ import annotations

import refault.scenarios.linux_kvm_dirty
import refault.scenarios.linux_kvm_guest
import refault.scenarios.linux_kvm_prefetch
import refault.scenarios.linux_kvm_slots
import refault.scenarios.linux_mm_files
import refault.scenarios.linux_mm_hugetlb
import refault.scenarios.linux_mm_migrate
import refault.scenarios.linux_mm_reclaim
import refault.scenarios.linux_mm_thp
import refault.scenarios.linux_mm_uffd  # noqa: F401  (fills the registry)
from refault.scenarios import scenario
from refault.scenarios.api import DATA_SIZE, PAGE, PROT_NONE, PROT_READ, PROT_RW, Scenario

__all__: list[str] = []


@scenario()
def first_touch(s: Scenario) -> None:
    """A read maps the zero page, a write over it is refused, copied and faulted again."""
    s.ld(0x3000, "unpopulated: zero page")
    s.st(0x3000, 1, "COW of zero page")
    s.st(0x3000, 2)
    s.st(0x4000, 3, "unpopulated write")
    s.ld(0x4000)
    s.hw(0x5000, 7)
    s.ld(0x5000, "host-populated, read fault maps rw?")
    s.st(0x5000, 8)
    s.rmw(0x6000)


@scenario()
def dontneed(s: Scenario) -> None:
    """MADV_DONTNEED drops the requested range in one bracket; what comes back is zeros."""
    for i in range(4):
        s.st(0x3000 + i * PAGE, i)
    s.madv(0x3000, PAGE, "DONTNEED")
    s.ld(0x3000)
    s.st(0x3000, 5)
    s.madv(0x4000, 3 * PAGE, "DONTNEED")
    s.st(0x4000, 5)
    s.st(0x5000, 6)
    s.madv(0x100000, PAGE, "DONTNEED")
    s.madv(0x200000, 0x200000, "DONTNEED")


@scenario()
def fork_cow(s: Scenario) -> None:
    """fork takes write access from the whole VMA; the first write of either side copies."""
    s.st(0x3000, 1)
    s.st(0x4000, 1)
    s.ld(0x5000)
    s.fork()
    s.ld(0x3000, "after fork")
    s.st(0x3000, 2, "COW break")
    s.ld(0x4000)
    s.hw(0x4000, 3)
    s.ld(0x4000, "after host COW")
    s.st(0x4000, 4)
    s.child_exit()
    s.st(0x5000, 1)


@scenario()
def mprotect(s: Scenario) -> None:
    """mprotect of one page splits its VMA, which brackets the aligned 2 MiB first."""
    s.st(0x3000, 1)
    s.st(0x4000, 1)
    s.mprotect(0x3000, PAGE, PROT_READ, "mprotect(D+0x3000,PROT_READ)")
    s.ld(0x3000)
    s.st(0x3000, 2, "ro vma")
    s.mprotect(0x3000, PAGE, PROT_RW, "mprotect(D+0x3000,RW)")
    s.ld(0x3000)
    s.st(0x3000, 3)
    s.mprotect(0x4000, PAGE, PROT_NONE, "mprotect(D+0x4000,NONE)")
    s.ld(0x4000, "PROT_NONE")
    s.mprotect(0x4000, PAGE, PROT_RW, "mprotect(D+0x4000,RW)")
    s.ld(0x4000)


@scenario()
def vma_split(s: Scenario) -> None:
    """A split fires the 2 MiB bracket only if those 2 MiB lie wholly in the VMA being split."""
    s.mprotect(0x101000, PAGE, PROT_READ)
    s.mprotect(0x181000, PAGE, PROT_READ)
    s.mprotect(0x3FF000, 0x2000, PROT_READ)
    s.mprotect(0x600000, 0x100000, PROT_READ)
    s.mprotect(0x601000, PAGE, PROT_NONE)
    s.madv(0x4C0000, PAGE, "DONTFORK", "madvise DONTFORK 4K at 0x4c0000")
    s.st(0x4C0000, 1)
    s.madv(0x4C0000, PAGE, "DOFORK", "madvise DOFORK (merge back)")
    s.st(0x4C0000, 2)


@scenario()
def free_cold(s: Scenario) -> None:
    """MADV_COLD takes no mapping away; MADV_FREE does, and keeps the bytes until reclaim."""
    s.st(0x3000, 1)
    s.st(0x4000, 2)
    s.madv(0x3000, PAGE, "COLD")
    s.st(0x3000, 3)
    s.madv(0x4000, PAGE, "FREE")
    s.ld(0x4000)
    s.st(0x4000, 4)


@scenario()
def munmap_middle(s: Scenario) -> None:
    """munmap of the middle leaves both sides; the hole is EFAULT until something is mapped there."""
    for offset in (0x300000, 0x310000, 0x31F000, 0x320000):
        s.st(offset, 1)
    s.munmap(0x310000, 0x10000, "munmap [D+0x310000,+64K)")
    s.ld(0x300000, "left stays")
    s.ld(0x310000, "hole")
    s.ld(0x320000, "right")
    s.mmap_fixed(0x310000, 0x10000, "mmap FIXED back")
    s.ld(0x310000)
    s.st(0x31F000, 2)
    s.ld(0x300000)
    s.munmap(0x200000, 0x200000, "munmap [D+0x200000,+2M) aligned")
    s.ld(0x300000)


@scenario()
def clear_refs(s: Scenario) -> None:
    """Clearing referenced bits takes nothing away; clearing soft-dirty brackets the whole mm."""
    s.st(0x3000, 1)
    s.ld(0x4000)
    s.clear_refs(1)
    s.ld(0x3000)
    s.clear_refs(4)
    s.st(0x3000, 2)


@scenario(swap=None)
def pageout_noswap(s: Scenario) -> None:
    """Without swap MADV_PAGEOUT takes no anonymous page and tells nobody."""
    s.st(0x3000, 1)
    s.madv(0x3000, PAGE, "PAGEOUT")
    s.ld(0x3000)


@scenario()
def madv_populate(s: Scenario) -> None:
    """POPULATE_READ maps the zero page, POPULATE_WRITE pages of one's own; neither tells anybody."""
    s.madv(0x0, 0x10000, "POPULATE_READ")
    s.ld(0x3000)
    s.ld(0x4000)
    s.st(0x3000, 1)
    s.madv(0x100000, 0x10000, "POPULATE_WRITE")
    s.ld(0x103000, "prefetches the group")
    s.ld(0x104000)
    s.st(0x104000, 1)
    s.st(0x10B000, 2, "next group, by store")
    s.ld(0x10C000)
    s.madv(0x200000, 0x10000, "POPULATE_WRITE")
    s.madv(0x203000, PAGE, "DONTNEED")
    s.ld(0x206000, "hole at 3 of the group")


@scenario()
def fork_pinned(s: Scenario) -> None:
    """fork copies a pinned page at once, so that the parent's stays the pinned one and writable."""
    s.st(0x3000, 1)
    s.st(0x4000, 1)
    s.ld(0x5000, "zero page")
    s.pin(0x3000, "io_uring REGISTER_BUFFERS 0x3000 (FOLL_LONGTERM)")
    s.st(0x3000, 2)
    s.fork()
    s.ld(0x3000, "pinned: read")
    s.st(0x3000, 3, "pinned: store")
    s.ld(0x4000, "not pinned")
    s.st(0x4000, 3)
    s.child_exit()
    s.unpin("UNREGISTER_BUFFERS")
    s.pin(0x5000, "REGISTER_BUFFERS 0x5000: pin breaks the zero page")
    s.st(0x5000, 4)
    s.madv(0x5000, PAGE, "DONTNEED")
    s.st(0x5000, 5, "pin stays on the old page")


@scenario()
def mlock(s: Scenario) -> None:
    """mlock takes no mapping away but by the split of its VMA; munlock merges it back and tells nobody."""
    s.st(0x3000, 1)
    s.mlock(0x3000, PAGE)
    s.ld(0x3000)
    s.munlock(0x3000, PAGE)


@scenario(repeats="but for frames")
def ksm(s: Scenario) -> None:
    """The page that becomes the KSM page is unmapped once, each merged page twice; a write copies."""
    s.mergeable(0, DATA_SIZE, "mergeable")
    for i in (3, 4, 5):
        s.fill(i * PAGE, 0x5A)
    s.ld(0x3000)
    s.ld(0x4000)
    s.st(0x4000, 0x5A5A5A5A5A5A5A5A)
    s.ld(0x5000)
    s.ksmd("ksmd merges")
    s.ld(0x3000)
    s.st(0x3000, 1, "KSM COW break")
    s.ld(0x4000)
    s.madv(0, DATA_SIZE, "UNMERGEABLE")
    s.ld(0x4000)


@scenario(repeats="but for frames")
def zero_then_ksm(s: Scenario) -> None:
    """With use_zero_pages a page of zeros becomes the zero page; the last sharer's write copies too."""
    s.mergeable(0, 0x10000)
    for i in (3, 4):
        s.fill(i * PAGE, 0)
    for i in (6, 7):
        s.fill(i * PAGE, 0x5A)
    s.begin()
    s.ld(0x3000)
    s.ld(0x4000)
    s.st(0x4000, 0)
    s.ld(0x6000)
    s.ld(0x7000)
    s.ksmd("ksmd: zero pages", use_zero_pages=True)
    s.ld(0x3000, "KSM zero page")
    s.st(0x3000, 1, "COW")
    s.hw(0x4000, 5)
    s.ld(0x4000)
    s.ld(0x6000, "KSM page")
    s.st(0x6000, 2, "COW")
    s.ld(0x7000, "last sharer")
    s.st(0x7000, 3, "COW of the last sharer")

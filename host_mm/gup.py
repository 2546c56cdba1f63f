"""get_user_pages: a page and a reference to it, for whoever is not the CPU.

Source of truth: mm/gup.c (gup_fast_pte_range, follow_page_pte, can_follow_write_pte, faultin_page,
__get_user_pages_locked, check_vma_flags, try_grab_folio),
include/linux/mm.h: gup_must_unshare, include/linux/mm_types.h: FOLL_*; Linux 6.18.

Fast GUP reads the entry without locks, takes the reference, and reads the entry again: a page that left
it in between is given back. It never takes the zero page. Slow GUP faults under mmap_lock. A pin
(FOLL_PIN) counts 1024 references at once, of a large folio one and a pin count, and must hold an exclusive
page; a read-only long-term pin of anything else first makes one (unshare).

Pins as drivers take them are in gup_pin.py, several pages in a call in gup_range.py, where long-term pins
may be in gup_longterm.py, and faults ahead of use in gup_populate.py.

Not modelled: coherent device memory, signals (FOLL_INTERRUPTIBLE never interrupts), callers that hold
mmap_lock and must keep it (all are FOLL_UNLOCKABLE), 5.10's FOLL_COW (a forced write there
follows any dirty entry).
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EFAULT, EMLINK, ENOENT, ENOMEM
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import (
    _PAGE_PRESENT,
    _PAGE_RW,
    _PAGE_SPECIAL,
    _PAGE_USER,
    HPAGE_PMD_NR,
    PMD_SIZE,
    pmd_pfn,
    pmd_trans_huge,
    pte_dirty,
    pte_mkdirty,
    pte_mkyoung,
    pte_pfn,
    pte_present,
    pte_protnone,
    pte_write,
    walk_lockless,
)
from host_mm.gup_longterm import folio_is_longterm_pinnable
from host_mm.huge_mm import is_huge_zero_pfn
from host_mm.hugetlb_share import hugetlb_vma_lock_read, hugetlb_vma_unlock_read
from host_mm.kernel.costs import COST_WALK
from host_mm.kernel.errors import EHWPOISON
from host_mm.memory import handle_mm_fault
from host_mm.memory_copy import is_cow_mapping
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import (
    FAULT_FLAG_ALLOW_RETRY,
    FAULT_FLAG_INTERRUPTIBLE,
    FAULT_FLAG_KILLABLE,
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_RETRY_NOWAIT,
    FAULT_FLAG_TRIED,
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    VM_ACCESS_FLAGS,
    VM_FAULT_ERROR,
    VM_FAULT_HWPOISON,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_HUGETLB,
    VM_IO,
    VM_MAYREAD,
    VM_MAYWRITE,
    VM_PFNMAP,
    VM_READ,
    VM_WRITE,
)
from host_mm.page import (
    GUP_PIN_COUNTING_BIAS,
    PG_anon,
    PG_anon_exclusive,
    PG_dirty,
    PG_head,
    PG_hwpoison,
    PG_referenced,
    page_folio,
    put_page,
    set_page_dirty,
    try_get_page,
)
from host_mm.pgtable_generic import pmd_lock, pmd_offset, pte_lockptr, pte_offset_map_lock, ptep_get, set_pmd
from host_mm.vma import vma_needs_dirty_tracking
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.mm_types import MmStruct, VmArea

__all__ = [
    "FOLL_ANON", "FOLL_FORCE", "FOLL_GET", "FOLL_HONOR_NUMA_FAULT", "FOLL_HWPOISON", "FOLL_INTERRUPTIBLE",
    "FOLL_LONGTERM", "FOLL_NOFAULT", "FOLL_NOWAIT", "FOLL_PIN", "FOLL_TOUCH", "FOLL_WRITE", "TRACEPOINTS",
    "get_user_page_fast_only", "get_user_page_remote", "get_user_pages_unlocked", "gup_fast", "gup_slow",
    "trace_gup",
]

FOLL_WRITE = 1 << 0
FOLL_GET = 1 << 1
FOLL_FORCE = 1 << 3
FOLL_NOWAIT = 1 << 4
FOLL_NOFAULT = 1 << 5
FOLL_HWPOISON = 1 << 6
FOLL_ANON = 1 << 7
FOLL_LONGTERM = 1 << 8
FOLL_INTERRUPTIBLE = 1 << 11
FOLL_HONOR_NUMA_FAULT = 1 << 12
FOLL_TOUCH = 1 << 16
FOLL_TRIED = 1 << 17
FOLL_REMOTE = 1 << 18
FOLL_PIN = 1 << 19

_NAMES = (
    (FOLL_WRITE, "write"), (FOLL_NOWAIT, "nowait"), (FOLL_LONGTERM, "longterm"), (FOLL_PIN, "pin"),
    (FOLL_HWPOISON, "hwpoison"), (FOLL_INTERRUPTIBLE, "interruptible"), (FOLL_FORCE, "force"),
)


def _flag_names(flags: int) -> str:
    return "|".join(name for bit, name in _NAMES if flags & bit) or "read"


GUP = Tracepoint(
    "refault", "gup", ("pid", "address", "flags", "path", "pfn", "zero"),
    lambda pid, address, flags, path, pfn, zero:
        f"pid {pid} address {address:#x} {flags} {path} " + (f"pfn {pfn:#x}" if pfn >= 0 else f"error {pfn}")
        + (" zero-page" if zero else ""),
    doc="What get_user_pages answered: a frame (and a reference to it) or a negative errno.",
)
TRACEPOINTS = (GUP,)


def trace_gup(mm: MmStruct, address: int, flags: int, path: str, answer: int) -> int:
    """Tell what was answered, and answer it."""
    if (t := mm.host.trace.gup) is not None:
        t(mm.process.pid, address & ~0xFFF, _flag_names(flags), path, answer, answer == mm.host.zero_pfn)
    return answer


# -- references -----------------------------------------------------------------------------------
def _grab(host: HostMm, pfn: int, flags: int) -> bool:
    """try_grab_folio: one reference, or a pin; zero pages are never pinned."""
    if not flags & FOLL_PIN:
        return try_get_page(host, pfn)
    if never_pinned(host, pfn):
        return True
    pages = host.pages
    head = page_folio(pages, pfn)
    if not pages.flags[head] & PG_head:
        return try_get_page(host, pfn, GUP_PIN_COUNTING_BIAS)
    if not try_get_page(host, head):
        return False
    pages.pincount[head] += 1
    return True


def gup_put_folio(host: HostMm, pfn: int, flags: int) -> None:
    if not flags & FOLL_PIN:
        put_page(host, pfn)
    elif not never_pinned(host, pfn):
        head = page_folio(host.pages, pfn)
        if host.pages.flags[head] & PG_head:
            host.pages.pincount[head] -= 1
            put_page(host, head)
        else:
            put_page(host, pfn, GUP_PIN_COUNTING_BIAS)


def never_pinned(host: HostMm, pfn: int) -> bool:
    return pfn == host.zero_pfn or is_huge_zero_pfn(host, pfn)


def _must_unshare(host: HostMm, vma: VmArea | None, flags: int, pfn: int) -> bool:
    """gup_must_unshare: a read-only pin of a page that a later write would COW away from it."""
    if flags & (FOLL_WRITE | FOLL_PIN) != FOLL_PIN or not host.profile.anon_exclusive:
        return False
    page_flags = host.pages.flags[pfn]
    if not host.pages.flags[page_folio(host.pages, pfn)] & PG_anon:
        if not flags & FOLL_LONGTERM:
            return False
        return vma is None or is_cow_mapping(vma.flags)
    return not page_flags & PG_anon_exclusive


def _pins_for_long(host: HostMm, flags: int) -> bool:
    """A pin whose holder may write at any time, unknown to a file system that wants to know."""
    wanted = FOLL_PIN | FOLL_LONGTERM
    return flags & wanted == wanted and host.profile.refuses_longterm_file_pins


def _fast_folio_allowed(host: HostMm, head: int, flags: int) -> bool:
    """gup_fast_folio_allowed: not such a pin of a file's page that needs dirty tracking."""
    if not flags & FOLL_WRITE or not _pins_for_long(host, flags) or host.pages.flags[head] & PG_anon:
        return True
    mapping = host.pages.mapping.get(head)
    return mapping is not None and not mapping.a_ops.can_writeback


# -- fast -----------------------------------------------------------------------------------------
def get_user_page_fast_only(mm: MmStruct, addr: int, gup_flags: int) -> int:
    """The frame at `addr` with a reference, or -1, without locks, faults or sleep."""
    return trace_gup(mm, addr, gup_flags, "fast", gup_fast(mm, addr, gup_flags))


def gup_fast(mm: MmStruct, addr: int, flags: int) -> int:
    """The frame with its reference, or -1: ask gup_slow."""
    host = mm.host
    host.sched.advance(COST_WALK)
    seq = mm.write_protect_seq
    if flags & FOLL_PIN and seq & 1:
        return -1
    entry, level = walk_lockless(host.ram, mm.pgd, addr)
    wanted = _PAGE_PRESENT | _PAGE_USER | (_PAGE_RW if flags & FOLL_WRITE else 0)
    if level > 2 or entry & wanted != wanted or entry & _PAGE_SPECIAL:
        return -1
    pfn = head = pte_pfn(entry)
    if level == 2:
        pfn += (addr >> 12) & (HPAGE_PMD_NR - 1)
    if host.sched.preempt:
        host.sched.point("gup-fast")
    if flags & FOLL_LONGTERM and not folio_is_longterm_pinnable(host, pfn):
        return -1
    if not _grab(host, pfn, flags):
        return -1
    if walk_lockless(host.ram, mm.pgd, addr) != (entry, level):
        gup_put_folio(host, pfn, flags)
        return -1
    unshare = not pte_write(entry) and _must_unshare(host, None, flags, head)
    if unshare or not _fast_folio_allowed(host, page_folio(host.pages, pfn), flags):
        gup_put_folio(host, pfn, flags)
        return -1
    if flags & FOLL_PIN and mm.write_protect_seq != seq:
        gup_put_folio(host, pfn, flags)
        return -1
    host.pages.flags[page_folio(host.pages, pfn)] |= PG_referenced
    return pfn


# -- slow -----------------------------------------------------------------------------------------
def get_user_pages_unlocked(mm: MmStruct, addr: int, gup_flags: int) -> int:
    """The frame at `addr` with a reference, or a negative errno; faults and sleeps as needed.

    -EAGAIN is what the kernel answers with 0 pages: FOLL_NOWAIT and the fault would have to wait.
    """
    return trace_gup(mm, addr, gup_flags, "slow", _gup_slow(mm, addr, gup_flags | FOLL_TOUCH))


def get_user_page_remote(mm: MmStruct, addr: int, flags: int) -> int:
    """get_user_pages_remote of one page, under the caller's mmap_lock; a frame with a reference or an errno.

    A fault that has to drop the lock (userfaultfd) takes it again, so that VMAs must be looked up anew.
    """
    flags |= FOLL_REMOTE | FOLL_TOUCH | FOLL_TRIED
    while True:
        pfn, locked = get_user_page_locked(mm, addr, flags)
        if locked:
            return trace_gup(mm, addr, flags, "slow", pfn)
        mm.mmap_lock.read_lock()


def _gup_slow(mm: MmStruct, addr: int, flags: int) -> int:
    pfns, err = gup_slow(mm, addr, 1, flags)
    return pfns[0] if pfns else err


def gup_slow(mm: MmStruct, addr: int, nr_pages: int, flags: int) -> tuple[list[int], int]:
    """__get_user_pages_locked: (frames with a reference each, what ended it before `nr_pages` or 0)."""
    pfns: list[int] = []
    mm.mmap_lock.read_lock()
    tried = 0
    err = 0
    while len(pfns) < nr_pages:
        answer, locked = get_user_page_locked(mm, addr + (len(pfns) << 12), flags | tried)
        if not locked:
            # The fault dropped mmap_lock to wait. From now on it waits for folios with the lock held; for a
            # userfaultfd it drops it every time.
            tried = FOLL_TRIED
            mm.mmap_lock.read_lock()
            continue
        tried = 0
        if answer < 0:
            err = answer
            break
        pfns.append(answer)
    mm.mmap_lock.read_unlock()
    return pfns, err


def check_vma_flags(vma: VmArea, flags: int) -> bool:
    if vma.flags & (VM_IO | VM_PFNMAP) or (flags & FOLL_ANON and vma.file is not None):
        return False
    if flags & FOLL_WRITE:
        if vma.file is not None and _pins_for_long(vma.mm.host, flags) and vma_needs_dirty_tracking(vma):
            return False
        return bool(vma.flags & VM_WRITE or (flags & FOLL_FORCE and is_cow_mapping(vma.flags)))
    if vma.flags & VM_READ:
        return True
    return bool(flags & FOLL_FORCE and vma.flags & VM_MAYREAD)


def get_user_page_locked(mm: MmStruct, addr: int, flags: int) -> tuple[int, bool]:
    """(answer, mmap_lock still held); not held: ask again."""
    vma = mm.vma_lookup(addr)
    if vma is None or not check_vma_flags(vma, flags):
        return -EFAULT, True
    while True:
        answer = _follow_page_pte(vma, addr, flags)
        if answer >= 0 or answer not in (-ENOENT, -EMLINK):
            return answer, True
        ret = _faultin_page(vma, addr, flags, unshare=answer == -EMLINK)
        if ret == -EBUSY:
            return -EAGAIN, bool(flags & FOLL_NOWAIT)
        if ret:
            return ret, True


def _follow_page_pte(vma: VmArea, addr: int, flags: int) -> int:
    """The mapped frame with its reference; -ENOENT: fault it in; -EMLINK: unshare it first."""
    mm = vma.mm
    host = mm.host
    if vma.flags & VM_HUGETLB:
        # Its tables may be shared, and go while nobody holds this.
        hugetlb_vma_lock_read(vma)
        answer = _follow_huge_pmd(vma, addr, flags)
        hugetlb_vma_unlock_read(vma)
        return answer
    pmd = pmd_offset(mm, addr)
    if pmd and pmd_trans_huge(host.ram.u64[pmd >> 3]):
        answer = _follow_huge_pmd(vma, addr, flags)
        if answer != -EAGAIN:
            return answer
    pte = pte_offset_map_lock(mm, pmd, addr) if pmd else 0
    if not pte:
        return -ENOENT
    ptl = pte_lockptr(mm, pte)
    entry = ptep_get(mm, pte)
    answer = _follow_locked(vma, entry, flags)
    if answer >= 0 and flags & FOLL_TOUCH:
        folio = page_folio(host.pages, answer)
        if flags & FOLL_WRITE and not pte_dirty(entry) and not host.pages.flags[folio] & PG_dirty:
            set_page_dirty(host, folio)
        if answer != host.zero_pfn:
            host.lru.folio_mark_accessed(folio)
    ptl.unlock()
    return answer


def _follow_huge_pmd(vma: VmArea, addr: int, flags: int) -> int:
    """follow_huge_pmd: as _follow_page_pte, for a leaf of level 2."""
    host = vma.mm.host
    pmd = pmd_offset(vma.mm, addr)
    if not pmd:
        return -ENOENT
    lock = pmd_lock(vma.mm, pmd)
    entry = host.ram.u64[pmd >> 3]
    pfn = pmd_pfn(entry)
    hinting = pte_protnone(entry) and flags & FOLL_HONOR_NUMA_FAULT and vma.flags & VM_ACCESS_FLAGS
    if not pmd_trans_huge(entry) and not vma.flags & VM_HUGETLB:
        # It was split meanwhile.
        answer = -EAGAIN
    elif not pte_present(entry) or hinting or not _can_follow_huge(vma, entry, pfn, flags):
        answer = -ENOENT
    elif not pte_write(entry) and _must_unshare(host, vma, flags, pfn):
        answer = -EMLINK
    elif not _grab(host, pfn, flags):
        answer = -ENOMEM
    else:
        answer = pfn + ((addr >> 12) & (HPAGE_PMD_NR - 1))
        if flags & FOLL_TOUCH:
            young = pte_mkyoung(entry)
            dirty = flags & FOLL_WRITE or "huge-dirty-cow" in host.breaks
            touched = pte_mkdirty(young) if dirty else young
            if touched != entry:
                set_pmd(vma.mm, addr & ~(PMD_SIZE - 1), pmd, touched)
    lock.unlock()
    return answer


def _can_follow_huge(vma: VmArea, entry: int, pfn: int, flags: int) -> bool:
    """Whether a write, if it is one, may go through this huge entry."""
    if not flags & FOLL_WRITE or pte_write(entry):
        return True
    if pte_dirty(entry) and "huge-dirty-cow" in vma.mm.host.breaks:
        return True
    return not vma.flags & VM_HUGETLB and _can_follow_write_pte(vma, entry, pfn, flags)


def _follow_locked(vma: VmArea, entry: int, flags: int) -> int:
    host = vma.mm.host
    if not pte_present(entry):
        return -ENOENT
    if pte_protnone(entry) and flags & FOLL_HONOR_NUMA_FAULT and vma.flags & VM_ACCESS_FLAGS:
        return -ENOENT
    pfn = vm_normal_page(host, entry)
    if flags & FOLL_WRITE and not pte_write(entry) and not _can_follow_write_pte(vma, entry, pfn, flags):
        return -ENOENT
    if pfn < 0:
        pfn = pte_pfn(entry)
        if pfn != host.zero_pfn:
            return -EFAULT
    elif host.pages.flags[pfn] & PG_hwpoison:
        return -EHWPOISON
    if not pte_write(entry) and _must_unshare(host, vma, flags, pfn):
        return -EMLINK
    return pfn if _grab(host, pfn, flags) else -ENOMEM


def _can_follow_write_pte(vma: VmArea, entry: int, pfn: int, flags: int) -> bool:
    """A forced write may use a read-only entry once the COW for it was done."""
    if not flags & FOLL_FORCE or vma.flags & VM_WRITE or not vma.flags & VM_MAYWRITE or pfn < 0:
        return False
    host = vma.mm.host
    owned = host.pages.flags[pfn] & PG_anon_exclusive or not host.profile.anon_exclusive
    return bool(owned) and pte_dirty(entry)


def _faultin_page(vma: VmArea, addr: int, flags: int, *, unshare: bool) -> int:
    if flags & FOLL_NOFAULT:
        return -EFAULT
    fault = FAULT_FLAG_WRITE if flags & FOLL_WRITE else 0
    if unshare:
        fault |= FAULT_FLAG_UNSHARE
    if flags & FOLL_REMOTE:
        fault |= FAULT_FLAG_REMOTE
    fault |= FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_KILLABLE
    if flags & FOLL_INTERRUPTIBLE:
        fault |= FAULT_FLAG_INTERRUPTIBLE
    if flags & FOLL_NOWAIT:
        fault |= FAULT_FLAG_RETRY_NOWAIT
    if flags & FOLL_TRIED:
        fault |= FAULT_FLAG_TRIED
    ret = handle_mm_fault(vma, addr, fault)
    if ret & VM_FAULT_ERROR:
        if ret & VM_FAULT_OOM:
            return -ENOMEM
        if ret & VM_FAULT_HWPOISON and flags & FOLL_HWPOISON:
            return -EHWPOISON
        return -EFAULT
    return -EBUSY if ret & VM_FAULT_RETRY else 0

"""UFFDIO_MOVE: pages change their place in a process without being copied.

Source of truth: mm/userfaultfd.c (move_pages, move_pages_ptes, move_present_ptes, move_swap_pte,
move_zeropage_pte, validate_move_areas); Linux 6.18.

Each step opens a CLEAR bracket over what is left of the source. Under both page-table locks the source's
entry is emptied and the destination's set; the source is flushed before the locks are dropped, once for
all entries that moved together. The folio lock and the anon_vma's keep rmap walks out while the page's
anon_vma and index change. Pages must be exclusive and not pinned, so that nobody else knows them; a slot
in swap moves as it is.

As in 6.18.2 a call that once had to start over because something changed never takes that back: what moves
after it is not counted, and the call ends with EEXIST at the page that it moved itself.

Not modelled: moving a huge entry as a whole (it is split, and its folio), fatal signals; mmap_lock stands
for the locks of the two VMAs.
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM
from typing import TYPE_CHECKING

from host_mm import mmu_notifier
from host_mm import tlb as _tlb
from host_mm.arch.x86.pgtable import (
    _PAGE_SPECIAL,
    PMD_SIZE,
    mk_pte,
    pmd_pfn,
    pmd_present,
    pmd_table,
    pte_dirty,
    pte_mkdirty,
    pte_mksoft_dirty,
    pte_mkwrite,
    pte_pfn,
    pte_present,
)
from host_mm.arch.x86.swapops import (
    _PAGE_SWP_EXCLUSIVE,
    _PAGE_SWP_SOFT_DIRTY,
    is_migration_entry,
    non_swap_entry,
    pte_to_swp_entry,
    swp_offset,
)
from host_mm.filemap import folio_lock, folio_trylock, folio_unlock
from host_mm.huge_memory_pmd import split_huge_pmd
from host_mm.huge_memory_split import split_folio_to_list
from host_mm.kernel.locks import Spinlock
from host_mm.memory_folio import vm_normal_page
from host_mm.mm_types import VM_ACCESS_FLAGS, VM_IO, VM_LOCKED, VM_MIXEDMAP, VM_PFNMAP, VM_SHARED, VM_WRITE
from host_mm.page import (
    PG_anon_exclusive,
    PG_swapcache,
    folio_maybe_dma_pinned,
    folio_test_large,
    get_page,
    page_folio,
    put_page,
)
from host_mm.pgtable_generic import (
    mm_find_pmd,
    pmd_alloc,
    pte_alloc,
    pte_lockptr,
    pte_offset_map,
    ptep_clear_flush,
    ptep_get,
    ptep_get_and_clear,
    set_pte,
)
from host_mm.rmap import folio_get_anon_vma, folio_move_anon_rmap
from host_mm.rmap_anon_vma import anon_vma_prepare
from host_mm.swap_state import swap_cache_get_folio
from host_mm.swapin import migration_entry_wait

if TYPE_CHECKING:
    from host_mm.mm_types import AnonVma, MmStruct, VmArea
    from host_mm.userfaultfd_k import UserfaultfdCtx

__all__ = ["UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES", "move_pages"]

UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1
PAGE_SIZE = 4096


def move_pages(ctx: UserfaultfdCtx, dst: int, src: int, length: int, mode: int) -> int:
    """Move [src, src + length) to `dst`; how many bytes were, or a negative errno if none.

    -ENOENT: a hole in the source or no mapping; -EEXIST: something is at the destination; -EBUSY: a page
    that others know; -EINVAL: mappings that do not fit; -EFAULT, -ENOMEM.
    """
    mm = ctx.mm
    mm.mmap_lock.read_lock()
    moved = err = 0
    dst_vma = mm.vma_lookup(dst)
    src_vma = mm.vma_lookup(src)
    if dst_vma is None or src_vma is None:
        err = -ENOENT
    else:
        anon_vma_prepare(dst_vma)
        err = _validate(ctx, dst_vma, src_vma, dst, src, length)
        if not err:
            moved, err = _Move(mm, dst_vma, src_vma, mode).run(dst, src, length)
    mm.mmap_lock.read_unlock()
    return moved or err


def _validate(
    ctx: UserfaultfdCtx, dst_vma: VmArea, src_vma: VmArea, dst: int, src: int, length: int
) -> int:
    """validate_move_areas and the checks before it: 0 or -EINVAL."""
    both = src_vma.flags ^ dst_vma.flags
    either = src_vma.flags | dst_vma.flags
    fits = src + length <= src_vma.end and dst + length <= dst_vma.end
    same = not both & (VM_ACCESS_FLAGS | VM_LOCKED) and src_vma.page_prot == dst_vma.page_prot
    plain = not either & (VM_SHARED | VM_PFNMAP | VM_IO | VM_MIXEDMAP)
    anonymous = src_vma.ops is None and dst_vma.ops is None
    ours = dst_vma.userfaultfd_ctx is ctx
    good = fits and same and plain and anonymous and ours and src_vma.flags & VM_WRITE
    return 0 if good else -EINVAL


class _Move:
    """One call of move_pages. `folio` is locked and held while it is not -1, `anon_vma` locked."""

    __slots__ = ("anon_vma", "dst_vma", "folio", "folio_pte", "mm", "mode", "src_vma")

    def __init__(self, mm: MmStruct, dst_vma: VmArea, src_vma: VmArea, mode: int) -> None:
        self.mm = mm
        self.dst_vma = dst_vma
        self.src_vma = src_vma
        self.mode = mode
        self.folio = -1
        self.folio_pte = 0
        self.anon_vma: AnonVma | None = None

    def run(self, dst: int, src: int, length: int) -> tuple[int, int]:
        """(bytes moved, 0 or a negative errno)."""
        sched = self.mm.host.sched
        moved = err = 0
        while moved < length:
            ret = self._step(dst + moved, src + moved, length - moved)
            if ret < 0:
                err = ret
            if sched.preempt:
                sched.point("cond_resched")
            if err == -EAGAIN:
                sched.yield_()
                continue
            if err:
                break
            # Nothing moved where a huge entry was split first.
            moved += ret
        return moved, err

    def _step(self, dst: int, src: int, length: int) -> int:
        """What one table of both places holds, or one page of it: bytes, or a negative errno."""
        mm = self.mm
        u64 = mm.host.ram.u64
        holes = self.mode & UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
        src_pmd = mm_find_pmd(mm, src)
        if not src_pmd:
            if not holes:
                return -ENOENT
            src_pmd = pmd_alloc(mm, src)
        dst_pmd = pmd_alloc(mm, dst)
        if not src_pmd or not dst_pmd:
            return -ENOMEM
        if not u64[src_pmd >> 3]:
            if not holes:
                return -ENOENT
            if not pte_alloc(mm, src_pmd):
                return -ENOMEM
        if not pte_alloc(mm, dst_pmd):
            return -ENOMEM
        if not pmd_table(u64[dst_pmd >> 3]):
            return -EEXIST
        if not pmd_table(entry := u64[src_pmd >> 3]):
            pfn = pmd_pfn(entry) if pmd_present(entry) else -1
            known = pfn in (-1, mm.host.thp.huge_zero_pfn)
            if not known and not mm.host.pages.flags[pfn] & PG_anon_exclusive:
                return -EBUSY
            split_huge_pmd(self.src_vma, src_pmd, src)
            return 0
        range_ = mmu_notifier.mmu_notifier_range_init(
            mmu_notifier.MMU_NOTIFY_CLEAR, mm, src, src + length, order=mmu_notifier.ORDER_UNDER_PTL
        )
        mmu_notifier.mmu_notifier_invalidate_range_start(range_)
        ret = None
        while ret is None:
            ret = self._try(dst_pmd, src_pmd, dst, src, length)
        self._let_go()
        mmu_notifier.mmu_notifier_invalidate_range_end(range_)
        return ret

    def _let_go(self) -> None:
        if self.anon_vma is not None:
            self.anon_vma.root.rwsem.unlock()
            self.anon_vma = None
        if self.folio >= 0:
            folio_unlock(self.mm.host, self.folio)
            put_page(self.mm.host, self.folio)
            self.folio = -1

    # -- one attempt --------------------------------------------------------------------------

    def _try(self, dst_pmd: int, src_pmd: int, dst: int, src: int, length: int) -> int | None:
        """move_pages_ptes from its retry label on; None: a lock was waited for, so look again."""
        mm = self.mm
        dst_pte = pte_offset_map(mm, dst_pmd, dst)
        src_pte = pte_offset_map(mm, src_pmd, src)
        if not dst_pte or not src_pte:
            return -EAGAIN
        if _locked_get(mm, dst_pte):
            return -EEXIST
        entry = _locked_get(mm, src_pte)
        if not entry:
            return PAGE_SIZE if self.mode & UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES else -ENOENT
        if self.folio >= 0 and self.folio_pte != entry:
            return -EAGAIN
        if not pte_present(entry):
            return self._try_swap(dst_pte, src_pte, dst, src, entry, src_pmd)
        if pte_pfn(entry) == mm.host.zero_pfn:
            return self._zeropage(dst_pte, src_pte, dst, src, entry)
        if self.folio < 0:
            ret = self._hold_folio(src_pte, entry)
            if ret is None or ret:
                return ret
        if self.anon_vma is None:
            self.anon_vma = folio_get_anon_vma(mm.host, self.folio)
            if self.anon_vma is None:
                return -EAGAIN
            if not self.anon_vma.root.rwsem.trylock():
                self.anon_vma.root.rwsem.lock()
                return None
        return self._present(dst_pte, src_pte, dst, src, length, entry)

    def _hold_folio(self, src_pte: int, entry: int) -> int | None:
        """Reference and lock of the source's folio: 0, a negative errno, or None after a wait."""
        mm = self.mm
        host = mm.host
        ptl = pte_lockptr(mm, src_pte)
        ptl.lock()
        if ptep_get(mm, src_pte) != entry:
            ptl.unlock()
            return -EAGAIN
        pfn = vm_normal_page(host, entry)
        if pfn < 0 or not host.pages.flags[pfn] & PG_anon_exclusive:
            ptl.unlock()
            return -EBUSY
        head = page_folio(host.pages, pfn)
        locked = folio_trylock(host, head)
        if folio_test_large(host.pages, head):
            return self._split(ptl, head, pfn, locked)
        get_page(host, pfn)
        self.folio, self.folio_pte = pfn, entry
        ptl.unlock()
        if not locked:
            folio_lock(host, pfn)
            return None
        return 0

    def _split(self, ptl: Spinlock, head: int, pfn: int, locked: bool) -> int | None:
        """A large folio is split before one of its pages moves; its lock is not waited for."""
        host = self.mm.host
        if not locked:
            ptl.unlock()
            return -EAGAIN
        get_page(host, head)
        ptl.unlock()
        err = split_folio_to_list(host, pfn)
        held = head if err else pfn
        folio_unlock(host, held)
        put_page(host, held)
        return err or None

    def _double_lock(self, dst_pte: int, src_pte: int, entry: int) -> bool:
        """Both tables' locks, in the order of their addresses; false, and none, if an entry changed."""
        mm = self.mm
        first, second = sorted((dst_pte >> 12, src_pte >> 12))
        mm.pte_locks[first].lock()
        if second != first:
            mm.pte_locks[second].lock(nested=True)
        if ptep_get(mm, src_pte) == entry and not ptep_get(mm, dst_pte):
            return True
        self._double_unlock(dst_pte, src_pte)
        return False

    def _double_unlock(self, dst_pte: int, src_pte: int) -> None:
        pte_lockptr(self.mm, dst_pte).unlock()
        if dst_pte >> 12 != src_pte >> 12:
            pte_lockptr(self.mm, src_pte).unlock()

    # -- moving -------------------------------------------------------------------------------

    def _zeropage(self, dst_pte: int, src_pte: int, dst: int, src: int, entry: int) -> int:
        mm = self.mm
        if not self._double_lock(dst_pte, src_pte, entry):
            return -EAGAIN
        ptep_clear_flush(mm, src, src_pte)
        set_pte(mm, dst, dst_pte, mk_pte(mm.host.zero_pfn, self.dst_vma.page_prot) | _PAGE_SPECIAL)
        self._double_unlock(dst_pte, src_pte)
        return PAGE_SIZE

    def _present(self, dst_pte: int, src_pte: int, dst: int, src: int, length: int, entry: int) -> int:
        """move_present_ptes: this page, and those behind it that can go without waiting."""
        mm = self.mm
        host = mm.host
        if not self._double_lock(dst_pte, src_pte, entry):
            return -EAGAIN
        pfn = self.folio
        if folio_maybe_dma_pinned(host.pages, pfn) or not host.pages.flags[pfn] & PG_anon_exclusive:
            self._double_unlock(dst_pte, src_pte)
            return -EBUSY
        # The entry holds one, and nobody can take that away now.
        put_page(host, pfn)
        self.folio = -1
        room = min(PMD_SIZE - (src & (PMD_SIZE - 1)), PMD_SIZE - (dst & (PMD_SIZE - 1)), length)
        done, err = 0, 0
        while pfn >= 0:
            at = done >> 9
            if not self._present_one(pfn, dst_pte + at, src_pte + at, dst + done, src + done):
                err = -EBUSY
                break
            done += PAGE_SIZE
            folio_unlock(host, pfn)
            pfn = self._next(dst_pte + (done >> 9), src_pte + (done >> 9)) if done < room else -1
        if done:
            _tlb.flush_tlb_range(mm, src, src + done)
        if pfn >= 0:
            folio_unlock(host, pfn)
        self._double_unlock(dst_pte, src_pte)
        return done or err

    def _present_one(self, pfn: int, dst_pte: int, src_pte: int, dst: int, src: int) -> bool:
        mm, vma = self.mm, self.dst_vma
        host = mm.host
        old = ptep_get_and_clear(mm, src, src_pte)
        if folio_maybe_dma_pinned(host.pages, pfn):
            # Pinned between the look and the clearing: fast GUP saw the entry, and sees it again.
            set_pte(mm, src, src_pte, old)
            return False
        folio_move_anon_rmap(host, pfn, vma)
        host.pages.index[pfn] = vma.page_index(dst)
        new = pte_mksoft_dirty(mk_pte(pfn, vma.page_prot))
        if pte_dirty(old):
            new = pte_mkdirty(new)
        set_pte(mm, dst, dst_pte, pte_mkwrite(new))
        return True

    def _next(self, dst_pte: int, src_pte: int) -> int:
        """check_ptes_for_batched_move: the next page's frame, locked, or -1."""
        mm = self.mm
        host = mm.host
        entry = ptep_get(mm, src_pte)
        if ptep_get(mm, dst_pte) or not pte_present(entry):
            return -1
        pfn = vm_normal_page(host, entry)
        if pfn < 0 or folio_test_large(host.pages, page_folio(host.pages, pfn)):
            return -1
        if not folio_trylock(host, pfn):
            return -1
        exclusive = host.pages.flags[pfn] & PG_anon_exclusive
        if not exclusive or folio_get_anon_vma(host, pfn) is not self.anon_vma:
            folio_unlock(host, pfn)
            return -1
        return pfn

    # -- swap ---------------------------------------------------------------------------------

    def _try_swap(
        self, dst_pte: int, src_pte: int, dst: int, src: int, entry: int, src_pmd: int
    ) -> int | None:
        """A swap entry, its folio locked if there is one in the swap cache."""
        host = self.mm.host
        swp = pte_to_swp_entry(entry)
        if non_swap_entry(swp):
            if not is_migration_entry(swp):
                return -EFAULT
            migration_entry_wait(self.mm, src_pmd, src)
            return -EAGAIN
        if not entry & _PAGE_SWP_EXCLUSIVE:
            return -EBUSY
        if self.folio < 0:
            pfn = swap_cache_get_folio(host, swp)
            if pfn >= 0:
                locked = folio_trylock(host, pfn)
                self.folio, self.folio_pte = pfn, entry
                if not locked:
                    folio_lock(host, pfn)
                    return None
        return self._swap(dst_pte, src_pte, dst, src, entry, swp)

    def _swap(self, dst_pte: int, src_pte: int, dst: int, src: int, entry: int, swp: int) -> int:
        """move_swap_pte."""
        mm = self.mm
        host = mm.host
        pages = host.pages
        pfn = self.folio
        if pfn >= 0 and (not pages.flags[pfn] & PG_swapcache or pages.private[pfn] != swp):
            return -EAGAIN
        if not self._double_lock(dst_pte, src_pte, entry):
            return -EAGAIN
        assert host.swap is not None
        if pfn >= 0:
            folio_move_anon_rmap(host, pfn, self.dst_vma)
            pages.index[pfn] = self.dst_vma.page_index(dst)
        elif host.swap.has_cache(swp_offset(swp)):
            self._double_unlock(dst_pte, src_pte)
            return -EAGAIN
        old = ptep_get_and_clear(mm, src, src_pte)
        set_pte(mm, dst, dst_pte, old | _PAGE_SWP_SOFT_DIRTY)
        self._double_unlock(dst_pte, src_pte)
        return PAGE_SIZE


def _locked_get(mm: MmStruct, pte: int) -> int:
    ptl = pte_lockptr(mm, pte)
    ptl.lock()
    entry = ptep_get(mm, pte)
    ptl.unlock()
    return entry

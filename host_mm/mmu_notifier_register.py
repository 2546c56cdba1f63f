"""How a secondary MMU comes onto an mm's list of notifiers, and off it.

Source of truth: mm/mmu_notifier.c (__mmu_notifier_register, mmu_notifier_unregister,
mmu_notifier_get_locked, mmu_notifier_put, __mmu_notifier_release), mm/vma.c: mm_take_all_locks; Linux 6.18.

Not modelled: module unloading (mmu_notifier_synchronize).
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL
from typing import TYPE_CHECKING, Any

from host_mm.kernel.errors import BrokenTruth
from host_mm.mmu_notifier_types import IntervalTree, MmuNotifier, MmuNotifierSubscriptions

if TYPE_CHECKING:
    from host_mm.mm_types import MmStruct

__all__ = [
    "mmu_notifier_get", "mmu_notifier_put", "mmu_notifier_register", "mmu_notifier_register_locked",
    "mmu_notifier_release", "mmu_notifier_subscriptions_destroy", "mmu_notifier_unregister",
]


def _mm_take_all_locks(mm: MmStruct) -> list[Any]:
    """mm/vma.c: mm_take_all_locks. With these locks held no rmap walk is inside a bracket."""
    taken: list[Any] = []
    for vma in mm.vmas:
        if vma.file is not None and not any(vma.file.i_mmap_rwsem is lock for lock in taken):
            vma.file.i_mmap_rwsem.lock(nested=True)
            taken.append(vma.file.i_mmap_rwsem)
    for vma in mm.vmas:
        for avc in vma.anon_vma_chain:
            rwsem = avc.anon_vma.root.rwsem
            if not any(rwsem is lock for lock in taken):
                rwsem.lock(nested=True)
                taken.append(rwsem)
    return taken


def mmu_notifier_register(sub: MmuNotifier, mm: MmStruct) -> int:
    """Attach `sub`, at the head of the list. 0, or -EINVAL for a pair of callbacks Linux refuses."""
    mm.mmap_lock.lock()
    ret = mmu_notifier_register_locked(sub, mm)
    mm.mmap_lock.unlock()
    return ret


def mmu_notifier_register_locked(
    sub: MmuNotifier | None, mm: MmStruct,
    itree: Callable[[MmuNotifierSubscriptions], IntervalTree] | None = None,
) -> int:
    """__mmu_notifier_register, under mmap_lock for write. Without `sub` it turns on `itree`."""
    if mm.mm_users <= 0:
        raise BrokenTruth("notifier-register", "registered with an mm that nobody uses")
    if sub is not None and sub.arch_invalidate_secondary_tlbs is not None and (
        sub.invalidate_range_start is not None or sub.invalidate_range_end is not None
    ):
        return -EINVAL
    subs = mm.notifier_subscriptions
    if subs is None:
        subs = MmuNotifierSubscriptions(mm)
    taken = _mm_take_all_locks(mm)
    mm.notifier_subscriptions = subs
    if sub is not None:
        mm.mm_count += 1
        sub.mm = mm
        sub.users = 1
        with subs.lock:
            subs.list = (sub, *subs.list)
            sub.hashed = True
    elif itree is not None and subs.itree is None:
        subs.itree = itree(subs)
    for rwsem in reversed(taken):
        rwsem.unlock()
    return 0


def _unhash(subs: MmuNotifierSubscriptions, sub: MmuNotifier) -> None:
    if sub.hashed:
        subs.list = tuple(other for other in subs.list if other is not sub)
        sub.hashed = False


def mmu_notifier_unregister(sub: MmuNotifier, mm: MmStruct) -> None:
    """Detach `sub`: calls release unless mm's exit did; when it returns no callback can run."""
    subs = mm.notifier_subscriptions
    if subs is None:
        raise BrokenTruth("notifier-unregister", "unregistered from an mm that has no notifiers")
    srcu = mm.host.mmu_notifier_srcu
    if sub.hashed:
        idx = srcu.read_lock()
        if sub.release is not None:
            sub.release(mm)
        srcu.read_unlock(idx)
        with subs.lock:
            _unhash(subs, sub)
    srcu.synchronize()
    mm.mmdrop()


def mmu_notifier_get(ops: type[MmuNotifier], mm: MmStruct) -> MmuNotifier | int:
    """The one notifier of this class on this mm, made on first use; or a negative errno."""
    mm.mmap_lock.lock()
    try:
        subs = mm.notifier_subscriptions
        if subs is not None:
            with subs.lock:
                for sub in subs.list:
                    if type(sub) is ops:
                        sub.users += 1
                        return sub
        alloc = ops.alloc_notifier
        if alloc is None:
            return -EINVAL
        sub = alloc(mm)
        ret = mmu_notifier_register_locked(sub, mm)
        if ret and sub.free_notifier is not None:
            sub.free_notifier()
        return ret or sub
    finally:
        mm.mmap_lock.unlock()


def mmu_notifier_put(sub: MmuNotifier) -> None:
    """Drop one `get`. After the last, free_notifier runs once every callback has returned."""
    mm = sub.mm
    if mm is None or mm.notifier_subscriptions is None or not sub.users:
        raise BrokenTruth("notifier-put", "put of a notifier that nobody holds")
    subs = mm.notifier_subscriptions
    with subs.lock:
        sub.users -= 1
        if sub.users:
            return
        _unhash(subs, sub)
    srcu = mm.host.mmu_notifier_srcu

    def free_rcu() -> None:
        srcu.synchronize()
        if sub.free_notifier is not None:
            sub.free_notifier()
        mm.mmdrop()

    mm.host.sched.spawn("kworker/srcu", free_rcu)


def mmu_notifier_release(mm: MmStruct) -> None:
    """exit_mmap calls it before it unmaps anything: every notifier must drop all and freeze."""
    subs = mm.notifier_subscriptions
    if subs is None:
        return
    if subs.itree is not None:
        subs.itree.release(mm)
    if not subs.list:
        return
    srcu = mm.host.mmu_notifier_srcu
    idx = srcu.read_lock()
    for sub in subs.list:
        if sub.release is not None:
            sub.release(mm)
    with subs.lock:
        for sub in subs.list:
            sub.hashed = False
        subs.list = ()
    srcu.read_unlock(idx)
    srcu.synchronize()


def mmu_notifier_subscriptions_destroy(mm: MmStruct) -> None:
    """At the last mmdrop."""
    subs = mm.notifier_subscriptions
    if subs is not None:
        if subs.list:
            raise BrokenTruth("notifier-destroy", "an mm was destroyed with notifiers on its list")
        mm.notifier_subscriptions = None

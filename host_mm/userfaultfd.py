"""The userfaultfd system call and its ioctls.

Source of truth: fs/userfaultfd.c (userfaultfd_api, userfaultfd_register, userfaultfd_unregister,
userfaultfd_wake, userfaultfd_copy, userfaultfd_zeropage, userfaultfd_writeprotect, userfaultfd_continue,
userfaultfd_move, userfaultfd_poison, userfaultfd_release); Linux 6.18. Waiting and reading are in
userfaultfd_k.py, what the ioctls do to the tables in userfaultfd_mfill.py, userfaultfd_move.py and
userfaultfd_wp.py.

An ioctl that fills answers how many bytes it did, Linux's output field. Fewer than asked is what the ioctl
itself answers -EAGAIN for; the caller goes on behind them. What it did it wakes.

Not modelled: mmap_changing (it needs events), privileges, UFFD_USER_MODE_ONLY, hugetlb's alignment.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, EPERM, ESRCH
from typing import TYPE_CHECKING

from host_mm.arch.x86.pgtable import TASK_SIZE
from host_mm.kernel.costs import COST_SYSCALL
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import VM_MAYWRITE, VM_UFFD_MINOR, VM_UFFD_MISSING, VM_UFFD_WP
from host_mm.mmap import MMAP_MIN_ADDR
from host_mm.userfaultfd_k import (
    UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_UNPOPULATED,
    UserfaultfdCtx,
    wake_userfault,
)
from host_mm.userfaultfd_mfill import (
    MFILL_ATOMIC_CONTINUE,
    MFILL_ATOMIC_COPY,
    MFILL_ATOMIC_POISON,
    MFILL_ATOMIC_ZEROPAGE,
    mfill_atomic,
)
from host_mm.userfaultfd_move import UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES, move_pages
from host_mm.userfaultfd_wp import (
    mwriteprotect_range,
    userfaultfd_clear_vma,
    userfaultfd_register_range,
    userfaultfd_release_all,
    vma_can_userfault,
)

if TYPE_CHECKING:
    from host_mm.process import Process

__all__ = [
    "MODE_DONTWAKE", "UFFDIO_CONTINUE_MODE_WP", "UFFDIO_COPY_MODE_WP", "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES",
    "UFFDIO_REGISTER_MODE_MINOR", "UFFDIO_REGISTER_MODE_MISSING", "UFFDIO_REGISTER_MODE_WP",
    "UFFDIO_WRITEPROTECT_MODE_DONTWAKE", "UFFDIO_WRITEPROTECT_MODE_WP", "UFFD_FEATURE_MINOR_SHMEM",
    "UFFD_FEATURE_MISSING_SHMEM", "UFFD_FEATURE_MOVE", "UFFD_FEATURE_PAGEFAULT_FLAG_WP",
    "UFFD_FEATURE_POISON", "UFFD_FEATURE_WP_HUGETLBFS_SHMEM", "userfaultfd", "userfaultfd_api",
    "userfaultfd_continue", "userfaultfd_copy", "userfaultfd_move", "userfaultfd_poison",
    "userfaultfd_register", "userfaultfd_release", "userfaultfd_unregister", "userfaultfd_wake",
    "userfaultfd_writeprotect", "userfaultfd_zeropage",
]

UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_MINOR_SHMEM = 1 << 10
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
UFFD_FEATURE_POISON = 1 << 14
UFFD_FEATURE_MOVE = 1 << 16

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2
MODE_DONTWAKE = 1 << 0
"""UFFDIO_COPY_MODE_DONTWAKE, and that of ZEROPAGE, CONTINUE, MOVE and POISON."""
UFFDIO_COPY_MODE_WP = 1 << 1
UFFDIO_CONTINUE_MODE_WP = 1 << 1
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1

_MODES = (
    (UFFDIO_REGISTER_MODE_MISSING, VM_UFFD_MISSING), (UFFDIO_REGISTER_MODE_WP, VM_UFFD_WP),
    (UFFDIO_REGISTER_MODE_MINOR, VM_UFFD_MINOR),
)


def userfaultfd(process: Process) -> UserfaultfdCtx:
    """userfaultfd(2): what the new file descriptor stands for. It must be released."""
    process.host.sched.advance(COST_SYSCALL)
    return UserfaultfdCtx(process.mm)


def userfaultfd_release(ctx: UserfaultfdCtx) -> None:
    """The last close: unregister everything, and let every fault that waits be tried again."""
    ctx.released = True
    userfaultfd_release_all(ctx.mm, ctx)
    wake_userfault(ctx, 0, 0)
    ctx.fd_wqh.wake_all()
    ctx.put()


def userfaultfd_api(ctx: UserfaultfdCtx, features: int = 0) -> int:
    """UFFDIO_API: the features there are. KernelError(EINVAL): one that is not, or asked twice."""
    offered = ctx.mm.host.profile.userfaultfd_features
    if features & UFFD_FEATURE_WP_ASYNC:
        features |= UFFD_FEATURE_WP_UNPOPULATED
    if features & ~offered:
        raise KernelError(EINVAL, f"no feature {features & ~offered:#x}")
    if ctx.features >= 0:
        raise KernelError(EINVAL, "UFFDIO_API was called before")
    ctx.features = features
    return offered


# -- arguments ------------------------------------------------------------------------------------
def _enter(ctx: UserfaultfdCtx, feature: int = 0) -> None:
    """Every ioctl's first lines; `feature` is what this kernel must have to know it at all."""
    host = ctx.mm.host
    host.sched.advance(COST_SYSCALL)
    if ctx.features < 0:
        raise KernelError(EINVAL, "UFFDIO_API comes first")
    if feature & ~host.profile.userfaultfd_features:
        raise KernelError(EINVAL, f"{host.profile.name} has no such ioctl")


def validate_unaligned_range(start: int, length: int) -> None:
    """KernelError(EINVAL) unless it is some whole pages' worth of user address space."""
    if length & 4095 or length <= 0:
        raise KernelError(EINVAL, f"{length:#x} bytes are no pages")
    if start < MMAP_MIN_ADDR or start >= TASK_SIZE or length > TASK_SIZE - start:
        raise KernelError(EINVAL, f"{start:#x}+{length:#x} is not in the user address space")


def validate_range(start: int, length: int) -> None:
    """KernelError(EINVAL) unless it is some pages of the user address space."""
    if start & 4095:
        raise KernelError(EINVAL, f"{start:#x} is not page-aligned")
    validate_unaligned_range(start, length)


def _check_mode(mode: int, allowed: int) -> None:
    if mode & ~allowed:
        raise KernelError(EINVAL, f"no mode {mode & ~allowed:#x}")


def _mmget_not_zero(ctx: UserfaultfdCtx) -> None:
    if not ctx.mm.mm_users:
        raise KernelError(ESRCH, "the process has ended")


# -- registration ---------------------------------------------------------------------------------
def userfaultfd_register(ctx: UserfaultfdCtx, start: int, length: int, mode: int) -> None:
    """UFFDIO_REGISTER of every mapping of the range, in modes UFFDIO_REGISTER_MODE_*.

    KernelError: EINVAL (range, modes, nothing mapped, a mapping that cannot be), EPERM (one that may never
    be written), EBUSY (one that is another userfaultfd's).
    """
    _enter(ctx)
    _check_mode(mode, sum(bit for bit, _ in _MODES))
    if not mode:
        raise KernelError(EINVAL, "no mode")
    validate_range(start, length)
    _mmget_not_zero(ctx)
    flags = sum(vm_flag for bit, vm_flag in _MODES if mode & bit)
    mm = ctx.mm
    mm.mmap_lock.lock()
    try:
        vmas = mm.vmas_in(start, start + length)
        if not vmas:
            raise KernelError(EINVAL, f"nothing is mapped in {start:#x}+{length:#x}")
        for vma in vmas:
            if not vma_can_userfault(vma, flags, wp_async=bool(ctx.features & UFFD_FEATURE_WP_ASYNC)):
                raise KernelError(EINVAL, f"{vma!r} cannot be registered in mode {mode}")
            if not vma.flags & VM_MAYWRITE:
                raise KernelError(EPERM, f"{vma!r} may never be written")
            if vma.userfaultfd_ctx is not None and vma.userfaultfd_ctx is not ctx:
                raise KernelError(EBUSY, f"{vma!r} is registered with another userfaultfd")
        userfaultfd_register_range(ctx, vmas, flags, start, start + length)
    finally:
        mm.mmap_lock.unlock()


def userfaultfd_unregister(ctx: UserfaultfdCtx, start: int, length: int) -> None:
    """UFFDIO_UNREGISTER: write-protections are lifted, faults on missing pages that wait are woken.

    KernelError(EINVAL): range, nothing mapped, or a mapping of another userfaultfd.
    """
    _enter(ctx)
    validate_range(start, length)
    _mmget_not_zero(ctx)
    mm = ctx.mm
    end = start + length
    mm.mmap_lock.lock()
    try:
        vmas = mm.vmas_in(start, end)
        if not vmas:
            raise KernelError(EINVAL, f"nothing is mapped in {start:#x}+{length:#x}")
        for vma in vmas:
            other = vma.userfaultfd_ctx is not None and vma.userfaultfd_ctx is not ctx
            if other or not vma_can_userfault(
                vma, vma.flags, wp_async=bool(ctx.features & UFFD_FEATURE_WP_ASYNC)
            ):
                raise KernelError(EINVAL, f"{vma!r} is not this userfaultfd's")
        for vma in vmas:
            if vma.userfaultfd_ctx is None:
                continue
            first, last = max(vma.start, start), min(vma.end, end)
            if vma.flags & VM_UFFD_MISSING:
                wake_userfault(ctx, first, last - first)
            userfaultfd_clear_vma(vma, first, last)
    finally:
        mm.mmap_lock.unlock()


def userfaultfd_wake(ctx: UserfaultfdCtx, start: int, length: int) -> None:
    """UFFDIO_WAKE. KernelError(EINVAL)."""
    _enter(ctx)
    validate_range(start, length)
    wake_userfault(ctx, start, length)


# -- filling --------------------------------------------------------------------------------------
def _filled(ctx: UserfaultfdCtx, start: int, done: int, *, wake: bool) -> int:
    if done < 0:
        raise KernelError(-done, f"nothing was filled at {start:#x}")
    if wake:
        wake_userfault(ctx, start, done)
    return done


def userfaultfd_copy(ctx: UserfaultfdCtx, dst: int, src: int, length: int, mode: int = 0) -> int:
    """UFFDIO_COPY from `src`, which need not be aligned; bytes done.

    KernelError: EINVAL, ENOENT (not registered, or not one mapping), EEXIST, EFAULT, ENOMEM, ESRCH.
    """
    _enter(ctx)
    validate_unaligned_range(src, length)
    validate_range(dst, length)
    _check_mode(mode, MODE_DONTWAKE | UFFDIO_COPY_MODE_WP)
    _mmget_not_zero(ctx)
    done = mfill_atomic(ctx, dst, src, length, MFILL_ATOMIC_COPY, wp=bool(mode & UFFDIO_COPY_MODE_WP))
    return _filled(ctx, dst, done, wake=not mode & MODE_DONTWAKE)


def userfaultfd_zeropage(ctx: UserfaultfdCtx, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_ZEROPAGE; bytes done. KernelError as userfaultfd_copy."""
    _enter(ctx)
    validate_range(start, length)
    _check_mode(mode, MODE_DONTWAKE)
    _mmget_not_zero(ctx)
    done = mfill_atomic(ctx, start, 0, length, MFILL_ATOMIC_ZEROPAGE)
    return _filled(ctx, start, done, wake=not mode & MODE_DONTWAKE)


def userfaultfd_continue(ctx: UserfaultfdCtx, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_CONTINUE: map pages of shared memory that are in the file; bytes done.

    KernelError as userfaultfd_copy; EFAULT for a page that is not in the file, EINVAL for other memory.
    """
    _enter(ctx, UFFD_FEATURE_MINOR_SHMEM)
    validate_range(start, length)
    _check_mode(mode, MODE_DONTWAKE | UFFDIO_CONTINUE_MODE_WP)
    _mmget_not_zero(ctx)
    done = mfill_atomic(ctx, start, 0, length, MFILL_ATOMIC_CONTINUE, wp=bool(mode & UFFDIO_CONTINUE_MODE_WP))
    return _filled(ctx, start, done, wake=not mode & MODE_DONTWAKE)


def userfaultfd_move(ctx: UserfaultfdCtx, dst: int, src: int, length: int, mode: int = 0) -> int:
    """UFFDIO_MOVE within the process; bytes done. KernelError: see move_pages, and ESRCH."""
    _enter(ctx, UFFD_FEATURE_MOVE)
    validate_range(dst, length)
    validate_range(src, length)
    _check_mode(mode, MODE_DONTWAKE | UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)
    _mmget_not_zero(ctx)
    done = move_pages(ctx, dst, src, length, mode)
    return _filled(ctx, dst, done, wake=not mode & MODE_DONTWAKE)


def userfaultfd_poison(ctx: UserfaultfdCtx, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_POISON: accesses get what they would get of a broken frame; bytes done."""
    _enter(ctx, UFFD_FEATURE_POISON)
    validate_range(start, length)
    _check_mode(mode, MODE_DONTWAKE)
    _mmget_not_zero(ctx)
    done = mfill_atomic(ctx, start, 0, length, MFILL_ATOMIC_POISON)
    return _filled(ctx, start, done, wake=not mode & MODE_DONTWAKE)


def userfaultfd_writeprotect(ctx: UserfaultfdCtx, start: int, length: int, mode: int) -> None:
    """UFFDIO_WRITEPROTECT: protect, or with mode 0 lift that and wake the writers.

    KernelError: EINVAL, ENOENT (a mapping is not registered for it), ENOMEM, ESRCH.
    """
    _enter(ctx)
    validate_range(start, length)
    _check_mode(mode, UFFDIO_WRITEPROTECT_MODE_WP | UFFDIO_WRITEPROTECT_MODE_DONTWAKE)
    protect = bool(mode & UFFDIO_WRITEPROTECT_MODE_WP)
    wake = not mode & UFFDIO_WRITEPROTECT_MODE_DONTWAKE
    if protect and not wake:
        raise KernelError(EINVAL, "protecting wakes nobody")
    _mmget_not_zero(ctx)
    err = mwriteprotect_range(ctx, start, start + length, enable_wp=protect)
    if err:
        raise KernelError(-err, f"{start:#x}+{length:#x} is not registered for write-protection")
    if not protect and wake:
        wake_userfault(ctx, start, length)

"""A VMM's userfaultfds: a thread that serves the faults of a part of guest memory, in four ways.

Source: what VMMs do with Documentation/admin-guide/mm/userfaultfd.rst: post-copy migration, a snapshot of
a running guest, pages that are lent out, shared memory that is mapped on demand; Linux 6.18.

Each may begin while vCPUs run. What they write until then is in the pages that are set aside; from then on
their accesses wait in the host's fault handler until the thread has answered.

Not modelled: several threads for one userfaultfd, events.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from host_mm.kernel.locks import Mutex
from host_mm.kernel.sched import Task, WaitQueue
from host_mm.pagemap import PM_PRESENT, PM_SWAP
from host_mm.ram import PAGE_SIZE
from host_mm.userfaultfd import (
    UFFDIO_COPY_MODE_WP,
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
    UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    UFFDIO_WRITEPROTECT_MODE_WP,
    userfaultfd_continue,
    userfaultfd_copy,
    userfaultfd_move,
    userfaultfd_register,
    userfaultfd_release,
    userfaultfd_wake,
    userfaultfd_writeprotect,
    userfaultfd_zeropage,
)
from host_mm.userfaultfd_k import (
    UFFD_FEATURE_WP_UNPOPULATED,
    UFFD_PAGEFAULT_FLAG_WP,
    UffdMsg,
    userfaultfd_ctx_read,
    userfaultfd_poll,
)

if TYPE_CHECKING:
    from emu.board import Board

__all__ = ["Lend", "Minor", "PostCopy", "Snapshot", "UffdHandler"]

RETRY = 20_000
"""ns until an ioctl that found no memory, or a page in somebody's hands, is tried again."""
PROT_RW = 3
_ZEROS = bytes(PAGE_SIZE)


class UffdHandler:
    """One userfaultfd over `pieces` (hva, length) of guest memory. `served`: faults that were answered.

    `mutex` is the VMM's own: who drops pages that are kept elsewhere does so between two answers.
    """

    def __init__(self, board: Board, pieces: list[tuple[int, int]], features: int = 0) -> None:
        self.board = board
        self.vmm = board.vmm
        self.pieces = pieces
        self.served = 0
        self.mutex = Mutex(board.host.sched, "uffd thread")
        self.ctx = board.vmm.userfaultfd(features)
        self._stopping = False
        self._gone = WaitQueue(board.host.sched, "uffd thread")
        self._task: Task | None = None

    # -- the thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread. Whatever it does has the fault that it answers as its cause."""
        self._task = self.board.host.sched.spawn("uffd", self._serve)
        self._task.ctx.cause = None

    def _serve(self) -> None:
        ctx = self.ctx
        own = self.board.host.stream.ctx
        while not self._stopping:
            ctx.fd_wqh.wait_event(lambda: self._stopping or userfaultfd_poll(ctx))
            try:
                msg = userfaultfd_ctx_read(ctx)
            except KernelError:
                continue
            own.cause = msg.cause
            self.mutex.lock()
            if self.answer(msg):
                self.served += 1
            self.mutex.unlock()
            own.cause = None
        self._task = None
        self._gone.wake_all()

    def answer(self, msg: UffdMsg) -> bool:
        """Resolve one fault; false: it goes on waiting, somebody else will wake it."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the thread, unregister, and let whoever waits try again."""
        self._stopping = True
        self.ctx.fd_wqh.wake_all()
        self._gone.wait_event(lambda: self._task is None)
        userfaultfd_release(self.ctx)

    def begin(self) -> int:
        """Start; what the user is answered."""
        raise NotImplementedError

    def finish(self) -> int:
        """Bring everything back to where the guest can do without this, and stop; the answer for the user."""
        raise NotImplementedError

    def bring_all(self) -> None:
        """Bring what is elsewhere; the rest of the range stays as it is."""

    def forget(self, hva: int, length: int) -> None:
        """The VMM drops a range: what is kept of it elsewhere goes, too. `mutex` is held."""

    # -- its tools ----------------------------------------------------------------------------

    def register(self, mode: int) -> None:
        """UFFDIO_REGISTER of the pieces."""
        for hva, length in self.pieces:
            userfaultfd_register(self.ctx, hva, length, mode)

    def protect(self) -> None:
        """UFFDIO_WRITEPROTECT of the pieces."""
        for hva, length in self.pieces:
            userfaultfd_writeprotect(self.ctx, hva, length, UFFDIO_WRITEPROTECT_MODE_WP)

    def populated(self, hva: int, length: int) -> list[int]:
        """The address of each page of a range that has a frame or a slot."""
        words = self.vmm.pagemap(hva, length // PAGE_SIZE)
        return [hva + n * PAGE_SIZE for n, word in enumerate(words) if word & (PM_PRESENT | PM_SWAP)]

    def give(self, hva: int, source: int, mode: int = 0) -> None:
        """See that a page is there, by COPY from `source` or, for 0, by ZEROPAGE; wakes its waiters."""
        while True:
            try:
                if source:
                    userfaultfd_copy(self.ctx, hva, source, PAGE_SIZE, mode)
                else:
                    userfaultfd_zeropage(self.ctx, hva, PAGE_SIZE)
                return
            except KernelError as exc:
                if exc.errno in (errno.EEXIST, errno.ENOENT):
                    # There already, or the range was unmapped meanwhile.
                    userfaultfd_wake(self.ctx, hva, PAGE_SIZE)
                    return
                if exc.errno not in (errno.ENOMEM, errno.EAGAIN):
                    raise
                self.board.host.sched.sleep(RETRY)


class PostCopy(UffdHandler):
    """The range's pages are kept outside of it and come when they are asked for.

    The range is write-protected, its bytes are kept, the range is dropped; who writes meanwhile waits
    until it is. `kept` has the pages that did not come back yet.
    """

    def __init__(self, board: Board, pieces: list[tuple[int, int]]) -> None:
        super().__init__(board, pieces)
        self.buffer = board.vmm.mmap(PAGE_SIZE, PROT_RW)
        self.kept: dict[int, bytes] = {}
        self.dropped = False

    def begin(self) -> int:
        """Set the range aside; how many pages were."""
        from host_mm.madvise import MADV_DONTNEED

        self.start()
        self.register(UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP)
        self.protect()
        for start, length in self.pieces:
            for hva in self.populated(start, length):
                self.kept[hva] = self.vmm.read(hva, PAGE_SIZE)
        count = len(self.kept)
        for hva, length in self.pieces:
            self.vmm.madvise(hva, length, MADV_DONTNEED)
        self.dropped = True
        for hva, length in self.pieces:
            userfaultfd_wake(self.ctx, hva, length)
        return count

    def answer(self, msg: UffdMsg) -> bool:
        """A page that was kept, or zeros. Writers wait until the range is dropped."""
        hva = msg.address
        if msg.flags & UFFD_PAGEFAULT_FLAG_WP:
            if self.dropped:
                userfaultfd_writeprotect(self.ctx, hva, PAGE_SIZE, 0)
            return self.dropped
        self._bring(hva)
        return True

    def _bring(self, hva: int) -> None:
        if self.dropped and hva not in self.kept:
            self.give(hva, 0)
            return
        self.vmm.write(self.buffer, self.kept.get(hva, _ZEROS))
        self.give(hva, self.buffer, 0 if self.dropped else UFFDIO_COPY_MODE_WP)
        if self.dropped:
            self.kept.pop(hva, None)

    def bring_all(self) -> None:
        """Push what nobody asked for yet."""
        while self.kept:
            self.mutex.lock()
            if self.kept:
                hva, data = self.kept.popitem()
                self.vmm.write(self.buffer, data)
                self.give(hva, self.buffer)
            self.mutex.unlock()

    def forget(self, hva: int, length: int) -> None:
        """These pages will come as zeros."""
        for page in range(hva, hva + length, PAGE_SIZE):
            self.kept.pop(page, None)

    def finish(self) -> int:
        """Bring everything; how many faults were served."""
        self.bring_all()
        self.stop()
        self.vmm.munmap(self.buffer, PAGE_SIZE)
        return self.served


class Snapshot(UffdHandler):
    """The range as it was: a page is saved before the first write to it goes on."""

    def __init__(self, board: Board, pieces: list[tuple[int, int]]) -> None:
        offered = board.host.mm.profile.userfaultfd_features
        super().__init__(board, pieces, UFFD_FEATURE_WP_UNPOPULATED & offered)
        self.saved: dict[int, bytes] = {}

    def begin(self) -> int:
        """Write-protect the range; 0."""
        self.start()
        self.register(UFFDIO_REGISTER_MODE_WP)
        self.protect()
        return 0

    def answer(self, msg: UffdMsg) -> bool:
        """Save the page, then let it be written."""
        hva = msg.address
        first = hva not in self.saved
        if first:
            self.saved[hva] = self.vmm.read(hva, PAGE_SIZE)
        userfaultfd_writeprotect(self.ctx, hva, PAGE_SIZE, 0)
        return first

    def read(self, hva: int, size: int) -> bytes:
        """Bytes of one page as they were when the snapshot was taken."""
        data = self.saved.get(hva & -PAGE_SIZE)
        if data is None:
            return self.vmm.read(hva, size)
        return data[hva % PAGE_SIZE : hva % PAGE_SIZE + size]

    def finish(self) -> int:
        """How many pages were written."""
        self.stop()
        return len(self.saved)


class Lend(UffdHandler):
    """The range's pages themselves go to another place of the VMM, and come back when asked for."""

    def __init__(self, board: Board, pieces: list[tuple[int, int]]) -> None:
        super().__init__(board, pieces)
        self.lent_to = {hva: board.vmm.mmap(length, PROT_RW) for hva, length in pieces}

    def _place(self, hva: int) -> int:
        for start, length in self.pieces:
            if start <= hva < start + length:
                return self.lent_to[start] + hva - start
        raise KernelError(errno.EFAULT, f"{hva:#x} is not lent")

    def begin(self) -> int:
        """Move what can be moved; how many pages went. Those in shared use stay."""
        self.start()
        self.register(UFFDIO_REGISTER_MODE_MISSING)
        for hva, length in self.pieces:
            userfaultfd_register(self.ctx, self.lent_to[hva], length, UFFDIO_REGISTER_MODE_MISSING)
        for hva, length in self.pieces:
            self._move_out(hva, length)
        return sum(len(self.populated(self.lent_to[hva], length)) for hva, length in self.pieces)

    def _move_out(self, hva: int, length: int) -> None:
        done, left = 0, length
        while done < length:
            place = self.lent_to[hva] + done
            try:
                done += userfaultfd_move(self.ctx, place, hva + done, left, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)
            except KernelError as exc:
                if exc.errno == errno.EINVAL and left > PAGE_SIZE:
                    # More than one mapping, or one with other rights: page by page.
                    left = PAGE_SIZE
                    continue
                if exc.errno not in (errno.EBUSY, errno.EEXIST, errno.EINVAL):
                    raise
                done += PAGE_SIZE
            left = min(left, length - done)

    def answer(self, msg: UffdMsg) -> bool:
        """The page comes back, or one of zeros comes where none was."""
        self._bring(msg.address)
        return True

    def _bring(self, hva: int) -> None:
        from host_mm.madvise import MADV_DONTNEED

        place = self._place(hva)
        try:
            userfaultfd_move(self.ctx, hva, place, PAGE_SIZE)
        except KernelError as exc:
            if exc.errno == errno.ENOENT or not self.populated(place, PAGE_SIZE):
                self.give(hva, 0)
            elif exc.errno == errno.EEXIST:
                userfaultfd_wake(self.ctx, hva, PAGE_SIZE)
            elif exc.errno in (errno.EBUSY, errno.EINVAL):
                # A fork shares it with the child since, somebody pinned it, or the rights changed.
                self.give(hva, place)
                self.vmm.madvise(place, PAGE_SIZE, MADV_DONTNEED)
            else:
                raise

    def bring_all(self) -> None:
        """Everything comes back."""
        for hva, length in self.pieces:
            place = self.lent_to[hva]
            for page in self.populated(place, length):
                self.mutex.lock()
                self._bring(hva + page - place)
                self.mutex.unlock()

    def forget(self, hva: int, length: int) -> None:
        """Their pages go from where they are lent to."""
        from host_mm.madvise import MADV_DONTNEED

        for start, size in self.pieces:
            first, last = max(start, hva), min(start + size, hva + length)
            if first < last:
                self.vmm.madvise(self._place(first), last - first, MADV_DONTNEED)

    def finish(self) -> int:
        """Everything comes back; how many faults asked for it before."""
        self.bring_all()
        self.stop()
        for hva, length in self.pieces:
            self.vmm.munmap(self.lent_to[hva], length)
        return self.served


class Minor(UffdHandler):
    """Shared memory that is in its file but not mapped: each page is mapped when it is touched."""

    def begin(self) -> int:
        """Register the range and unmap it; its pages stay in the file."""
        from host_mm.madvise import MADV_DONTNEED

        self.start()
        self.register(UFFDIO_REGISTER_MODE_MINOR)
        for hva, length in self.pieces:
            self.vmm.madvise(hva, length, MADV_DONTNEED)
        return 0

    def answer(self, msg: UffdMsg) -> bool:
        """UFFDIO_CONTINUE. A page that left the file meanwhile is just tried again."""
        try:
            userfaultfd_continue(self.ctx, msg.address, PAGE_SIZE)
        except KernelError as exc:
            if exc.errno not in (errno.EEXIST, errno.EFAULT, errno.ENOENT, errno.ENOMEM):
                raise
            userfaultfd_wake(self.ctx, msg.address, PAGE_SIZE)
            return False
        return True

    def finish(self) -> int:
        """How many pages were mapped on demand."""
        self.stop()
        return self.served

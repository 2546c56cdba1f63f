"""userfaultfd on a real machine: a thread of this process answers the faults of D.

Source of truth: include/uapi/linux/userfaultfd.h (ioctl numbers, struct uffd_msg); Linux 6.18, x86-64.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
from typing import Any

from refault.scenarios.layout import DATA_SIZE, PAGE
from refault.scenarios.live import libc
from refault.scenarios.live.tracefs import TraceInstance

__all__ = ["UffdSteps"]

_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_UFFDIO_COPY, _UFFDIO_ZEROPAGE = 0xC028AA03, 0xC020AA04
_UFFD_API = 0xAA
_MSG_SIZE = 32
_COPIED = 0xABC
"""The first word of the page that is copied in."""


class UffdSteps:
    """The steps, for a back end that has `data`, the address of D, and `trace`."""

    data: int
    trace: TraceInstance
    _undo: contextlib.ExitStack
    _uffd: int = -1
    _answer: str = ""
    _source: int = 0

    def mark(self, text: str) -> None:
        """Put a line into the event sequence."""
        raise NotImplementedError

    def uffd_api(self) -> Any:
        """A userfaultfd with its thread."""
        if self._uffd < 0:
            self._uffd = libc.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK)
            self._undo.callback(os.close, self._uffd)
            self._source = libc.mmap(0, PAGE, 3, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
            libc.poke(self._source, struct.pack("<Q", _COPIED))
            self._start_thread()
        return libc.ioctl(self._uffd, _UFFDIO_API, struct.pack("<3Q", _UFFD_API, 0, 0))

    def uffd_register(self, mode: int) -> Any:
        """The data slot is registered."""
        libc.ioctl(self._uffd, _UFFDIO_REGISTER, struct.pack("<4Q", self.data, DATA_SIZE, mode, 0))

    def uffd_answer(self, kind: str) -> None:
        """How the thread answers."""
        self._answer = kind

    def uffd_copy(self, offset: int) -> Any:
        """The page of the thread's source, without a fault."""
        return self._copy(self.data + offset)

    def _copy(self, address: int) -> int:
        return libc.ioctl(self._uffd, _UFFDIO_COPY, struct.pack("<5Q", address, self._source, PAGE, 0, 0))

    def _start_thread(self) -> None:
        read, write = os.pipe()
        thread = threading.Thread(target=self._serve, args=(read,), daemon=True)
        thread.start()

        def stop() -> None:
            os.close(write)
            thread.join()
            os.close(read)

        self._undo.callback(stop)

    def _serve(self, stop: int) -> None:
        self.trace.watch(threading.get_native_id())
        while stop not in select.select([self._uffd, stop], [], [])[0]:
            try:
                msg = os.read(self._uffd, _MSG_SIZE)
            except BlockingIOError:
                continue
            flags, address = struct.unpack_from("<QQ", msg, 8)
            address &= ~(PAGE - 1)
            self.mark(f">> uffd event {msg[0]:#x} flags {flags:#x} D+{address - self.data:#x}")
            self.mark(f"<< uffd answering {self._answer}")
            if self._answer == "copy":
                self._copy(address)
            else:
                libc.ioctl(self._uffd, _UFFDIO_ZEROPAGE, struct.pack("<4Q", address, PAGE, 0, 0))

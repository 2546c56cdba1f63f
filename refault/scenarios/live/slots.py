"""Memory slots and guest_memfd of a real KVM."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable
from typing import Any

from refault.scenarios.layout import DATA_GPA, MORE_OFFSET
from refault.scenarios.live import libc
from refault.scenarios.live.kvm import Vm
from refault.scenarios.live.tracefs import TraceInstance
from refault.scenarios.normal import Normalizer

__all__ = ["SlotSteps", "answer"]

_KEEP_SIZE_PUNCH_HOLE = 3


def answer(call: Callable[[], Any]) -> Any:
    """What a call returns, or its errno's name."""
    try:
        return call()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc.errno))


class SlotSteps:
    """The steps, for a back end that has `vm`, `normal` and `data`, the address of D."""

    vm: Vm
    data: int
    normal: Normalizer
    trace: TraceInstance
    _undo: contextlib.ExitStack
    _more: int = MORE_OFFSET
    _gmem: int = -1
    _gmem_size: int = 0
    _gmem_at: int = 0

    def _map(self, offset: int, size: int, flags: int = 0, fd: int = -1) -> int:
        raise NotImplementedError

    def _take(self, size: int) -> int:
        offset, self._more = self._more, self._more + (size + 0x1FFFFF & ~0x1FFFFF)
        return offset

    def memory_for_slot(self, size: int) -> int:
        """Fresh memory of this process."""
        offset = self._take(size)
        # It takes the place of a reservation, whose end is nobody's business.
        self.trace.pause(True)
        self._map(offset, size)
        self.trace.pause(False)
        self.normal.slots.append((offset, offset + size))
        return offset

    def set_slot(self, slot: int, offset: int, size: int, memory: int, flags: int) -> Any:
        """KVM_SET_USER_MEMORY_REGION."""
        return answer(lambda: self.vm.set_slot(slot, DATA_GPA + offset, size, self.data + memory, flags))

    def create_guest_memfd(self, size: int, flags: int) -> Any:
        """KVM_CREATE_GUEST_MEMFD."""
        descriptor = answer(lambda: self.vm.create_guest_memfd(size, flags))
        if isinstance(descriptor, str):
            return descriptor
        self._gmem, self._gmem_size = descriptor, size
        self._undo.callback(os.close, descriptor)
        return "fd"

    def mmap_guest_memfd(self) -> Any:
        """A shared mapping of it."""
        offset = self._take(self._gmem_size)
        result = answer(lambda: self._map(offset, self._gmem_size, libc.MAP_SHARED, self._gmem))
        if isinstance(result, str):
            return result
        self._gmem_at = result
        return "address"

    def set_guest_memfd_slot(self, slot: int, offset: int) -> Any:
        """KVM_SET_USER_MEMORY_REGION2."""
        return answer(lambda: self.vm.set_slot2(
            slot, DATA_GPA + offset, self._gmem_size, self._gmem_at, self._gmem, 0
        ))

    def read_guest_memfd(self, offset: int) -> Any:
        """A load through the mapping."""
        return hex(struct.unpack("<Q", libc.peek(self._gmem_at + offset, 8))[0])

    def punch_guest_memfd(self, offset: int, length: int) -> Any:
        """A hole."""
        return answer(lambda: libc.fallocate(self._gmem, _KEEP_SIZE_PUNCH_HOLE, offset, length)) or 0

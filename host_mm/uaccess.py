"""A process's own reads and writes of its memory.

Source of truth: arch/x86/lib/usercopy_64.c (copy_to_user, copy_from_user), arch/x86/include/asm/uaccess.h:
__try_cmpxchg_user; they end in the CPU's translation (arch/x86/fault.py); Linux 6.18.

Not modelled: partial copies (a copy that fails has written what came before and raises).
"""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING

from host_mm.arch.x86.fault import translate, translate_nofault
from host_mm.arch.x86.pgtable import TASK_SIZE
from host_mm.kernel.errors import KernelError
from host_mm.mm_types import VM_FAULT_BADMAP, VM_FAULT_HWPOISON, VM_FAULT_OOM, VM_FAULT_SIGBUS
from host_mm.process import BUS_MCEERR_AR

if TYPE_CHECKING:
    from host_mm.process import Process

__all__ = ["copy_from_user", "copy_from_user_nofault", "copy_to_user", "try_cmpxchg_user"]

_WHY = (
    (VM_FAULT_BADMAP, "no mapping allows it"), (VM_FAULT_OOM, "out of memory"),
    (VM_FAULT_HWPOISON, "the frame is poisoned"), (VM_FAULT_SIGBUS, "bus error"),
)


def _frame(process: Process, hva: int, write: bool) -> int:
    pfn = translate(process.mm, hva, write=write) if 0 <= hva < TASK_SIZE else -VM_FAULT_BADMAP
    if pfn < 0:
        if -pfn & VM_FAULT_HWPOISON:
            process.send_sig_mceerr(BUS_MCEERR_AR, hva)
        why = next((text for bit, text in _WHY if -pfn & bit), "refused")
        raise KernelError(EFAULT, f"{'write' if write else 'read'} at {hva:#x}: {why}")
    return pfn


def copy_from_user(process: Process, hva: int, length: int) -> bytes:
    """`length` bytes of the process's memory. KernelError(EFAULT)."""
    ram = process.host.ram
    parts: list[bytes] = []
    while length > 0:
        size = min(length, 4096 - (hva & 4095))
        pfn = _frame(process, hva, False)
        parts.append(ram.read((pfn << 12) + (hva & 4095), size))
        hva += size
        length -= size
    return b"".join(parts)


def copy_from_user_nofault(process: Process, hva: int, length: int) -> bytes | None:
    """The same with page faults disabled: None where one would be needed."""
    mm, ram = process.mm, process.host.ram
    parts: list[bytes] = []
    while length > 0:
        size = min(length, 4096 - (hva & 4095))
        pfn = translate_nofault(mm, hva, write=False) if 0 <= hva < TASK_SIZE else -1
        if pfn < 0:
            return None
        parts.append(ram.read((pfn << 12) + (hva & 4095), size))
        hva += size
        length -= size
    return b"".join(parts)


def copy_to_user(process: Process, hva: int, data: bytes | memoryview) -> None:
    """Write into the process's memory. KernelError(EFAULT)."""
    ram = process.host.ram
    done = 0
    while done < len(data):
        size = min(len(data) - done, 4096 - (hva & 4095))
        pfn = _frame(process, hva, True)
        ram.write((pfn << 12) + (hva & 4095), data[done : done + size])
        hva += size
        done += size


def try_cmpxchg_user(process: Process, hva: int, old: bytes, new: bytes) -> bool:
    """Store `new` if memory holds `old`, at once; whether it did. Within a page. KernelError(EFAULT).

    It is a write access either way.
    """
    ram = process.host.ram
    at = (_frame(process, hva, True) << 12) + (hva & 4095)
    if ram.read(at, len(old)) != old:
        return False
    ram.write(at, new)
    return True

"""The CPU's own accesses to guest memory outside Unicorn: descriptors, stacks, emulated operands.

Every access goes through the hardware walk, so it may page-fault or leave the guest like any other.
A store is all or nothing: both pages are translated before a byte is written.

Source: Intel SDM vol. 3A 4.6.1 (implicit supervisor accesses), 6.15 (#GP and #SS for non-canonical
addresses), vol. 3C 29.3.3.

Not modelled: atomicity against other vCPUs (they run one at a time), segment limits.
"""

from __future__ import annotations

from emu.cpu.fill import Fill
from emu.cpu.walk import (
    ACCESS_FETCH,
    ACCESS_IMPLICIT,
    ACCESS_READ,
    ACCESS_WRITE,
    EPT_MISCONFIG,
    EPT_VIOLATION,
    NON_CANONICAL,
    OK,
    PAGE_FAULT,
    PML_FULL,
    Walk,
)
from kvm_model.vmx.exits import (
    REASON_EPT_MISCONFIG,
    REASON_EPT_VIOLATION,
    REASON_EXCEPTION_NMI,
    REASON_PML_FULL,
)

__all__ = [
    "VECTOR_GP",
    "VECTOR_PF",
    "VECTOR_SS",
    "GuestFault",
    "GuestMemory",
    "GuestNotSupported",
    "MemoryExit",
    "raise_walk_failure",
]

VECTOR_SS, VECTOR_GP, VECTOR_PF = 12, 13, 14
_M64 = (1 << 64) - 1


class GuestNotSupported(Exception):
    """The guest uses a part of the architecture that this CPU does not have."""


class GuestFault(Exception):
    """An exception that the guest is to receive. `error_code` None: it pushes none."""

    def __init__(self, vector: int, error_code: int | None = None, cr2: int | None = None) -> None:
        super().__init__(vector, error_code, cr2)
        self.vector = vector
        self.error_code = error_code
        self.cr2 = cr2


class MemoryExit(Exception):
    """An access that leaves the guest: one of the REASON_EPT_*, REASON_PML_FULL, or REASON_EXCEPTION_NMI for
    a #PF that KVM intercepts, with its `error_code` and `gva` for CR2."""

    def __init__(self, reason: int, qualification: int, gpa: int, gva: int, error_code: int = 0) -> None:
        super().__init__(reason, qualification, gpa, gva, error_code)
        self.reason = reason
        self.qualification = qualification
        self.gpa = gpa
        self.gva = gva
        self.error_code = error_code


def raise_walk_failure(result: Walk, gva: int, *, shadow: bool, stack: bool = False) -> None:
    """Raise what a failed walk means to the guest or to KVM. `gva` is the full address; with `shadow` the
    tables are KVM's and so are their faults."""
    status, hpa, _, a, gpa, level = result
    if status == PAGE_FAULT:
        if shadow:
            raise MemoryExit(REASON_EXCEPTION_NMI, gva & _M64, 0, gva & _M64, a)
        raise GuestFault(VECTOR_PF, a, gva & _M64)
    if status == PML_FULL:
        raise MemoryExit(REASON_PML_FULL, 0, 0, 0)
    if status in (EPT_VIOLATION, EPT_MISCONFIG):
        if not level:  # the walk saw the page's address only
            gpa = gpa & ~0xFFF | gva & 0xFFF
        violation = status == EPT_VIOLATION
        reason = REASON_EPT_VIOLATION if violation else REASON_EPT_MISCONFIG
        raise MemoryExit(reason, a if violation else 0, gpa, gva & _M64)
    if status == NON_CANONICAL:
        raise GuestFault(VECTOR_SS if stack else VECTOR_GP, 0)
    # OUTSIDE_RAM
    raise GuestNotSupported(f"translation of {gva & _M64:#x} leads to {hpa:#x}, outside the host's RAM")


class GuestMemory:
    """Reads and writes by guest virtual address, as one vCPU does them."""

    def __init__(self, fill: Fill) -> None:
        self.fill = fill
        self.ram = fill.ram

    def translate(self, gva: int, access: int, *, stack: bool = False) -> int:
        """The host-physical address. Raises GuestFault or MemoryExit."""
        result = self.fill.walk(gva, access)
        if result[0] != OK:
            raise_walk_failure(result, gva, shadow=self.fill.root != 0, stack=stack)
        return result[1]

    def _pieces(self, gva: int, size: int, access: int, stack: bool) -> list[tuple[int, int]]:
        """(hpa, length) of the one or two pages that the access touches."""
        pieces = []
        while size:
            length = min(size, 4096 - (gva & 0xFFF))
            pieces.append((self.translate(gva, access, stack=stack), length))
            gva = (gva + length) & _M64
            size -= length
        return pieces

    def read_system(self, gva: int, size: int) -> bytes:
        """Read a system data structure: an implicit supervisor access."""
        return self._read(gva, size, ACCESS_READ | ACCESS_IMPLICIT, False)

    def write_system(self, gva: int, data: bytes, *, stack: bool = False) -> None:
        """Write as a supervisor whatever the CPL."""
        self._write(gva, data, ACCESS_WRITE | ACCESS_IMPLICIT, stack)

    def read(self, gva: int, size: int) -> bytes:
        """Read as the program does."""
        return self._read(gva, size, self.fill.access(ACCESS_READ), False)

    def write(self, gva: int, data: bytes) -> None:
        """Write as the program does."""
        self._write(gva, data, self.fill.access(ACCESS_WRITE), False)

    def _read(self, gva: int, size: int, access: int, stack: bool) -> bytes:
        pieces = self._pieces(gva, size, access, stack)
        if len(pieces) == 1:
            return self.ram.read(pieces[0][0], size)
        return b"".join(self.ram.read(hpa, length) for hpa, length in pieces)

    def _write(self, gva: int, data: bytes, access: int, stack: bool) -> None:
        at = 0
        for hpa, length in self._pieces(gva, len(data), access, stack):
            self.ram.write(hpa, data[at : at + length])
            at += length

    def fetch(self, gva: int, size: int) -> bytes:
        """Up to `size` instruction bytes at `gva`: fewer where the next page cannot be fetched."""
        access = self.fill.access(ACCESS_FETCH)
        first = min(size, 4096 - (gva & 0xFFF))
        data = self.ram.read(self.translate(gva, access), first)
        if first < size:
            result = self.fill.walk((gva + first) & _M64, access)
            if result[0] == OK:
                data += self.ram.read(result[1], size - first)
            elif result[0] == PML_FULL:
                # Not for want of a page: the bytes are there once the log is drained.
                raise_walk_failure(result, gva + first, shadow=False)
        return data

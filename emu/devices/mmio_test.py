"""The MMIO test device and the open bus, as emu/abi.py describes them."""

from __future__ import annotations

from emu.abi import (
    MMIO_COUNT,
    MMIO_LAST_ACCESS,
    MMIO_LAST_VALUE,
    MMIO_STORE_SIZE,
    MMIO_TEST_GPA,
    MMIO_TEST_SIZE,
)

__all__ = ["MmioTestDevice"]


class MmioTestDevice:
    """Plain bytes that keep what is stored, and registers that tell of the last access."""

    def __init__(self) -> None:
        self.bytes = bytearray(MMIO_STORE_SIZE)
        self.last_access = 0
        self.last_value = 0
        self.count = 0

    def covers(self, gpa: int) -> bool:
        """Whether the device answers at `gpa`."""
        return MMIO_TEST_GPA <= gpa < MMIO_TEST_GPA + MMIO_TEST_SIZE

    def read(self, gpa: int, size: int) -> int:
        """A load of `size` bytes; all ones where there is no register."""
        offset = gpa - MMIO_TEST_GPA
        if offset + size <= MMIO_STORE_SIZE:
            value = int.from_bytes(self.bytes[offset : offset + size], "little")
            self._note(offset, size, False, value)
            return value
        registers = {
            MMIO_LAST_ACCESS: self.last_access, MMIO_LAST_VALUE: self.last_value, MMIO_COUNT: self.count,
        }
        return registers.get(offset, -1) & ((1 << 8 * size) - 1)

    def write(self, gpa: int, size: int, value: int) -> None:
        """A store of `size` bytes; ignored where there is no register."""
        offset = gpa - MMIO_TEST_GPA
        if offset + size <= MMIO_STORE_SIZE:
            self.bytes[offset : offset + size] = value.to_bytes(size, "little")
            self._note(offset, size, True, value)
        elif offset == MMIO_COUNT:
            self.count = 0

    def _note(self, offset: int, size: int, is_write: bool, value: int) -> None:
        self.last_access = offset | size << 16 | int(is_write) << 24
        self.last_value = value
        self.count += 1

"""The I/O port space: ranges of ports and the devices that answer them.

Not modelled: accesses that span two devices (the device of the first port gets the whole access).
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["Device", "PortBus", "all_ones"]


class Device(Protocol):
    """Something behind ports. `size` is 1, 2 or 4."""

    def read(self, port: int, size: int) -> int:
        """The value that IN sees."""
        ...

    def write(self, port: int, size: int, value: int) -> None:
        """Take what OUT sends."""
        ...


def all_ones(size: int) -> int:
    """What a bus without a driver reads as."""
    return (1 << (8 * size)) - 1


class PortBus:
    """65,536 ports. Ports without a device read all ones and swallow writes."""

    def __init__(self) -> None:
        self._by_port: dict[int, Device] = {}

    def register(self, first: int, last: int, device: Device) -> None:
        """Give ports first..last, inclusive, to `device`. ValueError if one is taken."""
        if not 0 <= first <= last <= 0xFFFF:
            raise ValueError(f"no such ports: {first:#x}..{last:#x}")
        for port in range(first, last + 1):
            if port in self._by_port:
                raise ValueError(f"port {port:#x} is taken")
        for port in range(first, last + 1):
            self._by_port[port] = device

    def read(self, port: int, size: int) -> int:
        """IN of `size` bytes."""
        device = self._by_port.get(port)
        if device is None:
            return all_ones(size)
        return device.read(port, size) & all_ones(size)

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of `size` bytes."""
        device = self._by_port.get(port)
        if device is not None:
            device.write(port, size, value & all_ones(size))

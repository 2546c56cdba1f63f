"""The 8254 timer on logical time: channel 0 interrupts, channel 2 behind port 0x61.

Source: Intel 8254 data sheet; arch/x86/kvm/i8254.c. Ticks are computed from the moment of loading, so
that a periodic interrupt does not drift.

Not modelled: BCD counting, channel 1, gate inputs of channel 0, mode 1 and 5 triggers, the pulse
shapes of the output (an interrupt is one edge).
"""

from __future__ import annotations

from collections.abc import Callable

from emu.abi import PIT_HZ
from host_mm.kernel.sched import Scheduler

__all__ = ["Pit"]

_NS = 1_000_000_000
_PERIODIC = (2, 3)


class _Channel:
    __slots__ = ("access", "latch", "low", "mode", "read_high", "reload", "start", "write_high")

    def __init__(self) -> None:
        self.mode = 3
        self.access = 3
        self.reload = 0x10000
        self.start = 0
        self.latch: int | None = None
        self.low = 0
        self.write_high = self.read_high = False


class Pit:
    """Ports 0x40..0x43 and 0x61. `pulse()` is called at each tick of channel 0."""

    def __init__(self, sched: Scheduler, pulse: Callable[[], None]) -> None:
        self.sched = sched
        self.pulse = pulse
        self.channels = [_Channel() for _ in range(3)]
        self.speaker = 0
        self._generation = 0
        self._ticks = 0

    # -- counting -----------------------------------------------------------------------------

    def _elapsed(self, channel: _Channel) -> int:
        return (self.sched.now - channel.start) * PIT_HZ // _NS

    def _count(self, channel: _Channel) -> int:
        elapsed = self._elapsed(channel)
        if channel.mode in _PERIODIC:
            return (channel.reload - elapsed % channel.reload) & 0xFFFF
        return (channel.reload - elapsed) & 0xFFFF

    def output(self, index: int) -> bool:
        """The level of a channel's OUT pin."""
        channel = self.channels[index]
        elapsed = self._elapsed(channel)
        if channel.mode in _PERIODIC:
            return elapsed % channel.reload < channel.reload // 2
        return elapsed >= channel.reload

    def _load(self, index: int, value: int) -> None:
        channel = self.channels[index]
        channel.reload = value or 0x10000
        channel.start = self.sched.now
        if index == 0:
            self._generation += 1
            self._ticks = 0
            self._arm()

    def _arm(self) -> None:
        channel, generation = self.channels[0], self._generation
        due = channel.start + -(-(self._ticks + 1) * channel.reload * _NS // PIT_HZ)
        self.sched.after(max(due - self.sched.now, 0), lambda: self._tick(generation))

    def _tick(self, generation: int) -> None:
        if generation != self._generation:
            return
        channel = self.channels[0]
        self._ticks += 1
        if channel.mode in _PERIODIC:
            # ticks that a long host operation swallowed are lost, as an edge-triggered line loses them
            self._ticks = max(self._ticks, self._elapsed(channel) // channel.reload)
            self._arm()
        self.pulse()

    # -- ports --------------------------------------------------------------------------------

    def read(self, port: int, size: int) -> int:
        """IN from 0x40..0x43 or 0x61."""
        if port == 0x61:
            refresh = self.sched.now // 15_000 & 1
            return self.speaker & 3 | refresh << 4 | self.output(2) << 5
        if port == 0x43:
            return 0
        channel = self.channels[port - 0x40]
        value = channel.latch if channel.latch is not None else self._count(channel)
        if channel.access == 3 and not channel.read_high:
            channel.read_high = True
            return value & 0xFF
        channel.read_high = False
        channel.latch = None
        return value & 0xFF if channel.access == 1 else value >> 8

    def write(self, port: int, size: int, value: int) -> None:
        """OUT to 0x40..0x43 or 0x61."""
        value &= 0xFF
        if port == 0x61:
            if value & 1 and not self.speaker & 1:
                self.channels[2].start = self.sched.now
            self.speaker = value & 3
        elif port == 0x43:
            self._write_control(value)
        else:
            self._write_count(port - 0x40, value)

    def _write_control(self, value: int) -> None:
        index = value >> 6
        if index == 3:
            return
        channel = self.channels[index]
        channel.read_high = False
        if not value >> 4 & 3:
            if channel.latch is None:
                channel.latch = self._count(channel)
            return
        channel.access = value >> 4 & 3
        mode = value >> 1 & 7
        channel.mode = mode - 4 if mode > 5 else mode
        channel.write_high = False
        channel.latch = None
        if index == 0:
            self._generation += 1

    def _write_count(self, index: int, value: int) -> None:
        channel = self.channels[index]
        if channel.access == 1:
            self._load(index, value)
        elif channel.access == 2:
            self._load(index, value << 8)
        elif channel.write_high:
            channel.write_high = False
            self._load(index, channel.low | value << 8)
        else:
            channel.low = value
            channel.write_high = True

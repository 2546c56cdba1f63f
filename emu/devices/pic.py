"""The pair of 8259A interrupt controllers: vCPU 0's interrupt source.

Source: Intel 8259A data sheet; arch/x86/kvm/i8259.c has the same shape. Edge-triggered inputs, fixed
priority, slave on input 2.

Not modelled: rotating priorities, special mask mode, level-triggered mode (ELCR), poll command,
special fully nested mode.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["PicPair"]

_CASCADE = 2


class _Pic:
    """One 8259A."""

    __slots__ = ("auto_eoi", "base", "icw", "icw4", "imr", "irr", "isr", "lines", "read_isr")

    def __init__(self, base: int) -> None:
        self.base = base
        self.irr = self.isr = self.lines = 0
        self.imr = 0xFF
        self.icw = 0
        self.icw4 = self.auto_eoi = self.read_isr = False

    def set_line(self, line: int, level: bool) -> None:
        """An input's level; a rising edge latches a request, a falling one takes it back."""
        bit = 1 << line
        if level:
            if not self.lines & bit:
                self.irr |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            self.irr &= ~bit

    def highest(self) -> int:
        """The request that would interrupt now, or -1: unmasked and above everything in service."""
        pending = self.irr & ~self.imr
        if not pending:
            return -1
        lowest_bit = pending & -pending
        if self.isr and self.isr & -self.isr <= lowest_bit:
            return -1
        return lowest_bit.bit_length() - 1

    def acknowledge(self, line: int) -> None:
        """INTA for `line`: the request becomes service."""
        self.irr &= ~(1 << line)
        if not self.auto_eoi:
            self.isr |= 1 << line

    def write(self, data_port: bool, value: int) -> None:
        """ICW1..4 and OCW1..3."""
        if not data_port:
            self._write_command(value)
        elif self.icw == 2:
            self.base = value & 0xF8
            self.icw = 3
        elif self.icw == 3:
            self.icw = 4 if self.icw4 else 0
        elif self.icw == 4:
            self.auto_eoi = bool(value & 2)
            self.icw = 0
        else:
            self.imr = value

    def _write_command(self, value: int) -> None:
        if value & 0x10:
            self.irr = self.isr = self.imr = 0
            self.read_isr = self.auto_eoi = False
            self.icw, self.icw4 = 2, bool(value & 1)
        elif value & 8:
            if value & 2:
                self.read_isr = bool(value & 1)
        elif value >> 5 in (1, 5):
            self.isr &= self.isr - 1
        elif value >> 5 in (3, 7):
            self.isr &= ~(1 << (value & 7))

    def read(self, data_port: bool) -> int:
        """IMR, or IRR/ISR as OCW3 chose."""
        if data_port:
            return self.imr
        return self.isr if self.read_isr else self.irr


class PicPair:
    """Master at 0x20, slave at 0xa0. `on_interrupt()` is called when a request becomes deliverable."""

    def __init__(self, on_interrupt: Callable[[], None] | None = None) -> None:
        self.master = _Pic(0x08)
        self.slave = _Pic(0x70)
        self.on_interrupt = on_interrupt

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive input 0..15."""
        if irq >= 8:
            self.slave.set_line(irq - 8, level)
        else:
            self.master.set_line(irq, level)
        self._update()

    def pulse(self, irq: int) -> None:
        """A rising edge that stays requested until acknowledged."""
        pic = self.slave if irq >= 8 else self.master
        pic.irr |= 1 << (irq & 7)
        self._update()

    def _update(self) -> None:
        if self.slave.highest() >= 0:
            self.master.irr |= 1 << _CASCADE
        else:
            self.master.irr &= ~(1 << _CASCADE)
        if self.on_interrupt is not None and self.master.highest() >= 0:
            self.on_interrupt()

    def has_interrupt(self) -> bool:
        """Whether INTR is asserted."""
        return self.master.highest() >= 0

    def ack(self) -> int:
        """INTA: the vector of the highest request, spurious IRQ 7 if it went away."""
        master, slave = self.master, self.slave
        line = master.highest()
        if line < 0:
            return master.base + 7
        master.acknowledge(line)
        if line != _CASCADE:
            return master.base + line
        line = slave.highest()
        if line < 0:
            return slave.base + 7
        slave.acknowledge(line)
        self._update()
        return slave.base + line

    def read(self, port: int, size: int) -> int:
        """IN from 0x20, 0x21, 0xa0, 0xa1."""
        return (self.slave if port & 0x80 else self.master).read(bool(port & 1))

    def write(self, port: int, size: int, value: int) -> None:
        """OUT to 0x20, 0x21, 0xa0, 0xa1."""
        (self.slave if port & 0x80 else self.master).write(bool(port & 1), value & 0xFF)
        self._update()

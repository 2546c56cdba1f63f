"""A 16550 serial port: output to a callback, input from a queue, THR-empty and receive interrupts.

Source: National Semiconductor PC16550D data sheet, table 2; what drivers/tty/serial/8250 probes.
Transmission takes no time: the transmitter is always empty.

    +0 RBR/THR (DLL)  +1 IER (DLM)  +2 IIR/FCR  +3 LCR  +4 MCR  +5 LSR  +6 MSR  +7 SCR

Not modelled: baud rate timing, line errors, break, FIFO depth and trigger levels, modem inputs that change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

__all__ = ["Serial"]

_IER_RDI, _IER_THRI = 1, 2
_LCR_DLAB = 0x80
_MCR_LOOP = 0x10
_LSR_DR, _LSR_THRE_TEMT = 0x01, 0x60
_IIR_NONE, _IIR_THRI, _IIR_RDI, _IIR_FIFO = 1, 2, 4, 0xC0
_MSR_CTS_DSR_DCD = 0xB0


class Serial:
    """The port at `base`. `output(bytes)` gets each byte sent; `set_irq(level)` is its interrupt line."""

    def __init__(
        self, base: int, output: Callable[[bytes], None], set_irq: Callable[[bool], None] | None = None
    ) -> None:
        self.base = base
        self.output = output
        self.set_irq = set_irq
        self.rx: deque[int] = deque()
        self.ier = self.lcr = self.mcr = self.scr = self.fcr = 0
        self.divisor = 12
        self.thr_interrupt = False

    def receive(self, data: bytes) -> None:
        """Bytes that arrive from outside."""
        self.rx.extend(data)
        self._update_irq()

    def _update_irq(self) -> None:
        if self.set_irq is not None:
            pending = (self.ier & _IER_RDI and self.rx) or (self.ier & _IER_THRI and self.thr_interrupt)
            self.set_irq(bool(pending))

    def read(self, port: int, size: int) -> int:
        """IN from a register; wider accesses read it in the low byte and ones above."""
        value = self._read_register(port - self.base)
        return value | (((1 << (8 * size)) - 1) & ~0xFF)

    def _read_register(self, reg: int) -> int:
        if reg == 0:
            if self.lcr & _LCR_DLAB:
                return self.divisor & 0xFF
            value = self.rx.popleft() if self.rx else 0
            self._update_irq()
            return value
        if reg == 1:
            return self.divisor >> 8 if self.lcr & _LCR_DLAB else self.ier
        if reg == 2:
            return self._read_iir()
        if reg == 5:
            return _LSR_THRE_TEMT | (_LSR_DR if self.rx else 0)
        if reg == 6:
            return self._read_msr()
        return (self.lcr, self.mcr, 0, 0, self.scr)[reg - 3]

    def _read_iir(self) -> int:
        fifo = _IIR_FIFO if self.fcr & 1 else 0
        if self.ier & _IER_RDI and self.rx:
            return fifo | _IIR_RDI
        if self.ier & _IER_THRI and self.thr_interrupt:
            self.thr_interrupt = False
            self._update_irq()
            return fifo | _IIR_THRI
        return fifo | _IIR_NONE

    def _read_msr(self) -> int:
        if not self.mcr & _MCR_LOOP:
            return _MSR_CTS_DSR_DCD
        mcr = self.mcr
        return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4

    def write(self, port: int, size: int, value: int) -> None:
        """OUT to a register; only the low byte counts."""
        reg, value = port - self.base, value & 0xFF
        if reg == 0:
            if self.lcr & _LCR_DLAB:
                self.divisor = self.divisor & 0xFF00 | value
            else:
                self._transmit(value)
        elif reg == 1:
            if self.lcr & _LCR_DLAB:
                self.divisor = self.divisor & 0xFF | value << 8
            else:
                # enabling THRI while the transmitter is empty raises it at once
                if value & _IER_THRI and not self.ier & _IER_THRI:
                    self.thr_interrupt = True
                self.ier = value & 0x0F
                self._update_irq()
        elif reg == 2:
            self.fcr = value
            if value & 2:
                self.rx.clear()
        elif reg == 3:
            self.lcr = value
        elif reg == 4:
            self.mcr = value & 0x1F
        elif reg == 7:
            self.scr = value

    def _transmit(self, value: int) -> None:
        if self.mcr & _MCR_LOOP:
            self.rx.append(value)
        else:
            self.output(bytes((value,)))
        self.thr_interrupt = True
        self._update_irq()

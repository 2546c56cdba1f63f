"""A bare machine whose every exception ends at one handler, and what the CPU pushed for it."""

import struct

from kvm_model.vmx import exits
from tests.emu.bare_machine import (
    CODE,
    Machine,
)

H = 0x11000


def machine(**kw):
    m = Machine(**kw)
    for vector in range(32):
        m.gate(vector, H)
    m.put(H, "hlt")
    return m


def frame(m, error=True):
    """(error, rip, cs, rflags, rsp, ss) from the stack at the handler."""
    rsp = m.reg("rsp")
    words = struct.unpack("<6Q", m.ram.read(rsp, 48))
    return words if error else (None, *words[:5])


def fault(m, code, error=True, **regs):
    m.put(CODE, code)
    m.set(**regs)
    e = m.run()
    assert e.reason == exits.REASON_HLT
    assert e.rip == H
    return frame(m, error)

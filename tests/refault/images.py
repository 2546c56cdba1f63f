"""Random images that somebody might feed to a machine: noise, damaged payloads, privileged nonsense."""

from __future__ import annotations

import random
from functools import cache

from emu import abi
from guest_payloads.builder import build

__all__ = ["random_image"]

_PAYLOADS = (
    "first-touch", "guest-memfd", "guest-paging", "idt-swapped", "mmio", "paging-pae",
    "selfmod", "shadow-pt", "slots", "smm", "syscalls", "timer",
)

# Control and debug registers, descriptor tables, MSRs, interrupts, far transfers, strings, ports, SSE, x87.
_OPCODES = tuple(
    bytes.fromhex(code) for line in (
        "0f20 0f22 0f01 0f00 0f30 0f32 cd 48cf cf ea ff f4 fa fb 0f05 0f07 e4 e6 ec ef 6c f36e f3a4 f3ab",
        "0fa2 0fae 0fc7 0f21 0f23 8e cb c8 9d f00fb1 f00fc7 0f01c1 0f01d0 0f0b cc f1 0f34 0f31 0f33 0f38",
        "660f d9 dd 48a3 a1",
    ) for code in line.split()
)
_VMCALLS = tuple(call.nr for call in abi.VMCALLS)
_PLACES = (0xFEB0_0000, 0xFEB1_0000, 0xC000_0080, 0x3F8, 1 << 47, (1 << 64) - 8)


@cache
def _payload(name: str) -> bytes:
    return build(name)


def _value(rng: random.Random) -> int:
    return rng.choice((
        rng.randrange(1 << 22), rng.getrandbits(32), rng.getrandbits(64), rng.choice(_VMCALLS),
        rng.choice(_PLACES),
    ))


def _instructions(rng: random.Random) -> bytes:
    out = bytearray()
    while len(out) < 400:
        if rng.random() < 0.3:
            out += bytes((0x48, 0xB8 + rng.randrange(8))) + _value(rng).to_bytes(8, "little")
        else:
            out += rng.choice(_OPCODES) + rng.randbytes(rng.choice((0, 1, 1, 2, 6)))
    return bytes(out)


def _damaged(rng: random.Random) -> bytes:
    data = bytearray(_payload(rng.choice(_PAYLOADS)))
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(1, len(data))])
    if kind == 1:
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(200)] = rng.choice((0, 0xFF, rng.randrange(256)))
    elif kind == 2:
        for _ in range(rng.choice((1, 4, 64, 512))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    else:
        at = rng.randrange(0x1000, len(data))
        data[at : at + 64] = rng.randbytes(rng.randrange(1, 64))
    return bytes(data)


def random_image(seed: int) -> bytes:
    """The image of that number, never empty."""
    rng = random.Random(seed)
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.choice((1, 2, 16, 64, 512, 4096, 20_000)))
    if kind == 1:
        return b"\x7fELF\x02\x01\x01" + rng.randbytes(rng.randrange(400))
    return _damaged(rng) if kind < 6 else _instructions(rng)

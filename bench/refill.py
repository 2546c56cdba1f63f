"""A TLB miss whose mapping is present, against Unicorn's own page walker."""

from __future__ import annotations

from bench.bare import CODE, DATA, EPT_ROOT, BareCpu
from bench.code import HALT, READ_PAGES
from bench.report import Group, Measure
from bench.timing import best

__all__ = ["GROUP", "refill_and_warm"]

PAGES = 2048


def refill_and_warm(cpu: BareCpu, pages: int = PAGES) -> tuple[float, float]:
    """Nanoseconds a page of a loop of loads: what a miss adds, and warm."""
    cpu.code(READ_PAGES + HALT)

    def loop() -> None:
        cpu.env.set_reg(3, DATA)
        cpu.env.set_reg(1, pages)
        cpu.uc.emu_start(CODE, 0)

    cpu.start(rcx=pages)
    for _ in range(3):
        cpu.flush()
        loop()
    cold = best(loop, cpu.flush)
    warm = best(loop)
    return (cold - warm) / pages * 1e9, warm / pages * 1e9


def measure() -> dict[str, float]:
    """Nanoseconds of a refill by the three walkers, and their ratio."""
    own, _ = refill_and_warm(BareCpu(fill=False))
    ours, _ = refill_and_warm(BareCpu())
    with_ept, _ = refill_and_warm(BareCpu(ept=EPT_ROOT << 12 | 0x5E))
    return {
        "refill": ours / own, "refill_ept": with_ept / own,
        "refill_unicorn_ns": own, "refill_ns": ours, "refill_ept_ns": with_ept,
    }


GROUP = Group(
    "refill",
    (
        Measure("refill", "", "a miss walked in one dimension / the same by Unicorn's walker (UC_TLB_CPU)"),
        Measure("refill_ept", "", "a miss walked in two dimensions / Unicorn's walker, which knows only one"),
        Measure("refill_unicorn_ns", "ns", "a miss by Unicorn's walker"),
        Measure("refill_ns", "ns", "a miss by the compiled fill, no EPT"),
        Measure("refill_ept_ns", "ns", "a miss by the compiled fill, through EPT"),
    ),
    measure,
)

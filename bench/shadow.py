"""What a guest costs whose tables KVM shadows, against the same guest under EPT."""

from __future__ import annotations

from bench.bare import BareCpu
from bench.faults import resident_refault
from bench.lab import Lab
from bench.refill import refill_and_warm
from bench.report import Group, Measure
from bench.timing import best

__all__ = ["GROUP"]

PAGES = 512


def _refill() -> float:
    """A miss walked from a shadow root / in one dimension of the guest's own."""
    own, _ = refill_and_warm(BareCpu())
    cpu = BareCpu()
    assert cpu.fill is not None
    cpu.fill.set_root(0x1000, False)
    shadow, _ = refill_and_warm(cpu)
    return shadow / own


def measure() -> dict[str, float]:
    """Microseconds and ratios."""
    with Lab() as lab:
        ept = resident_refault(lab)
    with Lab(mmu="shadow") as lab:
        shadow = resident_refault(lab)
        lab.read_pages(PAGES)
        invlpg = best(lambda: lab.run("invlpg", PAGES)) / PAGES * 1e6
    return {
        "shadow_refault": shadow, "shadow_refault_ratio": shadow / ept, "shadow_invlpg": invlpg,
        "shadow_refill": _refill(),
    }


GROUP = Group(
    "shadow",
    (
        Measure("shadow_refault", "us", "a page whose frame is there, after a zap, neighbours mapped along"),
        Measure("shadow_refault_ratio", "", "the same / under EPT, where each page faults by itself"),
        Measure("shadow_invlpg", "us", "INVLPG: an exit"),
        Measure("shadow_refill", "", "a miss walked from a shadow root / from the guest's own"),
    ),
    measure,
)

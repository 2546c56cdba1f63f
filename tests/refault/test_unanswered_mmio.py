"""What a guest access after an MMIO exit finds that nobody completed: recorded on a real Linux 6.18."""

from __future__ import annotations

from refault.scenarios.api import Scenario
from refault.scenarios.emulator import run_on_emulator

HOLE = 0x200_0000


def lines(scenario: object) -> list[str]:
    return run_on_emulator(scenario).recording().lines  # type: ignore[arg-type]


def test_a_load_ends_with_what_kvm_run_holds_and_its_register_is_forgotten() -> None:
    def scenario(s: Scenario) -> None:
        s.ld(HOLE)
        s.ld(0x3000)
        s.ld(0x3000)

    found = lines(scenario)
    assert found[5:8] == [
        ">> guest ld D+0x3000", "kvm_mmio: mmio read len 8 gpa 0x12000000 val 0x1000",
        "<< guest ld D+0x3000 : 0",
    ]
    assert "walk addr 10003000 pferr 4 U" in found[8:]


def test_a_store_is_over_and_the_next_access_is_made() -> None:
    def scenario(s: Scenario) -> None:
        s.st(HOLE, 5)
        s.st(0x3000, 7)
        s.hr(0x3000)

    assert lines(scenario)[-1] == "<< host read D+0x3000: 7"


def test_a_load_after_a_store_finds_the_stores_bytes() -> None:
    def scenario(s: Scenario) -> None:
        s.st(HOLE, 0x55)
        s.ld(HOLE)
        s.ld(HOLE)

    assert "kvm_mmio: mmio read len 8 gpa 0x12000000 val 0x55" in lines(scenario)

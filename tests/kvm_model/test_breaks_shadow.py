"""Every switch of shadow paging breaks a truth, and without the switch the same steps break none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_FREE, MADV_PAGEOUT
from tests.kvm_model.shadow_machine import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    DATA_GPA,
    DATA_HVA,
    PAGE,
    PD_GPA,
    PDPT_GPA,
    PML4_GPA,
    PT_GPA,
    RW,
    USER_4K,
    A,
    D,
    P,
    ShadowMachine,
    U,
)

GVA = DATA_GPA + 3 * PAGE
PTE = PT_GPA + 8 * 3
PDE = PD_GPA + 8 * (DATA_GPA >> 21)
FLUSH = ("cr3", PML4_GPA)
WP_ON, WP_OFF = CR0_PG | CR0_WP | CR0_PE, CR0_PG | CR0_PE
Scene = Callable[[ShadowMachine], None]


def sweep(m: ShadowMachine) -> None:
    assert m.truths is not None
    m.do(m.truths.check)
    m.truths.sweep()


def edit_and_flush(m: ShadowMachine) -> None:
    m.run(("w", GVA, 4), ("r", DATA_GPA), ("w", PTE, DATA_GPA | USER_4K), FLUSH, ("r", DATA_GPA))
    sweep(m)


def edit_and_invlpg(m: ShadowMachine) -> None:
    m.run(("w", GVA, 4), ("w", PTE, DATA_GPA | USER_4K), ("invlpg", GVA), ("r", GVA))
    sweep(m)


def two_ways_to_one_table(m: ShadowMachine) -> None:
    """A directory reached by an entry that lets write and by one that does not, and tables of both kinds."""
    m.host_write(PML4_GPA + 8, PDPT_GPA | P | U | A)
    m.host_write(PDE, PT_GPA | P | U | A)
    other = (1 << 39) + DATA_GPA
    # A read-only table below the writable way comes first, then a writable one below the other way.
    m.run(("r", GVA), ("r", other), ("w", GVA + (2 << 20), 1), ("r", other + (2 << 20)))
    sweep(m)


def relink_after_a_flush(m: ShadowMachine) -> None:
    m.run(("w", GVA, 4), ("w", PTE, DATA_GPA | USER_4K), ("w", PDE, 0), FLUSH, ("r", GVA))
    m.run(("w", PDE, PT_GPA | P | RW | U), ("r", DATA_GPA), ("r", GVA))


def alias_with_fewer_rights(m: ShadowMachine) -> None:
    m.host_write(PDE + 8 * 16, PT_GPA | P | U | A)
    m.run(("w", GVA, 4), ("r", GVA + (32 << 20)))
    sweep(m)


def wp_goes_on_again(m: ShadowMachine) -> None:
    m.host_write(PTE, GVA | P | U | A | D)
    m.run(("cpl", 0), ("cr0", WP_OFF), ("w", GVA, 7), ("cr0", WP_ON), ("w", GVA, 8))
    sweep(m)


def entry_changes_under_the_fault(m: ShadowMachine) -> None:
    """Another vCPU writes the table between the walk and the lock, when nobody shadows it yet."""
    raced: list[int] = []
    truths = m.truths
    assert truths is not None

    def race(kind: str) -> None:
        truths.on_point(kind)
        if kind == "lock" and not raced and m.names().count("gup_answer") > mark:
            raced.append(1)
            m.put(PTE, DATA_GPA | USER_4K)

    m.run(("x", 0x1000))
    mark = m.names().count("gup_answer")
    m.sched.set_on_point(race)
    m.run(("r", GVA))
    assert raced
    sweep(m)


def from_memory_to_none_without_a_flush(m: ShadowMachine) -> None:
    m.host_write(PTE, GVA | P | U | A | D)
    m.run(("r", GVA), ("w", PTE, 0x9000_0000 | USER_4K), ("w", GVA, 1))
    sweep(m)


def reclaim_what_a_sync_made_read_only(m: ShadowMachine) -> None:
    def pageout() -> None:
        m.madvise(GVA, PAGE, MADV_PAGEOUT)
        m.do(lambda: m.sched.sleep(10_000_000))

    # Lazily freed, the page is writable and clean for the host, and so KVM's to tell of.
    m.run(("w", GVA, 1))
    m.madvise(GVA, PAGE, MADV_FREE)
    # The read fault maps the page writable; the store takes no fault, and the guest takes its right away.
    m.run(("r", GVA), ("w", GVA, 2), ("w", PTE, GVA | P | U | A | D), FLUSH, ("r", GVA))
    pageout()
    assert m.run(("r", GVA)) == [2]


def write_beside_a_read_in_a_log(m: ShadowMachine) -> None:
    m.do(lambda: m.kvm.set_user_memory_region(1, DATA_GPA, m.data, DATA_HVA, 1))
    m.run(("w", GVA, 1))
    sweep(m)


def guest_huge(breaks: tuple[str, ...]) -> ShadowMachine:
    m = ShadowMachine(breaks=breaks, nohuge=False, guest_huge=True)
    m.host.thp.enabled = "always"
    return m


SCENES: dict[str, tuple[Scene, str]] = {
    "huge-in-log": (write_beside_a_read_in_a_log, "write-logged"),
    "ignore-role-access": (alias_with_fewer_rights, "shadow-agrees"),
    "ignore-role-wp": (wp_goes_on_again, "shadow-agrees"),
    "link-unsynced": (relink_after_a_flush, "shadow-flush"),
    "mmio-over-leaf": (from_memory_to_none_without_a_flush, "no-mmio-over-slot"),
    "no-dirty-on-sync": (reclaim_what_a_sync_made_read_only, "spte-dirty-kept"),
    "no-gpte-recheck": (entry_changes_under_the_fault, "shadow-agrees"),
    "no-invlpg-sync": (edit_and_invlpg, "shadow-flush"),
    "no-mark-parents": (edit_and_flush, "shadow-flush"),
    "no-root-sync": (edit_and_flush, "shadow-flush"),
    "no-table-protect": (edit_and_flush, "shadow-protected"),
    "no-track-write": (relink_after_a_flush, "shadow-agrees"),
    "one-pt-access": (two_ways_to_one_table, "shadow-agrees"),
    "unsync-after-store": (edit_and_flush, "shadow-protected"),
}


def machine(name: str, breaks: tuple[str, ...]) -> ShadowMachine:
    if name == "huge-in-log":
        return guest_huge(breaks)
    profile = "linux-5.10" if name == "no-dirty-on-sync" else "linux-6.18"
    m = ShadowMachine(breaks=breaks, profile=profile)
    m.host_write(DATA_GPA, 1)
    if name == "no-table-protect":
        # The guest's tables are mapped before they are used as such.
        m.run(("w", 0x5000, 1), ("w", PT_GPA + 8 * 500, 0))
    return m


@pytest.mark.parametrize("name", sorted(SCENES))
def test_a_switch_of_shadow_paging_breaks_its_truth(name: str) -> None:
    scene, truth = SCENES[name]
    with pytest.raises(BrokenTruth) as info:
        scene(machine(name, (name,)))
    assert info.value.truth == truth


@pytest.mark.parametrize("name", sorted(SCENES))
def test_without_it_the_same_steps_break_none(name: str) -> None:
    scene, _ = SCENES[name]
    scene(machine(name, ()))

"""Page-modification logging: what the CPU logged is in the dirty log, D bits instead of protection."""

from __future__ import annotations

import pytest

from host_mm.kernel.errors import BrokenTruth
from kvm_model.vmx.ept import PML_ENTRIES
from kvm_model.vmx.pml import pml_entries
from tests.kvm_model.machine import BASE, PAGE, Machine

D, W = 1 << 9, 1 << 1


def pml_machine(**options: object) -> Machine:
    return Machine(**{"params": {"kvm_intel.pml": "1"}, **options})  # type: ignore[arg-type]


def log(m: Machine, on: bool = True) -> None:
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, m.pages * PAGE, BASE, int(on)))


def get(m: Machine) -> set[int]:
    bits = int.from_bytes(m.do(lambda: m.kvm.get_dirty_log(0)), "little")
    return {n for n in range(m.pages) if bits >> n & 1}


def test_enabling_clears_dirty_and_keeps_pages_writable() -> None:
    m = pml_machine()
    m.run(("w", 0, 1))
    assert m.leaf(0) & D
    log(m)
    assert m.leaf(0) & (D | W) == W
    assert get(m) == set()


def test_a_write_is_logged_by_the_cpu_without_a_fault() -> None:
    m = pml_machine()
    m.run(("w", 0, 1), ("w", PAGE, 1))
    log(m)
    faults = m.vcpus[0].stat["pf_taken"]
    m.run(("w", 0, 2), ("r", PAGE), ("w", 8, 3))
    assert m.vcpus[0].stat["pf_taken"] == faults
    assert get(m) == {0}
    assert get(m) == set()
    m.run(("w", 0, 4))
    assert get(m) == {0}


def test_a_full_log_leaves_the_guest_before_the_write_which_is_made_again() -> None:
    pages = PML_ENTRIES + 3
    m = pml_machine(pages=pages, ram=32 << 20)
    m.run(*(("w", n * PAGE, 1) for n in range(pages)))
    log(m)
    m.run(*(("w", n * PAGE, 2) for n in range(pages)))
    assert m.names().count("kvm_pml_full") == 1
    assert get(m) == set(range(pages))
    assert m.run(("r", (pages - 1) * PAGE)) == [2]


def test_the_log_is_drained_at_every_exit_in_the_order_of_the_writes() -> None:
    m = pml_machine()
    m.run(*(("w", n * PAGE, 1) for n in range(4)))
    log(m)
    seen: list[list[int]] = []
    m.run(
        ("w", 3 * PAGE, 2), ("w", PAGE, 2), ("call", lambda: seen.append(list(pml_entries(m.vcpus[0])))),
    )
    assert seen == [[3, 1]]
    assert list(pml_entries(m.vcpus[0])) == []


def test_reading_the_log_gets_running_vcpus_out_first() -> None:
    m = pml_machine()
    m.run(("w", 0, 1))
    log(m)
    got: list[set[int]] = []
    m.run(("w", 0, 2), ("call", lambda: got.append(get(m))), ("w", 0, 3))
    got.append(get(m))
    # Nothing was drained when the log was read, so nothing was cleared and flushed: it was the kick.
    assert got == [set(), {0}]
    assert 1 in [e.args["exit_reason"] for e in m.events if e.name == "kvm_exit"]


def test_the_ring_is_filled_from_the_cpus_log() -> None:
    m = pml_machine(dirty_ring=1024)
    m.run(*(("w", n * PAGE, 1) for n in range(4)))
    log(m)
    m.run(("w", 3 * PAGE, 2), ("w", PAGE, 2))
    ring = m.vcpus[0].dirty_ring
    assert ring is not None
    assert [ring.read(n)[2] for n in range(2)] == [3, 1]


def test_the_cpus_log_is_on_while_any_slot_is_logged() -> None:
    m = pml_machine(pages=32)
    m.run(("w", 0, 1))
    assert not m.cpu.vmcs[0]
    log(m)
    m.run(("r", 0))
    assert m.cpu.vmcs[0] == m.vcpus[0].vmcs << 12
    log(m, on=False)
    m.run(("r", 0))
    assert not m.cpu.vmcs[0]
    assert m.kvm.nr_memslots_dirty_logging == 0


def test_a_deleted_logged_slot_turns_the_log_off() -> None:
    m = pml_machine()
    log(m)
    m.run(("r", 0))
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 0, 0))
    assert m.kvm.nr_memslots_dirty_logging == 0


def test_without_dirty_bits_there_is_no_pml() -> None:
    m = Machine(params={"kvm_intel.pml": "1", "kvm_intel.eptad": "0"})
    assert not m.kvm.cpu_dirty_log_size
    assert m.vcpus[0].pml_pg < 0
    m.run(("w", 0, 1))
    log(m)
    assert not m.leaf(0) & W


def test_initially_all_set_keeps_dirty_bits_until_the_first_clear() -> None:
    m = pml_machine()
    m.kvm.enable_manual_dirty_log(init_set=True)
    m.run(("w", 0, 1))
    log(m)
    assert m.leaf(0) & D
    assert get(m) == set(range(64))
    m.do(lambda: m.kvm.clear_dirty_log(0, 0, b"\xff" * 8))
    assert m.leaf(0) & (D | W) == W
    assert get(m) == set()


def test_a_dirty_spte_without_its_bit_breaks_a_truth_and_one_in_the_cpus_log_does_not() -> None:
    m = pml_machine()
    m.run(("w", 3 * PAGE, 1))
    log(m)
    sweeps: list[int] = []
    m.run(("w", 3 * PAGE, 2), ("call", lambda: sweeps.append(m.truths.sweep())))
    assert sweeps == [1]
    bitmap = m.kvm.slots().id_hash[0].dirty_bitmap
    assert bitmap is not None
    bitmap[0] = 0
    with pytest.raises(BrokenTruth, match="write-logged: gfn 0x3 "):
        m.truths.sweep()


def test_a_destroyed_vm_gives_its_logs_back() -> None:
    m = pml_machine()
    frames = [m.vcpus[0].vmcs, m.vcpus[0].pml_pg]
    assert set(frames) <= set(m.kvm._table_frames())
    m.do(m.kvm.destroy)
    assert not any(m.host.pages.refcount[pfn] for pfn in frames)

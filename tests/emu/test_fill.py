"""Fills on a live Unicorn: what they grant, what they refuse, what they remember."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from unicorn import UcError

from bench.bare import CODE, DATA, EPT_ROOT, FLAGS, FRAMES
from bench.bare import BareCpu as Machine
from bench.refill import refill_and_warm
from emu.cpu import env as E
from emu.cpu import paging as P
from emu.cpu.fill_body import CODE_WRITE, FRAME_CODE, FRAME_DATA, FRAME_MIXED, NEW_CODE
from emu.cpu.walk import ACCESS_USER, EPT_VIOLATION, NON_CANONICAL, OUTSIDE_RAM, PAGE_FAULT

LOAD, STORE, ADD, HLT = b"\x48\x8b\x03\xf4", b"\x48\x89\x03\xf4", b"\x48\x01\x03\xf4", b"\xf4"


@pytest.fixture(params=[False, True], ids=["compiled", "interpreted"])
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(interpreted=request.param)


def test_a_load_and_a_store_reach_ram(machine: Machine) -> None:
    machine.code(LOAD)
    machine.ram.u64[DATA >> 3] = 77
    assert machine.start()
    assert machine.env.reg(0) == 77
    machine.code(STORE, CODE + 0x1000)
    assert machine.start(CODE + 0x1000, rax=78)
    assert machine.ram.u64[DATA >> 3] == 78


def test_a_read_fill_grants_no_write_before_dirty_is_set(machine: Machine) -> None:
    machine.code(LOAD[:3] + STORE)
    assert machine.start()
    flags = machine.ram.u64[machine.pte(DATA)] & 0xFF
    assert flags == FLAGS | P.PTE_ACCESSED | P.PTE_DIRTY
    machine.ram.u64[machine.pte(DATA + 0x1000)] &= ~P.PTE_RW
    assert not machine.start(rbx=DATA + 0x1000)
    assert machine.status() == PAGE_FAULT
    assert machine.ram.u64[machine.pte(DATA + 0x1000)] & 0xFF == P.PTE_PRESENT | P.PTE_USER | P.PTE_ACCESSED


def test_a_refused_fill_tells_fault_and_full_address_with_rip_at_the_instruction(machine: Machine) -> None:
    machine.code(b"\x48\xff\xc1" + LOAD)  # inc rcx
    machine.ram.u64[machine.pte(DATA)] = 0
    assert not machine.start(rbx=DATA + 0x128)
    last = machine.fill.last()
    assert (last.status, last.page, last.a) == (PAGE_FAULT, DATA, 0)
    assert machine.env.invalid_addr == DATA + 0x128
    assert (machine.env.eip, machine.env.reg(1)) == (CODE + 3, 1)


def test_user_mode_comes_from_the_cpl(machine: Machine) -> None:
    machine.code(LOAD)
    machine.ram.u64[machine.pte(DATA)] &= ~P.PTE_USER
    machine.env.hflags |= 3
    assert not machine.start()
    last = machine.fill.last()
    assert (last.status, last.access, last.a) == (PAGE_FAULT, ACCESS_USER, P.PFERR_PRESENT | P.PFERR_USER)


def test_non_canonical_addresses_reach_the_fill(machine: Machine) -> None:
    machine.code(LOAD)
    assert not machine.start(rbx=1 << 50)
    assert machine.status() == NON_CANONICAL
    assert not machine.start(rbx=0xFFFF_7FFF_FFFF_F000)
    assert machine.status() == NON_CANONICAL


def test_kernel_half_addresses_are_translated(machine: Machine) -> None:
    machine.ram.u64[(0x1000 >> 3) + 511] = 0x2000 | FLAGS
    machine.code(LOAD)
    machine.ram.u64[DATA >> 3] = 5
    assert machine.start(0xFFFF_FF80_0000_0000 | CODE, rbx=0xFFFF_FF80_0000_0000 | DATA)
    assert machine.env.reg(0) == 5


def test_an_ept_violation_is_refused_with_its_qualification() -> None:
    machine = Machine(ept=EPT_ROOT << 12 | 0x5E)
    machine.code(STORE)
    slot = (EPT_ROOT + 3) * 512 + (DATA >> 12)
    machine.ram.u64[slot] = DATA | 0x335
    assert not machine.start()
    last = machine.fill.last()
    assert (last.status, last.a, last.b) == (EPT_VIOLATION, 0x182 | 5 << 3, DATA)


def test_new_code_stops_before_it_runs_and_only_once_a_page(machine: Machine) -> None:
    machine.code(b"\x48\xff\xc1" + HLT)
    with pytest.raises(UcError):
        machine.uc.emu_start(CODE, 0)
    assert machine.status() == NEW_CODE
    assert machine.env.reg(1) == 0
    assert machine.start()
    assert machine.ram.fetched[CODE >> 12] == FRAME_CODE
    machine.fill.flush()
    machine.uc.emu_start(CODE, 0)


def test_a_store_to_a_frame_with_code_leaves_the_cpu(machine: Machine) -> None:
    machine.code(STORE)
    assert machine.start(rbx=DATA)
    alias = DATA + 0x5000
    machine.ram.u64[machine.pte(alias)] = CODE | FLAGS | P.PTE_DIRTY
    machine.fill.flush()
    for target in (CODE + 0x800, alias):
        assert not machine.start(rbx=target)
        assert machine.status() == CODE_WRITE


def test_reading_a_frame_with_code_never_brings_the_right_to_write(machine: Machine) -> None:
    machine.code(LOAD[:3] + STORE)
    machine.ram.u64[machine.pte(CODE)] |= P.PTE_DIRTY | P.PTE_ACCESSED
    assert not machine.start(rbx=CODE + 0x100)
    assert machine.status() == CODE_WRITE


def run_as_the_machine_would(machine: Machine, gva: int) -> None:
    """Run to HLT; a store to a frame with code makes it data, and its translations are dropped."""
    fill = machine.fill
    for _ in range(20):
        try:
            machine.uc.emu_start(gva, 0)
            return
        except UcError:
            last = fill.last()
            pfn = last.hpa >> 12
            if last.status == NEW_CODE:
                if fill.may_write(pfn):
                    fill.flush()
                fill.mark_code(last.page, pfn)
            elif last.status == CODE_WRITE:
                for page in fill.forget_code(pfn):
                    machine.uc.ctl_remove_cache(page, page + 0x1000)
                fill.flush()
                machine.ram.fetched[pfn] = FRAME_DATA
            else:
                raise
            gva = machine.env.eip
    raise AssertionError("no progress")


@pytest.mark.parametrize("alias", [False, True])
def test_code_that_is_written_between_two_runs_runs_as_written(machine: Machine, alias: bool) -> None:
    code = CODE + 0x1000
    target = code
    if alias:
        target = DATA + 0x5000
        machine.ram.u64[machine.pte(target)] = code | FLAGS | P.PTE_DIRTY
    machine.code(b"\xb9\x05\x00\x00\x00\xf4", code)  # mov ecx, 5; hlt
    machine.code(b"\x01\x03\xff\xe2")  # add [rbx], eax; jmp rdx
    machine.env.set_reg(2, code)
    for n in range(5):
        machine.env.set_reg(0, 1)
        machine.env.set_reg(3, target + 1)
        run_as_the_machine_would(machine, CODE)
        assert machine.env.reg(1) == 6 + n


def test_a_mixed_frame_takes_stores_through_its_code_page_and_stays_coherent(machine: Machine) -> None:
    machine.code(b"\x01\x03\xeb\x00\xb9\x05\x00\x00\x00\xf4")
    machine.fill.mark_code(CODE, CODE >> 12)
    machine.ram.fetched[CODE >> 12] = FRAME_MIXED
    for n in range(3):
        assert machine.start(rax=1, rbx=CODE + 5)
        assert machine.env.reg(1) == 6 + n
    alias = DATA + 0x5000
    machine.ram.u64[machine.pte(alias)] = CODE | FLAGS | P.PTE_DIRTY
    assert not machine.start(rax=1, rbx=alias + 5)
    assert machine.status() == CODE_WRITE


def test_fills_are_remembered_by_epoch(machine: Machine) -> None:
    fill = machine.fill
    machine.code(STORE)
    assert not fill.may_reach(DATA >> 12)
    assert machine.start()
    assert fill.may_reach(DATA >> 12)
    assert fill.may_write(DATA >> 12)
    assert fill.may_reach(CODE >> 12)
    assert not fill.may_write(CODE >> 12)
    fill.flush()
    assert not fill.may_reach(DATA >> 12)
    machine.code(LOAD, CODE + 0x1000)
    machine.ram.u64[machine.pte(DATA)] &= ~P.PTE_RW
    assert machine.start(CODE + 0x1000)
    assert fill.may_reach(DATA >> 12)
    assert not fill.may_write(DATA >> 12)


def test_a_stale_translation_is_really_used_until_flushed(machine: Machine) -> None:
    machine.code(LOAD)
    machine.ram.u64[DATA >> 3] = 1
    machine.ram.u64[(DATA >> 3) + 512] = 2
    assert machine.start()
    machine.ram.u64[machine.pte(DATA)] = DATA + 0x1000 | FLAGS
    assert machine.start()
    assert machine.env.reg(0) == 1
    machine.fill.flush()
    assert machine.start()
    assert machine.env.reg(0) == 2


def test_segment_loads_at_cpl_3_may_read_descriptor_tables_of_the_kernel(machine: Machine) -> None:
    machine.code(b"\x8e\xdb" + HLT)  # mov ds, ebx
    machine.env.set_table(E.GDT, 0, DATA, 0x3F, 0)
    machine.ram.u64[(DATA >> 3) + 2] = 0x00CF_F300_0000_FFFF
    machine.ram.u64[machine.pte(DATA)] &= ~P.PTE_USER
    machine.env.hflags |= 3
    machine.env.set_seg(E.R_CS, 0x33, 0, 0xFFFFFFFF, 0xAFFB00)
    machine.env.set_seg(E.R_SS, 0x2B, 0, 0xFFFFFFFF, 0xCFF300)
    assert not machine.start(rbx=0x13)
    last = machine.fill.last()
    assert (last.status, last.descriptor) == (PAGE_FAULT, True)
    machine.fill.implicit_page = DATA
    machine.start(machine.env.eip, rbx=0x13)
    assert machine.env.seg(E.R_DS)[0] == 0x13
    machine.fill.implicit_page = None
    machine.fill.flush()
    machine.code(LOAD, CODE + 0x1000)
    assert not machine.start(CODE + 0x1000)
    assert machine.status() == PAGE_FAULT


def test_hostile_guest_tables_end_in_a_refusal(machine: Machine) -> None:
    machine.code(LOAD)
    assert machine.start()
    for frame in (FRAMES, 1 << 24, (1 << 34) - 1):
        machine.ram.u64[machine.pte(DATA)] = frame << 12 | FLAGS
        machine.fill.flush()
        assert not machine.start()
        assert (machine.status(), machine.fill.last().hpa >> 12) == (OUTSIDE_RAM, frame)
    machine.ram.u64[(0x3000 >> 3) + (DATA >> 21)] = FRAMES << 12 | FLAGS
    machine.fill.flush()
    assert not machine.start()
    assert machine.status() == OUTSIDE_RAM


def test_an_error_in_the_interpreted_hook_refuses_and_is_kept() -> None:
    machine = Machine(interpreted=True)
    machine.code(LOAD)
    assert machine.start()
    machine.fill.write_epoch = machine.fill.write_epoch[:1]
    machine.fill.flush()
    machine.ram.u64[machine.pte(DATA)] |= P.PTE_DIRTY
    with pytest.raises(UcError):
        machine.uc.emu_start(CODE, 0)
    assert isinstance(machine.fill.error, IndexError)


def test_walks_of_the_emulator_use_the_registers_of_the_vcpu(machine: Machine) -> None:
    fill = machine.fill
    assert fill.walk(DATA + 8, fill.access(0))[:2] == (0, DATA + 8)
    machine.env.hflags |= 3
    assert fill.access(2) == 2 | ACCESS_USER
    machine.ram.u64[machine.pte(DATA)] &= ~P.PTE_USER
    assert fill.walk(DATA, fill.access(2))[3] == 7
    assert fill.walk(DATA, fill.access(0, implicit=True))[0] == 0
    assert fill.walk(1 << 63, 0)[0] == NON_CANONICAL


def test_a_refill_is_compiled_and_a_warm_access_never_leaves_unicorn(record_property: Callable) -> None:
    # Orders of magnitude only, for the machine may be busy: bench/targets.toml holds the exact ratio.
    # An interpreted fill costs a hundred times Unicorn's own walk.
    own, own_warm = refill_and_warm(Machine(fill=False))
    ours, ours_warm = refill_and_warm(Machine())
    with_ept, with_ept_warm = refill_and_warm(Machine(ept=EPT_ROOT << 12 | 0x5E))
    record_property("refill", f"{own:.0f}, {ours:.0f}, {with_ept:.0f} ns")
    assert max(ours, with_ept) <= 10 * own
    assert max(ours_warm, with_ept_warm) <= 5 * own_warm + 10

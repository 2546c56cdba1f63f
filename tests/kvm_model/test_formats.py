"""Every kvm and kvmmmu event has the fields and the line of Linux 6.18's format file."""

from __future__ import annotations

import pytest

from kvm_model.kvm_main import TRACEPOINTS
from tests.kvm_model.machine import Machine

# Event: (fields in the format file's order, values, the line its `print fmt` makes of them).
CASES: dict[str, tuple[str, tuple[object, ...], str]] = {
    "kvm:kvm_age_hva": (
        "start end", (0x7F0000000000, 0x7F0000001000),
        "mmu notifier age hva: 0x007f0000000000 -- 0x007f0000001000",
    ),
    "kvm:kvm_unmap_hva_range": (
        "start end", (0, 0xFFFF_FFFF_FFFF_FFFF),
        "mmu notifier unmap range: 0x00000000000000 -- 0xffffffffffffffff",
    ),
    "kvm:kvm_age_page": (
        "hva gfn level referenced", (0x7F0000001000, 1, 2, False),
        "hva 7f0000001000 gfn 1 level 2 OLD",
    ),
    "kvm:kvm_test_age_hva": ("hva", (0x1000,), "mmu notifier test age hva: 0x00000000001000"),
    "kvm:kvm_entry": (
        "vcpu_id rip immediate_exit intr_info error_code", (1, 0x1000, True, 0x80000020, 0),
        "vcpu 1, rip 0x1000 intr_info 0x80000020 error_code 0x00000000[immediate exit]",
    ),
    "kvm:kvm_exit": (
        "exit_reason guest_rip isa info1 info2 intr_info error_code vcpu_id requests",
        (48, 0x1000, 1, 0x181, 0, 0, 0, 2, 1),
        "vcpu 2 reason EPT_VIOLATION rip 0x1000 info1 0x0000000000000181 info2 0x0000000000000000 "
        "intr_info 0x00000000 error_code 0x00000000 requests 0x0000000000000001",
    ),
    "kvm:kvm_page_fault": (
        "vcpu_id guest_rip fault_address error_code", (0, 0x1000, 0x3000, 0x181),
        "vcpu 0 rip 0x1000 address 0x0000000000003000 error_code 0x181",
    ),
    "kvm:kvm_userspace_exit": ("reason errno", (2, 0), "reason KVM_EXIT_IO (2)"),
    "kvm:kvm_inj_exception": (
        "exception has_error error_code reinjected", (13, True, 0, True), "#GP (0x0) [reinjected]",
    ),
    "kvm:kvm_inj_virq": ("vector soft reinjected", (0x20, False, False), "IRQ 0x20"),
    "kvm:kvm_mmio": ("type len gpa val", (0, 4, 0x1000, 0), "mmio unsatisfied-read len 4 gpa 0x1000 val 0x0"),
    "kvm:kvm_pio": (
        "rw port size count val", (1, 0x3F8, 1, 1, 0x41), "pio_write at 0x3f8 size 1 count 1 val 0x41 ",
    ),
    "kvm:kvm_hypercall": ("nr a0 a1 a2 a3", (1, 2, 3, 4, 5), "nr 0x1 a0 0x2 a1 0x3 a2 0x4 a3 0x5"),
    "kvm:kvm_apic": ("rw reg val", (1, 0x80, 0x20), "apic_write APIC_TASKPRI = 0x20"),
    "kvm:kvm_smm_transition": (
        "vcpu_id smbase entering", (1, 0x30000, True), "vcpu 1: entering SMM, smbase 0x30000"
    ),
    "kvm:kvm_pvclock_update": (
        "vcpu_id version tsc_timestamp system_time tsc_to_system_mul tsc_shift flags",
        (1, 4, 0x10, 0x20, 1 << 31, -1, 2),
        "vcpu_id 1, pvclock { version 4, tsc_timestamp 0x10, system_time 0x20, "
        "tsc_to_system_mul 0x80000000, tsc_shift -1, flags 0x2 }",
    ),
    "kvm:kvm_msr": ("write ecx data exception", (1, 0x10, 5, True), "msr_write 10 = 0x5 (#GP)"),
    "kvm:kvm_cr": ("rw cr val", (1, 3, 0x1000), "cr_write 3 = 0x1000"),
    "kvm:kvm_cpuid": (
        "function index rax rbx rcx rdx found used_max_basic", (1, 0, 2, 3, 4, 5, True, False),
        "func 1 idx 0 rax 2 rbx 3 rcx 4 rdx 5, cpuid entry found",
    ),
    "kvm:kvm_emulate_insn": (
        "rip csbase len insn flags failed", (0x1000, 0, 2, "89 07", 5, True), "0:1000:89 07 (prot32) failed",
    ),
    "kvm:vcpu_match_mmio": ("gva gpa write gpa_match", (1, 2, True, True), "gva 0x1 gpa 0x2 Write GPA"),
    "kvm:kvm_vcpu_wakeup": ("ns waited valid", (5, True, True), "wait time 5 ns, polling valid"),
    "kvm:kvm_dirty_ring_push": (
        "index dirty_index reset_index slot offset", (0, 3, 2, 1, 0x1F),
        "ring 0: dirty 0x3 reset 0x2 slot 1 offset 0x1f (used 1)",
    ),
    "kvm:kvm_dirty_ring_reset": (
        "index dirty_index reset_index", (1, 12, 10), "ring 1: dirty 0xc reset 0xa (used 2)",
    ),
    "kvm:kvm_try_async_get_page": ("gva gfn", (0x3000, 3), "gva = 0x3000, gfn = 0x3"),
    "kvm:kvm_async_pf_repeated_fault": ("gva gfn", (0x3000, 3), "gva = 0x3000, gfn = 0x3"),
    "kvm:kvm_async_pf_doublefault": ("gva gfn", (0x3000, 3), "gva = 0x3000, gfn = 0x3"),
    "kvm:kvm_async_pf_not_present": ("token gva", (0x1002, 0x3000), "token 0x1002 gva 0x3000"),
    "kvm:kvm_async_pf_ready": ("token gva", (0x1002, 0x3000), "token 0x1002 gva 0x3000"),
    "kvm:kvm_async_pf_completed": (
        "address gva", (0x7F0000003000, 0x3000), "gva 0x3000 address 0x7f0000003000",
    ),
    "kvm:kvm_vm_set_mem_attributes": (
        "start end attr", (3, 0x1004, 8), "0x00000000000003 -- 0x00000000001004 [0x8]",
    ),
    "kvm:kvm_dirty_ring_exit": ("vcpu_id", (1,), "vcpu 1"),
    "kvm:kvm_pml_full": ("vcpu_id", (2,), "vcpu 2: PML full"),
    "kvmmmu:check_mmio_spte": (
        "kvm_gen spte_gen spte", (4, 2, 0x1006), "spte 1006 kvm_gen 4 spte-gen 2 valid 0",
    ),
    "kvmmmu:handle_mmio_page_fault": ("addr gfn access", (0, 0x10000, 0), "addr:0 gfn 10000 access 0"),
    "kvmmmu:mark_mmio_spte": (
        "sptep gfn access gen", (0x27000, 0x10000, 0, 4), "sptep:0000000000027000 gfn 10000 access 0 gen 4",
    ),
    "kvmmmu:fast_page_fault": (
        "vcpu_id cr2_or_gpa error_code sptep old_spte new_spte ret", (0, 0x3000, 0x13, 0x27018, 5, 7, 5),
        "vcpu 0 gva 3000 error_code P|W|F sptep 0000000000027018 old 0x5 new 7 spurious 0 fixed 1",
    ),
    "kvmmmu:kvm_mmu_get_page": (
        "mmu_valid_gen gfn role root_count unsync created", (0, 0x10, 0x3783, 0, False, True),
        "sp gen 0 gfn 10 l3 8-byte q0 direct wux nxe ad root 0 sync\0 new",
    ),
    "kvmmmu:kvm_mmu_pagetable_walk": (
        "addr pferr", (0x10003000, 0x17), "addr 10003000 pferr 17 P|W|U|F",
    ),
    "kvmmmu:kvm_mmu_paging_element": ("pte level", (0x8000000000002067, 4), "pte 8000000000002067 level 4"),
    "kvmmmu:kvm_mmu_set_accessed_bit": ("gpa", (0x4400,), "gpa 4400"),
    "kvmmmu:kvm_mmu_set_dirty_bit": ("gpa", (0x4408,), "gpa 4408"),
    "kvmmmu:kvm_mmu_walker_error": ("pferr", (0xD,), "pferr d P|U|RSVD"),
    "kvmmmu:kvm_mmu_prepare_zap_page": (
        "mmu_valid_gen gfn role root_count unsync", (1, 0, 0x13F84, 2, False),
        "sp gen 1 gfn 0 l4 8-byte q0 direct wux invalid nxe !ad root 2 sync\0",
    ),
    "kvmmmu:kvm_mmu_sync_page": (
        "mmu_valid_gen gfn role root_count unsync", (0, 0x10, 0x3701, 0, True),
        "sp gen 0 gfn 10 l1 8-byte q0 wux nxe ad root 0 unsync\0",
    ),
    "kvmmmu:kvm_mmu_unsync_page": (
        "mmu_valid_gen gfn role root_count unsync", (0, 0x10, 0x3701, 0, False),
        "sp gen 0 gfn 10 l1 8-byte q0 wux nxe ad root 0 sync\0",
    ),
    "kvmmmu:kvm_mmu_set_spte": (
        "gfn spte sptep level r x u", (0x10003, 0x122207E67, 0x1060D8018, 1, True, True, 1),
        "gfn 10003 spte 122207e67 (rwxu) level 1 at 1060d8018",
    ),
    "kvmmmu:kvm_mmu_split_huge_page": (
        "gfn spte level errno", (0x200, 0xF77, 2, -16), "gfn 200 spte f77 level 2 errno -16",
    ),
    "kvmmmu:kvm_mmu_spte_requested": (
        "gfn pfn level", (0x10003, 0x122207, 1), "gfn 10003 pfn 122207 level 1",
    ),
    "kvmmmu:kvm_mmu_zap_all_fast": (
        "mmu_valid_gen mmu_used_pages", (1, 0x1F), "kvm-mmu-valid-gen 1 used_pages 1f",
    ),
    "kvmmmu:kvm_tdp_mmu_spte_changed": (
        "gfn old_spte new_spte level as_id", (3, 1 << 63, 0xB77, 1, 0),
        "as id 0 gfn 3 level 1 old_spte 8000000000000000 new_spte b77",
    ),
}
KERNEL = {tp.full_name: tp for tp in TRACEPOINTS if tp.system != "refault"}


def test_every_kernel_event_of_this_room_is_here() -> None:
    assert set(CASES) == set(KERNEL)


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_event_has_the_kernels_fields_and_line(name: str) -> None:
    fields, values, line = CASES[name]
    assert KERNEL[name].fields == tuple(fields.split())
    assert KERNEL[name].format(values) == line


def test_a_restarted_run_says_so() -> None:
    assert KERNEL["kvm:kvm_userspace_exit"].format((10, -4)) == "reason restart (4)"
    assert KERNEL["kvm:kvm_userspace_exit"].format((0, -14)) == "reason error (14)"
    assert KERNEL["kvm:kvm_userspace_exit"].format((39, -14)) == "reason error (14)"


def test_event_names_are_unique() -> None:
    names = [tp.full_name for tp in TRACEPOINTS]
    assert len(names) == len(set(names))


def test_the_mmio_mark_has_the_low_bits_of_the_spte_as_access() -> None:
    m = Machine()
    m.run_raw(("r", 0x1000_0000))
    assert m.last("mark_mmio_spte").args["access"] == 6

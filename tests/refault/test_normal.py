"""The form in which event sequences are compared."""

from __future__ import annotations

import pytest

from refault.scenarios.normal import Normalizer, host_side, parse_recording

D = 0x7F00_0000_0000
RAW = """\
        0us >> guest st D+0x3000=0x1 COW of zero page
      413us kvm_mmu_pagetable_walk: addr 10003000 pferr 7 P|W|U
 429us kvm_unmap_hva_range: mmu notifier unmap range: 0x7f7684803000 -- 0x7f7684804000 [D+0x3000..D+0x4000]
      443us kvm_mmu_pagetable_walk: addr 1003 pferr 4 U
      448us kvm_mmu_spte_requested: gfn 10003 pfn 2adc23 level 1
      450us kvm_mmu_set_spte: gfn 10003 spte 2adc23e67 (rwxu) level 1 at 10592c018
      451us kvm_mmu_set_spte: gfn 10004 spte 800000003b33825 (r--u) level 1 at 10592c020
      504us << guest st D+0x3000=0x1 COW of zero page: ok 154us
# stats delta: {"pf_taken": 2, "pages_4k": 1}
"""


def test_times_frames_and_table_addresses_are_dropped_and_nothing_else() -> None:
    found = parse_recording(RAW)
    assert found.lines == [
        ">> guest st D+0x3000=0x1 COW of zero page",
        "walk addr 10003000 pferr 7 P|W|U",
        "kvm_unmap_hva_range [D+0x3000..D+0x4000]",
        "kvm_mmu_spte_requested: gfn 10003 pfn P0 level 1",
        "kvm_mmu_set_spte: gfn 10003 spte P0|e67 (rwxu) level 1",
        "kvm_mmu_set_spte: gfn 10004 spte P1|825 (r--u) level 1",
        "<< guest st D+0x3000=0x1 COW of zero page: ok",
    ]
    assert found.stats == {"pf_taken": 2, "pages_4k": 1}


def test_the_normal_form_of_the_normal_form_is_itself() -> None:
    found = parse_recording(RAW)
    assert parse_recording(found.text()) == found


def test_ranges_of_other_memory_are_left_out_and_the_whole_mm_is_not() -> None:
    normal = Normalizer(D)
    for start, end in ((D - 0x2000, D - 0x1000), (D - 0x1000, D + 0x1000), (D + 0x90_0000, D + 0x90_1000),
                       (D + 0xA0_1000, D + 0xA0_2000), (0, (1 << 64) - 1)):
        normal.event("kvm_unmap_hva_range", f"mmu notifier unmap range: {start:#016x} -- {end:#016x}")
    assert normal.lines == [
        "kvm_unmap_hva_range [D-0x1000..D+0x1000]", "kvm_unmap_hva_range [D+0xa01000..D+0xa02000]",
        "kvm_unmap_hva_range [whole mm]",
    ]


def test_frames_are_numbered_anew_where_the_sequence_begins() -> None:
    normal = Normalizer(D)
    normal.event("kvm_mmu_spte_requested", "gfn 10003 pfn 77 level 1")
    normal.clear()
    normal.event("kvm_mmu_spte_requested", "gfn 10003 pfn 88 level 1")
    assert normal.lines == ["kvm_mmu_spte_requested: gfn 10003 pfn P0 level 1"]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("OSError 14 EFAULT; exit=('UNKNOWN',)", "EFAULT"), ("IO", "ok"),
        ("('IO', 'out', 1, 244, b'\\x01')", "ok"),
        ("('MMIO', '0x20000000', '0010000000000000', 8, 'r')", "MMIO read of 8 bytes at 0x20000000"),
        ("('MMIO', '0x20000000', '0500000000000000', 8, 'w')", "MMIO write of 8 bytes at 0x20000000 of 0x5"),
        ("140146252972032", "address"), ("1229782938247303441", "1229782938247303441"),
        ("rc 0 errno 14", "rc 0"),
    ],
)
def test_results_say_what_happened_and_not_what_was_left_in_a_buffer(raw: str, shown: str) -> None:
    normal = Normalizer(D)
    normal.mark(f"<< a step: {raw}")
    assert normal.lines == [f"<< a step: {shown}"]


def test_events_of_every_exit_are_no_part_of_it() -> None:
    normal = Normalizer(D)
    for name in ("kvm_entry", "kvm_exit", "kvm_pio", "kvm_emulate_insn"):
        normal.event(name, "vcpu 0")
    normal.event("kvm_userspace_exit", "reason KVM_EXIT_IO (2)")
    normal.event("kvm_userspace_exit", "reason error (14)")
    normal.event("kvm_mmu_sync_page", "sp gen 0 gfn 10 l1")
    assert normal.lines == ["kvm_userspace_exit: reason error (14)", "kvm_mmu_sync_page: sp gen 0 gfn 10 l1"]


def test_the_hosts_side_is_steps_and_notifier_events() -> None:
    assert host_side(parse_recording(RAW).lines) == [
        ">> guest st D+0x3000=0x1 COW of zero page", "kvm_unmap_hva_range [D+0x3000..D+0x4000]",
        "<< guest st D+0x3000=0x1 COW of zero page: ok",
    ]


def test_what_is_no_recording_is_refused() -> None:
    with pytest.raises(ValueError, match="not a line of a recording"):
        parse_recording("hello\n")

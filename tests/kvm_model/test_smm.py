"""smm.py: a second address space, entered by SMI and left by RSM; both spaces' slots, roots and rmaps."""

from __future__ import annotations

from typing import Any

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_PAGEOUT, do_madvise
from host_mm.uaccess import copy_from_user
from kvm_model.mmu.mmu_internal import role_smm
from kvm_model.smm import kvm_inject_smi
from kvm_model.vmx import exits
from tests.kvm_model.machine import BASE, PAGE, Machine

CASES = [
    pytest.param("linux-6.18", "Y", id="6.18-tdp"), pytest.param("linux-6.18", "N", id="6.18-direct"),
    pytest.param("linux-5.10", "Y", id="5.10-tdp"), pytest.param("linux-5.10", "N", id="5.10-direct"),
]
SMM = 1 << 16
RSM = ("exit", exits.REASON_EXCEPTION_NMI, {"intr_info": 1 << 31 | 3 << 8 | 6})


def smm_machine(profile: str = "linux-6.18", tdp: str = "Y", **options: Any) -> Machine:
    """Page 3 is the same in both spaces; pages 0x30 to 0x3f of the second are SMRAM, 64 to 79 of BASE."""
    m = Machine(pages=96, slot=False, profile=profile, params={"kvm.tdp_mmu": tdp}, **options)
    m.do(lambda: m.kvm.set_user_memory_region(0, 0, 64 * PAGE, BASE))
    m.do(lambda: m.kvm.set_user_memory_region(SMM | 0, 0, 0x30 * PAGE, BASE))
    m.do(lambda: m.kvm.set_user_memory_region(SMM | 1, 0x30 * PAGE, 16 * PAGE, BASE + 64 * PAGE))
    return m


def in_smm(m: Machine, *ops: Any) -> list[int]:
    """Run these operations in SMM, and RSM."""
    m.do(lambda: kvm_inject_smi(m.vcpus[0]))
    m.cpu.out[0] = []
    m.cpu.ops.setdefault(0, []).extend([*ops, RSM])
    exit_ = m.run_raw()
    assert exit_.kind == "hlt", exit_
    # An exit by intercept leaves RIP and the script where they are; RSM then replaces RIP.
    return m.cpu.out[0]


@pytest.fixture(autouse=True)
def _rsm_takes_its_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kvm_model.machine import ScriptedCpu

    plain = ScriptedCpu.rsm_load_state

    def rsm(self: Any, vcpu: Any, image: bytes) -> int:
        self.ops[vcpu.vcpu_id].pop(0)
        return plain(self, vcpu, image)

    monkeypatch.setattr(ScriptedCpu, "rsm_load_state", rsm)


@pytest.mark.parametrize(("profile", "tdp"), CASES)
def test_the_same_gfn_is_other_memory_in_smm(profile: str, tdp: str) -> None:
    m = smm_machine(profile, tdp)
    m.run(("w", 0x30000, 1), ("w", 0x3000, 2))
    assert in_smm(m, ("r", 0x30000), ("w", 0x30000, 7), ("r", 0x3000), ("w", 0x3008, 8)) == [0, 2]
    assert m.run(("r", 0x30000), ("r", 0x3008)) == [1, 8]
    assert in_smm(m, ("r", 0x30000)) == [7]
    m.truths.sweep()


@pytest.mark.parametrize(("profile", "tdp"), CASES)
def test_each_space_has_a_root_of_its_own(profile: str, tdp: str) -> None:
    m = smm_machine(profile, tdp)
    m.run(("r", 0))
    roots: list[int] = []
    in_smm(m, ("r", 0), ("call", lambda: roots.append(m.vcpus[0].root_hpa)))
    m.run(("r", 0))
    assert [role_smm(m.kvm.sps[hpa >> 12].role) for hpa in (*roots, m.vcpus[0].root_hpa)] == [1, 0]


@pytest.mark.parametrize(("profile", "tdp"), CASES)
def test_a_bracket_over_a_shared_page_zaps_it_in_both(profile: str, tdp: str) -> None:
    m = smm_machine(profile, tdp)
    m.run(("w", 0x3000, 1))
    in_smm(m, ("r", 0x3000))
    mark = len(m.events)
    m.do(lambda: do_madvise(m.mm, BASE + 3 * PAGE, PAGE, MADV_PAGEOUT))
    zaps = [e.args["gfn"] for e in m.events[mark:] if e.name == "spte_zap"]
    assert zaps == [3, 3]
    assert in_smm(m, ("r", 0x3000)) == [1]
    assert m.run(("r", 0x3000)) == [1]
    m.truths.sweep()


@pytest.mark.parametrize(("profile", "tdp"), CASES)
def test_a_bracket_over_smram_leaves_the_guests_page_of_that_gfn_alone(profile: str, tdp: str) -> None:
    m = smm_machine(profile, tdp)
    m.run(("w", 0x31000, 1))
    in_smm(m, ("w", 0x31000, 2))
    leaf = m.leaf(0x31)
    mark = len(m.events)
    m.do(lambda: do_madvise(m.mm, BASE + 65 * PAGE, PAGE, MADV_PAGEOUT))
    assert [e.args["gfn"] for e in m.events[mark:] if e.name == "spte_zap"] == [0x31]
    m.run(("r", 0x31000))
    assert m.leaf(0x31) & ~0x300 == leaf & ~0x300
    assert in_smm(m, ("r", 0x31000)) == [2]
    m.truths.sweep()


def test_the_events_of_an_smi_and_of_its_end_in_order() -> None:
    m = smm_machine()
    m.run(("r", 0))
    mark = len(m.events)
    in_smm(m, ("r", 0x3000))
    order = ["kvm_smm_transition", "kvm_mmu_get_page", "kvm_entry", "kvm_page_fault", "kvm_smm_transition"]
    names = iter(m.names(since=mark))
    assert all(name in names for name in order)
    entering = [e.args["entering"] for e in m.events[mark:] if e.name == "kvm_smm_transition"]
    assert entering == [True, False]


def test_the_state_is_saved_where_only_smm_sees_it() -> None:
    m = smm_machine()
    m.run(("w", 0x3FE00, 1))
    in_smm(m)
    assert m.run(("r", 0x3FE00)) == [1]
    at = BASE + 64 * PAGE + 0xFE00
    assert m.do(lambda: copy_from_user(m.process, at, 5)) == b"state"


def test_an_smi_in_smm_waits_for_its_end() -> None:
    m = smm_machine()
    vcpu = m.vcpus[0]
    m.cpu.ops[0] = [("r", 0)]
    in_smm(m, ("call", lambda: kvm_inject_smi(vcpu)), ("r", 0), RSM)
    entering = [e.args["entering"] for e in m.events if e.name == "kvm_smm_transition"]
    assert entering == [True, False, True, False]


def test_without_smram_an_smi_is_the_end_of_the_vm() -> None:
    m = Machine()
    m.do(lambda: kvm_inject_smi(m.vcpus[0]))
    assert m.run_raw(("r", 0)).kind == "internal-error"


def test_rsm_outside_smm_is_an_invalid_opcode() -> None:
    m = smm_machine()
    m.cpu.ops[0] = [RSM]
    m.vcpus[0].queue_exception = lambda vector, error=None: m.cpu.ops[0].clear()  # type: ignore[method-assign]
    assert m.run_raw().kind == "hlt"
    assert "kvm_smm_transition" not in m.names()


def test_a_halted_vcpu_wakes_for_an_smi() -> None:
    m = smm_machine()
    m.run(("r", 0))
    assert in_smm(m, ("r", 0)) == [0]


def page_out_what_both_spaces_have(m: Machine) -> None:
    both = smm_machine("linux-6.18", "Y" if m.kvm.tdp_mmu_enabled else "N", breaks=tuple(m.kvm.breaks))
    both.cpu.rsm_load_state = lambda vcpu, image: both.cpu.ops[0].pop(0) and 0x30000  # type: ignore
    both.run(("w", 0x3000, 1))
    in_smm(both, ("r", 0x3000))
    both.do(lambda: do_madvise(both.mm, BASE + 3 * PAGE, PAGE, MADV_PAGEOUT))
    both.truths.sweep()


def test_a_notifier_that_forgets_the_smm_space_leaves_a_page_mapped() -> None:
    page_out_what_both_spaces_have(Machine())
    with pytest.raises(BrokenTruth, match="spte-matches-host"):
        page_out_what_both_spaces_have(Machine(breaks=("ignore-smm-slots",)))

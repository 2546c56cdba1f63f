"""emu/cpu/smm.py, emu/operations/smm.py: the save area, SMM's environment, the way back; SMRAM and SMIs."""

import pytest

import refault
from emu.cpu.env import HF_CS32, HF_CS64, HF_PE, R_CS
from emu.cpu.smm import rsm_load_state, smm_enter, smm_save_state
from host_mm.kernel.errors import KernelError
from kvm_model.vmx import exits
from tests.emu.bare_machine import CODE, Machine

SMBASE = 0x300000


def segment(env, n):
    """Without the bits of the limit that a descriptor has among its flags: the limit has them."""
    selector, base, limit, flags = env.seg(n)
    return selector, base, limit, flags & ~0xF0000


def state(m):
    v = m.cpu.vcpu(m.vcpus[0])
    env = v.env
    return (
        [env.reg(n) for n in range(16)], env.eip, env.eflags, [env.cr(n) for n in (0, 3, 4)], env.efer,
        [segment(env, n) for n in range(6)], env.hflags,
    )


def test_the_way_there_and_back_changes_nothing():
    m = Machine()
    m.put(CODE, "mov rbx, 0x1122334455667788; sti; hlt")
    m.step()
    v = m.cpu.vcpu(m.vcpus[0])
    before = state(m)
    image = smm_save_state(v, SMBASE)
    smm_enter(v, SMBASE)
    assert v.env.eip == 0x8000
    assert v.linear_rip == SMBASE + 0x8000
    assert not v.env.hflags & (HF_PE | HF_CS32 | HF_CS64)
    assert v.env.seg(R_CS)[:2] == (SMBASE >> 4 & 0xFFFF, SMBASE)
    assert v.code_bits == 16
    assert rsm_load_state(v, image) == SMBASE
    assert state(m) == before


def test_16_bit_code_runs_in_smm_and_rsm_exits_as_an_invalid_opcode():
    m = Machine()
    v = m.cpu.vcpu(m.vcpus[0])
    smm_enter(v, SMBASE)
    # mov eax, 0x12345678; mov [0x400000], eax; rsm
    m.ram.write(SMBASE + 0x8000, bytes.fromhex("66b878563412" "6766a300004000" "0faa"))
    e = m.step()
    assert (e.reason, e.intr_info & 0xFF, e.rip) == (exits.REASON_EXCEPTION_NMI, 6, 0x800D)
    assert m.q(0x400000) == 0x12345678


def test_a_save_area_that_is_no_state_is_refused():
    m = Machine()
    v = m.cpu.vcpu(m.vcpus[0])
    image = bytearray(smm_save_state(v, SMBASE))
    image[0x158:0x160] = bytes(8)
    assert rsm_load_state(v, bytes(image)) == -1


@pytest.mark.parametrize(("call", "errno"), [
    ("smi(0)", 25), ("smi(7)", 22), ("smram(0x200000, 0)", 22), ("smram(0x200ff0, 17)", 22),
    ("smram(0x40000000, 16)", 14),
])
def test_bad_arguments(call, errno):
    with refault.VM("8M", seed=1, check=True) as vm:
        with pytest.raises(KernelError) as refused:
            eval(f"host.{call}", {"host": vm.host})
        assert refused.value.errno == errno


def test_there_is_one_smm_address_space():
    with refault.VM("8M", seed=1, check=True) as vm:
        assert vm.host.smram(0x200000, 16) == 0
        with pytest.raises(KernelError) as refused:
            vm.host.smram(0x200000, 16)
        assert refused.value.errno == 17
        assert vm.host.smram_out() == 16

"""The CPU with PIC and PIT: interrupts arrive on logical time, at instruction boundaries that allow them."""

from emu.devices.bus import PortBus
from emu.devices.pic import PicPair
from emu.devices.pit import Pit
from kvm_model.vmx import exits
from tests.emu.bare_machine import CODE, Machine

INIT = (
    "mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; "
        "out 0x21, al;"
    "mov al, 0xfe; out 0x21, al; mov al, 0x34; out 0x43, al; mov al, 0xa9; out 0x40, al; mov al, 0x04; "
        "out 0x40, al;"
)
HANDLER = "inc r15; mov [0x300000], r15; push rax; mov al, 0x20; out 0x20, al; pop rax; iretq"


class Pc(Machine):
    """KVM's part of an interrupt: inject when allowed, else ask for the window."""

    def __init__(self):
        super().__init__()
        vcpu = self.vcpus[0]
        self.pic = PicPair(lambda: setattr(vcpu, "kicked", True))
        self.bus = PortBus()
        pit = Pit(self.sched, lambda: self.pic.pulse(0))
        self.bus.register(0x20, 0x21, self.pic)
        self.bus.register(0x40, 0x43, pit)
        self.gate(0x20, 0x11000)
        self.put(0x11000, HANDLER)

    def loop(self, stop):
        kvm, cpu = self.vcpus[0], self.cpu
        while not stop():
            kvm.kicked = False
            if self.pic.has_interrupt():
                if cpu.interrupt_allowed(kvm):
                    kvm.entry_intr_info = 0x80000000 | self.pic.ack()
                else:
                    kvm.irq_window = True
            e = self.step()
            if e.reason == exits.REASON_INTERRUPT_WINDOW:
                kvm.irq_window = False
            elif e.reason == exits.REASON_IO_INSTRUCTION:
                size, port = (e.qualification & 7) + 1, e.qualification >> 16
                if e.qualification & 8:
                    self.set(rax=self.bus.read(port, size))
                else:
                    self.bus.write(port, size, self.reg("rax"))
                cpu.skip_emulated_instruction(kvm, e.insn_len)
            elif e.reason == exits.REASON_HLT:
                cpu.skip_emulated_instruction(kvm, 1)
                while not self.pic.has_interrupt():
                    self.sched.advance(max(self.sched.next_timer() - self.sched.now, 1))
            else:
                assert e.reason == exits.REASON_EXTERNAL_INTERRUPT


def test_ticks_reach_a_busy_guest_on_time():
    m = Pc()
    m.put(CODE, INIT + "sti; l: inc rcx; jmp l")
    m.loop(lambda: m.q(0x300000) >= 10)
    # 1193 PIT cycles: 999.8 us
    assert 9.9e6 < m.sched.now < 10.2e6
    assert m.reg("r15") == 10


def test_ticks_wake_a_halted_guest():
    m = Pc()
    m.put(CODE, INIT + "l: sti; hlt; cli; inc rbx; jmp l")
    m.loop(lambda: m.q(0x300000) >= 5)
    assert m.reg("rbx") in (4, 5)
    assert 4.9e6 < m.sched.now < 5.1e6


def test_interrupts_wait_for_sti_and_its_shadow():
    m = Pc()
    m.put(CODE, INIT + "mov ecx, 2500000; l: dec ecx; jnz l; mov r14, r15; sti; mov r13, r15; nop; "
        "mov r12, r15; cli; l2: jmp l2")
    m.loop(lambda: m.sched.now > 6_000_000)
    assert (m.reg("r14"), m.reg("r13"), m.reg("r12")) == (0, 0, 1)
    assert m.reg("r15") == 1


def test_a_repeated_string_is_interruptible():
    m = Pc()
    m.put(CODE, INIT + "sti; mov rdi, 0x400000; mov ecx, 0x600000; xor eax, eax; rep stosb; mov r14, rdi; "
        "cli; l2: jmp l2")
    m.loop(lambda: m.reg("r14") != 0)
    assert m.reg("r14") == 0xA00000
    assert m.reg("r15") >= 5

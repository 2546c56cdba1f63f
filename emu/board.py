"""One VM: a VMM process, its guest memory, KVM, the vCPUs' threads and the devices.

The VMM is small: each vCPU has a thread that enters KVM_RUN and serves what comes out. Ports go to
the port bus, MMIO to the test device or the open bus, hypercalls to the host operations, memory
faults to the protections that `protect` made. Everything else ends the vCPU or the VM.

Not modelled: in-kernel irqchip (vCPU 0 takes the PIC's interrupts, others none), PCI,
ACPI, firmware.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

import emu.operations  # noqa: F401  (fills the registry of operations)
from emu.abi import EXIT_PORT, SERIAL_PORT, vmcall_by_number
from emu.config import MachineConfig
from emu.cpu.cpu import UnicornCpu
from emu.devices.bus import PortBus, all_ones
from emu.devices.exitport import ExitPort
from emu.devices.mmio_test import MmioTestDevice
from emu.devices.pic import PicPair
from emu.devices.pit import Pit
from emu.devices.rdma import RdmaDevice
from emu.devices.serial import Serial
from emu.dirty_rings import DirtyRings
from emu.hostops import OPERATIONS, TRACEPOINTS, perform
from emu.hugetlb import HugetlbMemory
from emu.memory import PROT_RW, GuestMemory
from emu.vmm import Vmm
from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.locks import Mutex
from host_mm.kernel.sched import Task, WaitQueue
from host_mm.ram import PAGE_SIZE
from kvm_model.kvm_main import KVM_CAP_DISABLE_QUIRKS2, Kvm
from kvm_model.mem_attributes import (
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    kvm_mem_is_private,
)
from kvm_model.mmu.mmu_roots import KVM_X86_QUIRK_SLOT_ZAP_ALL
from kvm_model.profile import PROFILES
from kvm_model.vcpu import KVM_MP_STATE_HALTED, UserExit
from kvm_model.x86 import kvm_arch_vcpu_ioctl_run

if TYPE_CHECKING:
    from emu.devices.flash import Flash
    from emu.devices.gvt import VirtualGpu
    from emu.devices.hmm_device import HmmDevice
    from emu.devices.pci_bar import PciBar
    from emu.devices.sva import SvaDevice
    from emu.dune import Dune
    from emu.host import Host
    from emu.loaders.image import Image
    from emu.operations.instrument import ArmedEntry
    from emu.uffd import UffdHandler
    from host_mm.address_space import AddressSpace
    from host_mm.hmm_mirror import HmmMirror
    from kvm_model.vcpu import Vcpu

__all__ = ["Board", "Stop"]

COST_USER_EXIT = 2_000
"""ns for a round trip from KVM to the VMM and back."""
_VM_TYPES = {"default": KVM_X86_DEFAULT_VM, "sw-protected": KVM_X86_SW_PROTECTED_VM}


class Stop(msgspec.Struct):
    """Why a VM stopped. `kind`: `exit` (the guest wrote `status` to the exit port), `halt` (every
    started vCPU halted), `shutdown` (triple fault), `dead` (halted with interrupts off),
    `error` (an exit the VMM cannot serve), `pause` (somebody asked), `limit` (of instructions),
    `timeout` (of real time), `mmio` (an access that `stops_at_mmio` has; it is not answered yet)."""

    kind: str
    status: int = 0
    why: str = ""


class _VcpuThread:
    """A vCPU's thread: whether it was started, whether it halted for good."""

    __slots__ = ("error", "halted", "node", "task", "vcpu", "wq")

    def __init__(self, vcpu: Vcpu, wq: WaitQueue) -> None:
        self.vcpu = vcpu
        self.wq = wq
        self.task: Task | None = None
        self.node = -1
        self.halted = True
        self.error: BaseException | None = None

    def parked(self) -> bool:
        """Whether the thread is outside KVM_RUN and waits to be told to go on, or has ended."""
        return self.task is None or self.task.done or self.task in self.wq.waiters


class Board:
    """A VM of `config` on `host`. `output` gets the guest's serial bytes.

    `stops_at_mmio`, where it is set, gets every MMIO exit in the devices' place and says why the VM stopped.
    """

    def __init__(
        self, host: Host, config: MachineConfig, *, interpreted: bool = False,
        output: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        self.host = host
        self.config = config
        self.trace = host.stream.bind(TRACEPOINTS)
        self.stop: Stop | None = None
        self.closing = False
        self.operations_inside = 0
        self.weather = False
        self.serial_bytes = bytearray()
        self.output = output
        self.child: Vmm | None = None
        self.mirrors: dict[int, HmmMirror] = {}
        self.protected: list[tuple[int, int]] = []
        self.protection_faults = 0
        self.armed: ArmedEntry | None = None
        self.stops_at_mmio: Callable[[Vcpu, UserExit], str] | None = None
        self.pinned: list[tuple[int, list[int]]] = []
        self.contig: dict[int, int] = {}
        self.offline: list[int] = []
        self.recovers_from_sigbus = False
        self.uffd: UffdHandler | None = None
        self.uffd_control = Mutex(host.sched, "uffd control")
        self.moving = False
        self.moves = 0
        self.moved_back = WaitQueue(host.sched, "guest memory moved back")
        self.process = host.mm.create_process("vmm")
        self.process.threads += config.vcpus
        self.vmm = Vmm(host.mm, self.process)
        self.rdma = RdmaDevice(host.mm, self.process)
        self.hugetlb = HugetlbMemory(self)
        self.dune: Dune | None = None
        self.sva: SvaDevice | None = None
        self.hmm_devices: dict[int, HmmDevice] = {}
        self.smram = 0
        self.gpus: dict[int, VirtualGpu] = {}
        self.flash: Flash | None = None
        self.bars: dict[int, PciBar] = {}
        self.guest_memfds: list[AddressSpace] = []
        self._make_devices()
        self._make_kvm(interpreted)
        self.vcpus = [self.kvm.create_vcpu(n) for n in range(config.vcpus)]
        self.vcpus[0].irq_source = self.pic
        self.threads = [_VcpuThread(v, WaitQueue(host.sched, f"vcpu{v.vcpu_id} idle")) for v in self.vcpus]
        self.memory = GuestMemory(self, config.memory)
        host.boards.append(self)

    def _make_kvm(self, interpreted: bool) -> None:
        host, config = self.host, self.config
        ept = config.mmu == "ept"
        self.cpu = UnicornCpu(
            host.mm, host.sched, interpreted=interpreted, ept=ept, params=config.params
        )
        self.cpu.exit_filter = self._exit_filter
        self.kvm = Kvm(
            host.mm, self.process, self.cpu, profile=PROFILES[config.profile], params=config.params,
            breaks=frozenset(config.breaks), checks=config.checks, tdp_enabled=ept,
            vm_type=_VM_TYPES[config.params.get("vmm.vm_type", "default")],
        )
        if config.params.get("vmm.quirk_slot_zap_all", "Y").lower() in ("0", "n", "no", "off", "false"):
            self.kvm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL)
        self.dirty_rings = DirtyRings(self.kvm, int(config.params.get("vmm.dirty_ring_size", "0")))

    def _make_devices(self) -> None:
        self.pic = PicPair(self._interrupt)
        self.pit = Pit(self.host.sched, lambda: self.pic.pulse(0))
        self.serial = Serial(SERIAL_PORT, self._serial_output, lambda level: self.pic.set_irq(4, level))
        self.mmio_test = MmioTestDevice()
        bus = self.bus = PortBus()
        bus.register(SERIAL_PORT, SERIAL_PORT + 7, self.serial)
        bus.register(EXIT_PORT, EXIT_PORT + 3, ExitPort(self._guest_exit))
        for first in (0x20, 0xA0):
            bus.register(first, first + 1, self.pic)
        bus.register(0x40, 0x43, self.pit)
        bus.register(0x61, 0x61, self.pit)

    def _serial_output(self, data: bytes) -> None:
        self.serial_bytes += data
        self.output(data)

    def _interrupt(self) -> None:
        self.kvm.kick_for_interrupt(self.vcpus[0])

    def _guest_exit(self, status: int) -> None:
        self.stop = Stop("exit", status, f"the guest wrote {status:#x} to its exit port")

    def _exit_filter(self, vcpu: Vcpu, vmexit: object) -> bool:
        return self.armed is not None and self.armed.filter(self, vcpu, vmexit)  # type: ignore[arg-type]

    # -- loading and starting -----------------------------------------------------------------

    def load(self, image: Image) -> None:
        """Copy an image into guest memory and make vCPU 0 start at its entry."""

        def copy() -> None:
            for gpa, data in image.segments:
                self.memory.write(gpa, data)
            self.cpu.start_image(self.vcpus[0], image)
            self.kvm.set_sregs(self.vcpus[0])

        self.host.sched.run_task("vmm", copy)
        self.start_thread(self.threads[0])

    def start_cpu(self, number: int, entry: int, stack: int, arg: int) -> None:
        """Start vCPU `number` as the vmcall start_cpu says; KernelError(EINVAL or EBUSY)."""
        if not 1 <= number < len(self.threads):
            raise KernelError(errno.EINVAL, f"cpu {number}: want 1 to {len(self.threads) - 1}")
        thread = self.threads[number]
        if not thread.halted:
            raise KernelError(errno.EBUSY, f"cpu {number} runs")
        caller = self.host.sched.current.ctx.vcpu
        self.cpu.start_like(thread.vcpu, self.vcpus[max(caller, 0)], entry, stack, (arg, number))
        self.kvm.set_sregs(thread.vcpu)
        self.start_thread(thread)

    def set_node(self, number: int, node: int) -> None:
        """Let vCPU `number`'s thread run on a CPU of NUMA node `node`, -1: where the VMM is at home."""
        thread = self.threads[number]
        thread.node = node
        if thread.task is not None:
            thread.task.node = node

    def start_thread(self, thread: _VcpuThread) -> None:
        """Let a vCPU's thread enter KVM_RUN, until the VM stops or the vCPU halts for good."""
        thread.halted = False
        if thread.task is None:
            number = thread.vcpu.vcpu_id
            body = functools.partial(self._thread_body, thread)
            thread.task = self.host.sched.spawn(f"vcpu{number}", body, vcpu=number)
            thread.task.node = thread.node
        else:
            thread.wq.wake_all()

    def _thread_body(self, thread: _VcpuThread) -> None:
        while True:
            if thread.halted or self.stop is not None:
                thread.wq.wait()
                continue
            moves = self.moves
            out = kvm_arch_vcpu_ioctl_run(thread.vcpu)
            if out.kind == "memory-fault" and (self.moving or self.moves != moves):
                # mremap() has the memory elsewhere, or had it when the access met the hole.
                self.moved_back.wait_event(lambda: not self.moving)
            else:
                self._serve(thread, out)

    # -- what comes out of KVM_RUN ------------------------------------------------------------

    def _serve(self, thread: _VcpuThread, out: UserExit) -> None:
        self.host.sched.advance(COST_USER_EXIT)
        vcpu = thread.vcpu
        if out.kind == "io":
            self._serve_io(vcpu, out)
        elif out.kind == "mmio":
            self._serve_mmio(vcpu, out)
        elif out.kind == "hypercall":
            vcpu.complete_hypercall(self._hypercall(out) & 0xFFFF_FFFF_FFFF_FFFF)
        elif out.kind == "hlt":
            self._halted(thread)
        elif out.kind == "dirty-ring-full":
            self.dirty_rings.collect_and_reset()
        elif out.kind == "memory-fault":
            self._memory_fault(out)
        elif out.kind == "memory-fault-exit" and out.private != kvm_mem_is_private(self.kvm, out.gpa >> 12):
            # It met this VMM's own change of the page's attribute: the guest tries again.
            pass
        elif out.kind == "shutdown":
            rip = self.cpu.get_reg(vcpu, "rip")
            self._stop_all("shutdown", f"triple fault on vCPU {vcpu.vcpu_id} at rip {rip:#x}")
        elif out.kind == "intr":
            self._handle_sigbus()
        else:
            name = out.kind.removesuffix("-exit").upper().replace("-", "_")
            why = self.cpu.unsupported or out.why
            self._stop_all("error", f"KVM_EXIT_{name} on vCPU {vcpu.vcpu_id}: {why}")

    def _handle_sigbus(self) -> None:
        """Memory of the guest has gone bad: a new page of zeros there, as qemu_ram_remap does, or the end."""
        for hva in self.vmm.take_sigbus():
            if not self.recovers_from_sigbus:
                gpa = self.memory.gpa(hva)
                self._stop_all("error", f"SIGBUS (BUS_MCEERR_AR): the memory behind gpa {gpa:#x} has failed")
                return
            self.vmm.mmap(PAGE_SIZE, PROT_RW, hva)

    def _give_back(self) -> None:
        """What operations took of the host and did not return."""
        for _, pfns in self.pinned:
            self.vmm.unpin_range(pfns)
        for pfn, pages in self.contig.items():
            self.host.admin.free_contig(pfn, pages)
        for pfn in self.offline:
            self.host.admin.online(pfn)

    def _serve_io(self, vcpu: Vcpu, out: UserExit) -> None:
        if out.write:
            self.bus.write(out.port, out.size, out.data)
        else:
            vcpu.complete_io(self.bus.read(out.port, out.size))

    def _serve_mmio(self, vcpu: Vcpu, out: UserExit) -> None:
        if self.stops_at_mmio is not None:
            self._stop_all("mmio", self.stops_at_mmio(vcpu, out))
            return
        device: MmioTestDevice | RdmaDevice | Flash = self.mmio_test
        if self.rdma.covers(out.gpa):
            device = self.rdma
        elif self.flash is not None and self.flash.covers(out.gpa):
            device = self.flash
        if out.write:
            if device.covers(out.gpa):
                device.write(out.gpa, out.size, out.data)
            return
        value = device.read(out.gpa, out.size) if device.covers(out.gpa) else all_ones(out.size)
        vcpu.complete_mmio(value)

    def _hypercall(self, out: UserExit) -> int:
        call = vmcall_by_number(out.nr)
        if call is None or call.name not in OPERATIONS:
            return -errno.ENOSYS
        try:
            return perform(self, call.name, *out.args[: len(call.args)])
        except KernelError as exc:
            return -(exc.errno or errno.EIO)

    def _memory_fault(self, out: UserExit) -> None:
        if not self.protected:
            self._stop_all("error", f"KVM_RUN failed with EFAULT: no memory for gpa {out.gpa:#x}")
            return
        self.protection_faults += 1
        pieces, self.protected = self.protected, []
        for hva, length in pieces:
            self.vmm.mprotect(hva, length, PROT_RW)

    def _halted(self, thread: _VcpuThread) -> None:
        thread.halted = True
        if all(t.halted for t in self.threads):
            self._stop_all("dead", "every vCPU halted with interrupts off")

    def _stop_all(self, kind: str, why: str) -> None:
        if self.stop is None:
            self.stop = Stop(kind, 0, why)

    # -- running ------------------------------------------------------------------------------

    def run(self, until: Callable[[], bool] = lambda: False) -> Stop:
        """Run the host until this VM stops or `until()` is true; the reason it stopped."""
        self.resume()
        try:
            self.host.sched.run_until(lambda: self.stop is not None or until())
        except BrokenTruth as exc:
            # Nobody can run and no timer is set: no deadlock if it is the guest that waits for nothing.
            if exc.truth != "no-deadlock" or not self.all_halted():
                raise
            self._stop_all("halt", "every vCPU waits in HLT and no interrupt can come")
        return self.stop or Stop("pause")

    def resume(self) -> None:
        """Let the vCPU threads go on after a stop that is not final."""
        if self.stop is not None and self.stop.kind not in ("halt", "pause"):
            return
        self.stop = None
        for thread in self.threads:
            if thread.task is not None and not thread.halted:
                thread.wq.wake_all()

    def all_halted(self) -> bool:
        """Whether every started vCPU waits in HLT, in KVM or for good."""
        return all(t.halted or t.vcpu.mp_state == KVM_MP_STATE_HALTED for t in self.threads)

    def flush_all(self) -> None:
        """Empty every vCPU's translations before its next entry."""
        self.kvm.kvm_flush_remote_tlbs()

    def quiesce(self) -> None:
        """Get every vCPU's thread out of KVM_RUN and let the operations that are under way end."""
        self._stop_all("closed", "the VM is being destroyed")
        threads = [t for t in self.threads if t.task is not None and not t.parked()]
        for thread in threads:
            self.kvm.request_exit(thread.vcpu)
        self.rdma.closing = True
        if threads or self.operations_inside or self.rdma.running:
            self.host.sched.run_until(
                lambda: not (self.operations_inside or self.rdma.running) and all(t.parked() for t in threads)
            )

    def close(self) -> None:
        """Destroy the VM and its process. From here on no vCPU enters the guest."""
        self.quiesce()
        if self.kvm.truths is not None:
            self.kvm.truths.quiescent()
        self.closing = True

        def teardown() -> None:
            if self.child is not None:
                self.child.exit()
            for mirror in self.mirrors.values():
                mirror.close()
            for gpu in self.gpus.values():
                gpu.close()
            self._give_back()
            if self.uffd is not None:
                self.uffd.stop()
            self.hugetlb.exit_peer()
            self.kvm.clear_async_pf()
            self.vmm.exit()
            self.hugetlb.close()
            # As the VMM's files of these, closed after its address space is gone.
            for file in self.guest_memfds:
                self.vmm.close_file(file)
            self.rdma.close()
            for device in self.hmm_devices.values():
                device.close()
            for bar in self.bars.values():
                bar.close()
            if self.dune is not None:
                self.dune.close()
            if self.sva is not None:
                self.sva.unbind()
            self.kvm.destroy()

        self.host.sched.run_task("vmm-exit", teardown)
        self.host.boards.remove(self)
        self.cpu.close()

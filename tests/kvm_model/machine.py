"""A scripted CPU and a small VM for the tests of kvm_model.

The CPU runs a list of operations instead of instructions, translates each by a walk of the real EPT
bytes with its own TLB, sets A and D like hardware, and exits as VMX does.

    m = Machine()
    m.run(("w", 0x3000, 7), ("r", 0x3000))   # -> [7]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from host_mm import profile as mm_profile
from host_mm.host import HostMm
from host_mm.kernel.sched import RandomStrategy, Scheduler
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from kvm_model import profile as kvm_profile
from kvm_model.dirty_log import KVM_CAP_DIRTY_LOG_RING
from kvm_model.dirty_ring import KVM_DIRTY_GFN_SIZE
from kvm_model.instrument import walk_sptes
from kvm_model.kvm_main import Kvm
from kvm_model.kvm_x86_ops import MmioAccess
from kvm_model.vcpu import UserExit, Vcpu
from kvm_model.vmx import exits
from kvm_model.vmx.ept import (
    EPT_ACCESSED,
    EPT_ADDR_MASK,
    EPT_DIRTY,
    EPT_LARGE,
    PML_ENTRIES,
    VMCS_PML_ADDRESS,
    VMCS_PML_INDEX,
    ept_index,
    ept_misconfigured,
)
from kvm_model.vmx.exits import VmExit
from kvm_model.x86 import kvm_arch_vcpu_ioctl_run
from trace_events.event import Event
from trace_events.stream import Listener, TraceStream

__all__ = ["BASE", "PAGE", "Machine", "ScriptedCpu"]

PAGE = 4096
BASE = 0x7F0000000000
Op = tuple[Any, ...]
_NEED = {"r": 1, "w": 2, "x": 4}


class ScriptedCpu:
    """KvmX86Ops over lists of operations: (r, gpa), (w, gpa, value), (x, gpa), (io, ...), (call, fn)."""

    def __init__(self, host: HostMm, *, ad: bool = True) -> None:
        self.host = host
        self.ad = ad
        self.ops: dict[int, list[Op]] = {}
        self.out: dict[int, list[int]] = {}
        self.regs: dict[int, dict[str, int]] = {}
        self.tlb: dict[int, dict[int, tuple[int, int]]] = {}
        self.root: dict[int, int] = {}
        self.flushes: dict[int, int] = {}
        self.injected: list[int] = []
        self.msrs: dict[int, int] = {0x10: 0}
        self.allowed = True
        self.vmcs: dict[int, int] = {}
        self.written: set[int] = set()
        self.apic: dict[int, tuple[int, int]] = {}

    # -- KvmX86Ops ------------------------------------------------------------------------------

    def vcpu_run(self, vcpu: Vcpu) -> VmExit:
        n = vcpu.vcpu_id
        if vcpu.entry_intr_info & exits.INTR_INFO_VALID:
            self.injected.append(vcpu.entry_intr_info)
        ops = self.ops.setdefault(n, [])
        sched = self.host.sched
        while True:
            if sched.preempt:
                sched.point("slice")
            if vcpu.kicked:
                return VmExit(exits.REASON_EXTERNAL_INTERRUPT, self._rip(n))
            if vcpu.irq_window and self.allowed:
                return VmExit(exits.REASON_INTERRUPT_WINDOW, self._rip(n))
            if not ops:
                return VmExit(exits.REASON_HLT, self._rip(n), insn_len=1)
            exit_ = self._step(vcpu, ops[0])
            if exit_ is not None:
                return exit_
            ops.pop(0)
            self.set_reg(vcpu, "rip", self._rip(n) + 4)

    def _rip(self, n: int) -> int:
        return self.regs.setdefault(n, {}).setdefault("rip", 0x1000)

    def _step(self, vcpu: Vcpu, op: Op) -> VmExit | None:
        kind = op[0]
        n = vcpu.vcpu_id
        if kind == "call":
            op[1]()
            return None
        if kind == "exit":
            return VmExit(op[1], self._rip(n), **op[2])
        gpa = op[1]
        hpa = self._translate(vcpu, gpa, _NEED[kind])
        if isinstance(hpa, VmExit):
            return hpa
        if kind == "r":
            self.out.setdefault(n, []).append(self.host.ram.u64[hpa >> 3])
        elif kind == "w":
            self.host.ram.write(hpa, op[2].to_bytes(8, "little"))
            self.written.add(gpa >> 12)
        return None

    def _translate(self, vcpu: Vcpu, gpa: int, need: int) -> int | VmExit:
        tlb = self.tlb.setdefault(vcpu.vcpu_id, {})
        hit = tlb.get(gpa >> 12)
        if hit is not None and hit[1] & need:
            return hit[0] << 12 | gpa & 0xFFF
        return self._walk(vcpu, tlb, gpa, need)

    def _walk(self, vcpu: Vcpu, tlb: dict[int, tuple[int, int]], gpa: int, need: int) -> int | VmExit:
        u64 = self.host.ram.u64
        table = self.root[vcpu.vcpu_id]
        rwx = 7
        path = []
        for level in (4, 3, 2, 1):
            at = (table >> 3) + ept_index(gpa, level)
            entry = u64[at]
            if ept_misconfigured(entry, level):
                return VmExit(exits.REASON_EPT_MISCONFIG, self._rip(vcpu.vcpu_id), guest_physical=gpa)
            rwx &= entry & 7
            if not entry & 7:
                rwx = 0
            if not rwx & need:
                qualification = need | rwx << 3 | exits.EPT_GVA_VALID | exits.EPT_GVA_TRANSLATED
                return VmExit(
                    exits.REASON_EPT_VIOLATION, self._rip(vcpu.vcpu_id), qualification, gpa, gpa
                )
            path.append(at)
            table = entry & EPT_ADDR_MASK
            if level == 1 or entry & EPT_LARGE:
                break
        if self.ad:
            full = self._log(vcpu, gpa, path, need == 2)
            if full is not None:
                return full
            for at in path:
                u64[at] |= EPT_ACCESSED
            if need == 2:
                u64[path[-1]] |= EPT_DIRTY
        frame = (table >> 12) + (gpa >> 12 & (1 << 9 * (level - 1)) - 1)
        old = tlb.get(gpa >> 12, (frame, 0))
        tlb[gpa >> 12] = (frame, need | (old[1] if old[0] == frame else 0))
        return frame << 12 | gpa & 0xFFF

    def _log(self, vcpu: Vcpu, gpa: int, path: list[int], write: bool) -> VmExit | None:
        """Page-modification logging of an access that is about to set flags; the exit if the log is full."""
        u64 = self.host.ram.u64
        vmcs = self.vmcs.get(vcpu.vcpu_id, 0) >> 3
        dirties = write and not u64[path[-1]] & EPT_DIRTY
        if not vmcs or not (dirties or any(not u64[at] & EPT_ACCESSED for at in path)):
            return None
        index = u64[vmcs + VMCS_PML_INDEX]
        if index >= PML_ENTRIES:
            return VmExit(exits.REASON_PML_FULL, self._rip(vcpu.vcpu_id))
        if dirties:
            u64[(u64[vmcs + VMCS_PML_ADDRESS] >> 3) + index] = gpa & ~0xFFF
            u64[vmcs + VMCS_PML_INDEX] = (index - 1) & 0xFFFF
        return None

    def enable_pml(self, vcpu: Vcpu, vmcs: int) -> None:
        self.vmcs[vcpu.vcpu_id] = vmcs

    def flush_tlb(self, vcpu: Vcpu) -> None:
        self.tlb.setdefault(vcpu.vcpu_id, {}).clear()
        self.flushes[vcpu.vcpu_id] = self.flushes.get(vcpu.vcpu_id, 0) + 1

    def flush_tlb_guest(self, vcpu: Vcpu) -> None:
        self.flush_tlb(vcpu)

    def set_apic_pages(self, vcpu: Vcpu, access: int, virtual: int) -> None:
        self.apic[vcpu.vcpu_id] = access, virtual

    def smm_save_state(self, vcpu: Vcpu, smbase: int) -> bytes:
        return b"state" + bytes([vcpu.vcpu_id]) + smbase.to_bytes(8, "little") + bytes(498)

    def smm_enter(self, vcpu: Vcpu, smbase: int) -> None:
        self.regs.setdefault(vcpu.vcpu_id, {})["rip"] = 0x8000

    def rsm_load_state(self, vcpu: Vcpu, image: bytes) -> int:
        return int.from_bytes(image[6:14], "little") if image.startswith(b"state") else -1

    def evict_tlb(self, vcpu: Vcpu) -> None:
        # Hardware may keep every translation: the tests that want an eviction clear `tlb` themselves.
        pass

    def flush_tlb_gva(self, vcpu: Vcpu, gva: int) -> None:
        self.tlb.setdefault(vcpu.vcpu_id, {}).pop(gva >> 12, None)

    def load_mmu_pgd(self, vcpu: Vcpu, root_hpa: int, root_level: int) -> None:
        self.root[vcpu.vcpu_id] = root_hpa

    def emulate(self, vcpu: Vcpu, gpa: int, code: bytes | None = None) -> MmioAccess | None:
        op = self.ops[vcpu.vcpu_id][0]
        if op[0] == "x":
            return None
        return MmioAccess(op[0] == "w", 8, op[2] if op[0] == "w" else 0, b"\x48\x89\x07")

    def complete_mmio(self, vcpu: Vcpu, access: MmioAccess, data: int) -> None:
        if not access.write:
            self.out.setdefault(vcpu.vcpu_id, []).append(data)
        self.skip_emulated_instruction(vcpu, 4)

    def get_reg(self, vcpu: Vcpu, name: str) -> int:
        return self.regs.setdefault(vcpu.vcpu_id, {}).get(name, 0x202 if name == "rflags" else 0)

    def set_reg(self, vcpu: Vcpu, name: str, value: int) -> None:
        self.regs.setdefault(vcpu.vcpu_id, {})[name] = value

    def get_msr(self, vcpu: Vcpu, index: int) -> int | None:
        return self.msrs.get(index)

    def set_msr(self, vcpu: Vcpu, index: int, value: int) -> bool:
        if index not in self.msrs:
            return False
        self.msrs[index] = value
        return True

    def cpuid(self, vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return leaf + 1, 2, 3, 4

    def skip_emulated_instruction(self, vcpu: Vcpu, insn_len: int) -> None:
        ops = self.ops[vcpu.vcpu_id]
        if ops:
            ops.pop(0)
        self.set_reg(vcpu, "rip", self._rip(vcpu.vcpu_id) + insn_len)

    def interrupt_allowed(self, vcpu: Vcpu) -> bool:
        return self.allowed


class Machine:
    """A host, a VMM process with one anonymous area at BASE, a VM with one slot at gpa 0, vCPUs."""

    def __init__(
        self, *, pages: int = 64, vcpus: int = 1, breaks: tuple[str, ...] = (),
        params: dict[str, str] | None = None, ram: int = 16 << 20,
        swap: int | None = 16 << 20, seed: int | None = None, slot: bool = True, profile: str = "linux-6.18",
        dirty_ring: int = 0, vm_type: int = 0,
    ) -> None:
        self.stream = TraceStream()
        self.sched = Scheduler(self.stream)
        self.host = HostMm(
            self.sched, self.stream, ram_bytes=ram, swap_bytes=swap, profile=mm_profile.PROFILES[profile],
            checks=True,
        )
        self.process = self.host.create_process("vmm")
        self.pages = pages
        self.do(lambda: do_mmap(
            self.process.mm, BASE, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
        ))
        ad = (params or {}).get("kvm_intel.eptad", "1") == "1"
        self.cpu = ScriptedCpu(self.host, ad=ad)
        self.kvm = Kvm(
            self.host, self.process, self.cpu, profile=kvm_profile.PROFILES[profile], params=params or {},
            breaks=frozenset(breaks), checks=True, vm_type=vm_type,
        )
        if dirty_ring:
            self.kvm.enable_cap(KVM_CAP_DIRTY_LOG_RING, dirty_ring * KVM_DIRTY_GFN_SIZE)
        self.vcpus = [self.kvm.create_vcpu(n) for n in range(vcpus)]
        if slot:
            self.do(lambda: self.kvm.set_user_memory_region(0, 0, pages * PAGE, BASE))
        self.events: list[Event] = []
        self.stream.listen(Listener(("*",), self.events.append, ancestors=False))
        truths = self.kvm.truths
        assert truths is not None
        self.truths = truths
        self.sched.set_on_point(truths.on_point)
        if seed is not None:
            self.sched.set_strategy(RandomStrategy(seed, 4))

    @property
    def mm(self) -> Any:
        return self.process.mm

    def do(self, fn: Callable[[], Any], name: str = "vmm") -> Any:
        """Run `fn` as a task."""
        return self.sched.run_task(name, fn)

    def run_raw(self, *ops: Op, vcpu: int = 0) -> UserExit:
        """One KVM_RUN over these operations."""
        self.cpu.ops.setdefault(vcpu, []).extend(ops)
        exit_: UserExit = self.do(lambda: kvm_arch_vcpu_ioctl_run(self.vcpus[vcpu]), f"vcpu{vcpu}")
        return exit_

    def run(self, *ops: Op, vcpu: int = 0) -> list[int]:
        """Run the operations to their end; what the loads read."""
        self.cpu.out[vcpu] = []
        exit_ = self.run_raw(*ops, vcpu=vcpu)
        assert exit_.kind == "hlt", exit_
        return self.cpu.out[vcpu]

    def spawn(self, *ops: Op, vcpu: int = 0) -> Any:
        """Start the operations on a vCPU as a task of their own."""
        self.cpu.ops.setdefault(vcpu, []).extend(ops)
        return self.sched.spawn(f"vcpu{vcpu}", lambda: kvm_arch_vcpu_ioctl_run(self.vcpus[vcpu]), vcpu=vcpu)

    def finish(self, *tasks: Any) -> None:
        """Run until these tasks are done; raise their errors."""
        self.sched.run_until(lambda: all(t.done for t in tasks))
        for task in tasks:
            if task.error is not None:
                raise task.error

    def names(self, *, since: int = 0, system: str | None = None) -> list[str]:
        """Event names in order."""
        return [e.name for e in self.events[since:] if system is None or e.system == system]

    def last(self, name: str) -> Event:
        """The last event of that name."""
        return next(e for e in reversed(self.events) if e.name == name)

    def leaf(self, gfn: int, vcpu: int = 0) -> int:
        """The SPTE at the end of the walk of `gfn`."""
        return walk_sptes(self.kvm, gfn << 12, self.vcpus[vcpu])[-1][2]

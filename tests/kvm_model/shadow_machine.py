"""A scripted CPU without EPT, and a small VM whose guest has page tables of its own.

The CPU translates each operation by a walk of the shadow tables' real bytes with its own TLB, sets A and D
like hardware, and faults as it does; what KVM then does is the model's. Guest memory is as the programs lay
it out that recorded the real kernel: slot 0 holds the tables (PML4 at 0x2000, PDPT 0x3000, PD 0x4000, page
tables from 0x10000 on), slot 1 is the data at DATA_GPA, mapped by 4K guest pages at the same address.

    m = ShadowMachine()
    m.run(("w", DATA_GPA, 7), ("r", DATA_GPA))   # -> [7]
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT
from typing import Any

from host_mm import profile as mm_profile
from host_mm.host import HostMm
from host_mm.kernel.sched import RandomStrategy, Scheduler
from host_mm.madvise import MADV_NOHUGEPAGE, do_madvise
from host_mm.mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, do_mmap
from host_mm.uaccess import copy_from_user, copy_to_user
from kvm_model import profile as kvm_profile
from kvm_model import x86
from kvm_model.instrument import walk_sptes
from kvm_model.kvm_main import Kvm
from kvm_model.mmu.invalidate_addr import kvm_mmu_invlpg
from kvm_model.mmu.mmu import kvm_mmu_gva_to_gpa_write, kvm_mmu_page_fault
from kvm_model.mmu.mmu_internal import INVALID_PAGE, RET_PF_EMULATE, RET_PF_WRITE_PROTECTED
from kvm_model.mmu.mmu_roots import kvm_mmu_reload, kvm_mmu_reset_context
from kvm_model.mmu.shadow_roots import kvm_mmu_new_pgd
from kvm_model.requests import (
    IN_GUEST_MODE,
    KVM_REQ_EVENT,
    KVM_REQ_MMU_SYNC,
    KVM_REQ_TLB_FLUSH_CURRENT,
    KVM_REQ_TLB_FLUSH_GUEST,
    OUTSIDE_GUEST_MODE,
    kvm_clear_request,
    kvm_make_request,
)
from kvm_model.vcpu import Vcpu
from kvm_model.x86_emulate import emulator_write_phys
from tests.kvm_model.machine import ScriptedCpu
from trace_events.event import Event
from trace_events.stream import Listener, TraceStream

__all__ = [
    "DATA_GPA",
    "DATA_HVA",
    "MEM_HVA",
    "NX",
    "PAGE",
    "PS",
    "PT_GPA",
    "RW",
    "USER_4K",
    "A",
    "D",
    "P",
    "ShadowCpu",
    "ShadowMachine",
    "U",
]

PAGE = 4096
MEM_HVA, DATA_HVA = 0x7E0000000000, 0x7F0000000000
MEM_SIZE = 0x200000
DATA_GPA = 0x10000000
PML4_GPA, PDPT_GPA, PD_GPA, PT_GPA = 0x2000, 0x3000, 0x4000, 0x10000
P, RW, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
USER_4K = P | RW | U | A | D
_ADDR = 0x000F_FFFF_FFFF_F000
_RSVD = 0x000F_C000_0000_0000
CR0_PG, CR0_WP, CR0_PE = 1 << 31, 1 << 16, 1
CR4_PAE, CR4_PSE, CR4_PGE, CR4_PCIDE, CR4_SMEP, CR4_SMAP, CR4_LA57 = (
    1 << 5, 1 << 4, 1 << 7, 1 << 17, 1 << 20, 1 << 21, 1 << 12
)
EFER_LME, EFER_LMA, EFER_NX = 1 << 8, 1 << 10, 1 << 11
_CR4_ROLE_BITS = CR4_PSE | CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP
Op = tuple[Any, ...]
Fault = tuple[int, int]
TlbEntry = tuple[int, int, int]


class ShadowCpu(ScriptedCpu):
    """Walks shadow tables. `level[vcpu]`: of the root. `xtlb[vcpu]`: by (root, page, kind, user).

    Translations of other roots stay, as by their PCID they do on hardware.
    """

    def __init__(self, host: HostMm) -> None:
        super().__init__(host)
        self.level: dict[int, int] = {}
        self.xtlb: dict[int, dict[tuple[int, int, str, bool], TlbEntry]] = {}

    def load_mmu_pgd(self, vcpu: Vcpu, root_hpa: int, root_level: int = 4) -> None:
        self.root[vcpu.vcpu_id] = root_hpa
        self.level[vcpu.vcpu_id] = root_level

    def flush_tlb(self, vcpu: Vcpu) -> None:
        self.xtlb.setdefault(vcpu.vcpu_id, {}).clear()
        self.flushes[vcpu.vcpu_id] = self.flushes.get(vcpu.vcpu_id, 0) + 1

    def flush_tlb_gva(self, vcpu: Vcpu, gva: int) -> None:
        tlb = self.xtlb.setdefault(vcpu.vcpu_id, {})
        page = gva >> 12
        for key in [k for k, (_, first, pages) in tlb.items() if first <= page < first + pages]:
            del tlb[key]

    def reg(self, vcpu: Vcpu, name: str) -> int:
        return self.regs.setdefault(vcpu.vcpu_id, {}).get(name, 0)

    def translate(self, vcpu: Vcpu, gva: int, kind: str) -> int | Fault:
        """The host-physical address, or (error code, CR2)."""
        user = self.reg(vcpu, "cs") & 3 == 3
        key = self.root[vcpu.vcpu_id], gva >> 12, kind, user
        hit = self.xtlb.setdefault(vcpu.vcpu_id, {}).get(key)
        if hit is not None:
            return hit[0] << 12 | gva & 0xFFF
        return self._walk_x86(vcpu, gva, kind, user)

    def _walk_x86(self, vcpu: Vcpu, gva: int, kind: str, user: bool) -> int | Fault:
        u64 = self.host.ram.u64
        code = (2 if kind == "w" else 0) | (4 if user else 0) | (16 if kind == "x" else 0)
        level, table = self.level[vcpu.vcpu_id], self.root[vcpu.vcpu_id] >> 3
        if level == 3:
            entry = u64[table + (gva >> 30 & 3)]
            if not entry & P:
                return code, gva
            table, level = (entry & _ADDR) >> 3, 2
        rights, nx, path = RW | U, 0, []
        while True:
            at = table + (gva >> 12 + 9 * (level - 1) & 511)
            entry = u64[at]
            if not entry & P:
                return code, gva
            if entry & _RSVD or (entry & PS and level > 3):
                return code | 9, gva
            rights &= entry
            nx |= entry & NX
            path.append(at)
            if level == 1 or entry & PS:
                break
            table, level = (entry & _ADDR) >> 3, level - 1
        if not self._allowed(vcpu, rights, nx, kind, user):
            return code | 1, gva
        for at in path:
            u64[at] |= A
        if kind == "w":
            u64[path[-1]] |= D
        pages = 1 << 9 * (level - 1)
        first = gva >> 12 & ~(pages - 1)
        frame = ((entry & _ADDR) >> 12 & ~(pages - 1)) + (gva >> 12) - first
        self.xtlb[vcpu.vcpu_id][self.root[vcpu.vcpu_id], gva >> 12, kind, user] = frame, first, pages
        return frame << 12 | gva & 0xFFF

    def _allowed(self, vcpu: Vcpu, rights: int, nx: int, kind: str, user: bool) -> bool:
        paging = self.reg(vcpu, "cr0") & CR0_PG
        cr4 = self.reg(vcpu, "cr4") if paging else 0
        if user and not rights & U:
            return False
        if kind == "x":
            return not nx and (user or not (rights & U and cr4 & CR4_SMEP))
        if not user and rights & U and cr4 & CR4_SMAP:
            return False
        return kind == "r" or rights & RW != 0


class ShadowMachine:
    """A host, a VMM, a VM without EPT, vCPUs in long mode at CPL 3 with paging on.

    Operations: (r, gva), (w, gva, value[, length]), (x, gva), (invlpg, gva), (cr3, value[, noflush]), (cr0,
    value), (cr4, value), (cpl, n), (call, fn).
    """

    def __init__(
        self, *, vcpus: int = 1, breaks: tuple[str, ...] = (), params: dict[str, str] | None = None,
        ram: int = 48 << 20, swap: int | None = 16 << 20, data: int = 8 << 20, seed: int | None = None,
        profile: str = "linux-6.18", guest_huge: bool = False, nohuge: bool = True, checks: bool = True,
    ) -> None:
        self.stream = TraceStream()
        self.sched = Scheduler(self.stream)
        self.host = HostMm(
            self.sched, self.stream, ram_bytes=ram, swap_bytes=swap, profile=mm_profile.PROFILES[profile],
            checks=checks,
        )
        self.process = self.host.create_process("vmm")
        self.data = data
        for hva, size in ((MEM_HVA, MEM_SIZE), (DATA_HVA, data)):
            self.do(lambda hva=hva, size=size: do_mmap(
                self.process.mm, hva, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
            ))
        self.do(lambda: do_madvise(self.process.mm, MEM_HVA, MEM_SIZE, MADV_NOHUGEPAGE))
        if nohuge:
            self.do(lambda: do_madvise(self.process.mm, DATA_HVA, data, MADV_NOHUGEPAGE))
        self.cpu = ShadowCpu(self.host)
        self.kvm = Kvm(
            self.host, self.process, self.cpu, profile=kvm_profile.PROFILES[profile], params=params or {},
            breaks=frozenset(breaks), checks=checks, tdp_enabled=False,
        )
        self.vcpus = [self._vcpu(n) for n in range(vcpus)]
        self.do(lambda: self.kvm.set_user_memory_region(0, 0, MEM_SIZE, MEM_HVA))
        self.do(lambda: self.kvm.set_user_memory_region(1, DATA_GPA, data, DATA_HVA))
        self.do(lambda: self._lay_out(guest_huge))
        self.events: list[Event] = []
        self.stream.listen(Listener(("*",), self.events.append, ancestors=False))
        self.truths = self.kvm.truths
        if self.truths is not None:
            self.sched.set_on_point(self.truths.on_point)
        if seed is not None:
            self.sched.set_strategy(RandomStrategy(seed, 4))

    def _vcpu(self, n: int) -> Vcpu:
        self.cpu.regs[n] = {
            "cr0": CR0_PG | CR0_WP | CR0_PE, "cr3": PML4_GPA, "cr4": CR4_PAE,
            "efer": EFER_LME | EFER_LMA, "cs": 0x33, "rip": 0x1000, "rflags": 0x3002,
        }
        return self.kvm.create_vcpu(n)

    def _lay_out(self, guest_huge: bool) -> None:
        self.put(PML4_GPA, PDPT_GPA | P | RW | U)
        self.put(PDPT_GPA, PD_GPA | P | RW | U)
        for index in range(512):
            self.put(PD_GPA + 8 * index, index << 21 | P | RW | U | A | D | PS)
        if guest_huge:
            return
        for index in range(self.data >> 21):
            table = PT_GPA + (index << 12)
            self.put(PD_GPA + 8 * ((DATA_GPA >> 21) + index), table | P | RW | U)
            for page in range(512):
                self.put(table + 8 * page, DATA_GPA + (index << 21) + (page << 12) | USER_4K)

    # -- the host's side ------------------------------------------------------------------------

    def hva(self, gpa: int) -> int:
        """Where the VMM has it."""
        return gpa - DATA_GPA + DATA_HVA if gpa >= DATA_GPA else gpa + MEM_HVA

    def put(self, gpa: int, value: int, length: int = 8) -> None:
        """The VMM writes guest memory behind everybody's back, inside a task."""
        copy_to_user(self.process, self.hva(gpa), value.to_bytes(length, "little"))

    def get(self, gpa: int, length: int = 8) -> int:
        """The VMM reads guest memory, inside a task."""
        return int.from_bytes(copy_from_user(self.process, self.hva(gpa), length), "little")

    def host_write(self, gpa: int, value: int) -> None:
        """`put` as a task."""
        self.do(lambda: self.put(gpa, value))

    def do(self, fn: Callable[[], Any], name: str = "vmm") -> Any:
        """Run `fn` as a task."""
        return self.sched.run_task(name, fn)

    def madvise(self, gpa: int, length: int, advice: int) -> None:
        """madvise of the memory behind a gpa."""
        self.do(lambda: do_madvise(self.process.mm, self.hva(gpa), length, advice))

    # -- the guest's side -----------------------------------------------------------------------

    def run(self, *ops: Op, vcpu: int = 0) -> list[Any]:
        """Run the operations; what loads read, and ("pf", error code, CR2) for the guest's page faults."""
        out: list[Any] = self.do(lambda: self._run(self.vcpus[vcpu], ops), f"vcpu{vcpu}")
        return out

    def spawn(self, *ops: Op, vcpu: int = 0) -> Any:
        """Start the operations as a task of their own."""
        return self.sched.spawn(f"vcpu{vcpu}", lambda: self._run(self.vcpus[vcpu], ops), vcpu=vcpu)

    def finish(self, *tasks: Any) -> None:
        """Run until these tasks are done; raise their errors."""
        self.sched.run_until(lambda: all(t.done for t in tasks))
        for task in tasks:
            if task.error is not None:
                raise task.error

    def _run(self, vcpu: Vcpu, ops: tuple[Op, ...]) -> list[Any]:
        kvm = self.kvm
        out: list[Any] = []
        with vcpu.mutex:
            for op in ops:
                idx = kvm.srcu.read_lock()
                try:
                    self._execute(vcpu, op, out)
                finally:
                    if vcpu.srcu_idx < 0:
                        kvm.srcu.read_unlock(idx)
        return out

    def _execute(self, vcpu: Vcpu, op: Op, out: list[Any]) -> None:
        privileged = {
            "invlpg": lambda: kvm_mmu_invlpg(vcpu, op[1]),
            "cr3": lambda: self._set_cr3(vcpu, *op[1:]),
            "cr0": lambda: self._set_cr0(vcpu, op[1]),
            "cr4": lambda: self._set_cr4(vcpu, op[1]),
            "cpl": lambda: self.cpu.set_reg(vcpu, "cs", 0x30 | op[1]),
            "call": op[1],
        }.get(op[0])
        if privileged is not None:
            privileged()
            return
        while True:
            fault = self._enter(vcpu, op, out)
            if fault is None or self._exit(vcpu, op, out, fault):
                return

    def _enter(self, vcpu: Vcpu, op: Op, out: list[Any]) -> Fault | None:
        """One guest entry: None if the operation was carried out or must be tried anew after a kick."""
        kvm = self.kvm
        while True:
            if vcpu.requests:
                assert x86._service_requests(vcpu) == 1
            r = kvm_mmu_reload(vcpu)
            assert not r, r
            if kvm.truths is not None:
                kvm.truths.check()
            vcpu.kicked = False
            vcpu.mode = IN_GUEST_MODE
            if self.sched.preempt:
                self.sched.point("slice")
            if not vcpu.kicked and not vcpu.requests:
                break
            vcpu.mode = OUTSIDE_GUEST_MODE
        where = self.cpu.translate(vcpu, op[1], op[0])
        if isinstance(where, int):
            self._access(op, where, out)
            vcpu.mode = OUTSIDE_GUEST_MODE
            return None
        vcpu.mode = OUTSIDE_GUEST_MODE
        return where

    def _access(self, op: Op, hpa: int, out: list[Any]) -> None:
        ram = self.host.ram
        if op[0] == "r":
            out.append(int.from_bytes(ram.read(hpa, 8), "little"))
        elif op[0] == "w":
            length = op[3] if len(op) > 3 else 8
            ram.write(hpa, op[2].to_bytes(length, "little"))
        else:
            out.append("x")

    def _exit(self, vcpu: Vcpu, op: Op, out: list[Any], fault: Fault) -> bool:
        """Handle the CPU's page fault; whether the operation is over."""
        code, cr2 = fault
        vcpu.stat["exits"] += 1
        r = kvm_mmu_page_fault(vcpu, cr2, code)
        if r == -EFAULT:
            out.append(("efault", cr2))
            return True
        assert r >= 0, r
        if vcpu.exception.pending:
            vcpu.exception.pending = False
            kvm_clear_request(KVM_REQ_EVENT, vcpu)
            out.append(("pf", vcpu.exception.error_code, self.cpu.reg(vcpu, "cr2")))
            return True
        if r not in (RET_PF_EMULATE, RET_PF_WRITE_PROTECTED):
            self.sched.yield_()
            return False
        self._emulate(vcpu, op, out)
        self.cpu.set_reg(vcpu, "rip", self.cpu.reg(vcpu, "rip") + 4)
        return True

    def _emulate(self, vcpu: Vcpu, op: Op, out: list[Any]) -> None:
        if op[0] != "w":
            out.append(("mmio", vcpu.mmio_gfn))
            return
        gpa = kvm_mmu_gva_to_gpa_write(vcpu, op[1])
        assert gpa != INVALID_PAGE
        length = op[3] if len(op) > 3 else 8
        if not emulator_write_phys(vcpu, gpa, op[2].to_bytes(length, "little")):
            out.append(("mmio", gpa >> 12))

    # -- control registers, as kvm_set_cr3, kvm_post_set_cr0 and kvm_post_set_cr4 ---------------

    def _set_cr3(self, vcpu: Vcpu, value: int, noflush: bool = False) -> None:
        if value != self.cpu.reg(vcpu, "cr3"):
            kvm_mmu_new_pgd(vcpu, value)
            self.cpu.set_reg(vcpu, "cr3", value)
        if not noflush:
            kvm_make_request(KVM_REQ_MMU_SYNC, vcpu)
            kvm_make_request(KVM_REQ_TLB_FLUSH_CURRENT, vcpu)

    def _set_cr0(self, vcpu: Vcpu, value: int) -> None:
        old = self.cpu.reg(vcpu, "cr0")
        self.cpu.set_reg(vcpu, "cr0", value)
        changed = old ^ value
        if changed & CR0_PG and not value & CR0_PG:
            kvm_make_request(KVM_REQ_TLB_FLUSH_GUEST, vcpu)
        if changed & (CR0_PG | CR0_WP):
            kvm_mmu_reset_context(vcpu)

    def _set_cr4(self, vcpu: Vcpu, value: int) -> None:
        old = self.cpu.reg(vcpu, "cr4")
        self.cpu.set_reg(vcpu, "cr4", value)
        if (old ^ value) & _CR4_ROLE_BITS:
            kvm_mmu_reset_context(vcpu)
        if (old ^ value) & CR4_PGE:
            kvm_make_request(KVM_REQ_TLB_FLUSH_GUEST, vcpu)
        elif (old ^ value) & CR4_PAE or value & ~old & CR4_SMEP:
            kvm_make_request(KVM_REQ_TLB_FLUSH_CURRENT, vcpu)

    # -- looking --------------------------------------------------------------------------------

    def names(self, *, since: int = 0, system: str | None = None) -> list[str]:
        """Event names in order."""
        return [e.name for e in self.events[since:] if system is None or e.system == system]

    def last(self, name: str) -> Event:
        """The last event of that name."""
        return next(e for e in reversed(self.events) if e.name == name)

    def leaf(self, gva: int, vcpu: int = 0) -> int:
        """The SPTE at the end of the walk of `gva`; 0 without a walk."""
        steps = walk_sptes(self.kvm, gva, self.vcpus[vcpu])
        return steps[-1][2] if steps else 0

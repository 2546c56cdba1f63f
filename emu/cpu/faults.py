"""What a refused fill means: a fault, a VM exit, or only bookkeeping of translated code.

The read-modify-write rule: Unicorn asks for the read first, but hardware translates such an access
once, as a write. So a refused read whose instruction also writes is walked again as a write, and
that is what the guest or KVM hears of.

Fetching ahead: a block that runs into a page that cannot be fetched fails before its first
instruction ran. The instructions up to there are then run one by one, until the one that needs the
page is the first: only then is it a fault, with its exact RIP.

Code and data: fill.py names the protocol. A frame that is executed is not writable in any vCPU's
TLB. A store to one leaves Unicorn and makes it data again; if the very instruction lies in that
frame, that would go on for ever, so the frame becomes mixed (Unicorn then watches each store) or,
where Unicorn cannot, the one instruction runs alone with the frame open and its code is dropped.

Source: Intel SDM vol. 3A 4.7 (#PF), 6.15, 17.1.3 (self-modifying code: 8.1.3), vol. 3C 29.3.3.2.

Not modelled: the instruction queue (a store shows in the next instruction, as on current CPUs);
a jump to a non-canonical address is reported at the target, not at the jump.
"""

from __future__ import annotations

from typing import Any

from emu.cpu.fill import FillResult
from emu.cpu.fill_body import CODE_WRITE, FRAME_CODE, FRAME_DATA, FRAME_MIXED, NEW_CODE
from emu.cpu.insn import Decoder, is_read_modify_write, uses_stack_segment
from emu.cpu.memory import VECTOR_GP, VECTOR_SS, GuestFault, MemoryExit, raise_walk_failure
from emu.cpu.vcpu import UnicornVcpu
from emu.cpu.walk import (
    ACCESS_FETCH,
    ACCESS_WRITE,
    EPT_MISCONFIG,
    EPT_VIOLATION,
    NON_CANONICAL,
    OK,
    PAGE_FAULT,
    RIGHT_X,
)
from kvm_model.vmx.exits import REASON_EPT_MISCONFIG

__all__ = ["FillFailures"]

_M64 = (1 << 64) - 1
_FLIPS_UNTIL_MIXED = 8
_LONGEST_INSN = 15


class FillFailures:
    """Answers the refused fills of all vCPUs of one machine; they share what is known of code frames."""

    def __init__(self, vcpus: dict[int, UnicornVcpu], decoder: Decoder) -> None:
        self.vcpus = vcpus
        self.decoder = decoder
        self._flips: dict[int, int] = {}

    def handle(self, vcpu: UnicornVcpu, last: FillResult) -> None:
        """Put things right so that the vCPU can run on, or raise GuestFault or MemoryExit."""
        page = last.page & _M64
        if self.ahead(vcpu, last) and last.status != NEW_CODE:
            if vcpu.stepped_from != vcpu.env.eip:
                vcpu.stepped_from = vcpu.env.eip
                vcpu.intercepts.step_once()
                return
        vcpu.stepped_from = None
        if last.status == NEW_CODE:
            self._new_code(vcpu, page, last.hpa >> 12)
        elif last.status == CODE_WRITE:
            self._code_write(vcpu, page, last)
        else:
            self._fail(vcpu, page, last)

    @staticmethod
    def ahead(vcpu: UnicornVcpu, last: FillResult) -> bool:
        """Whether it was a fetch of another page than RIP's."""
        return bool(last.access & ACCESS_FETCH) and last.page & _M64 != vcpu.linear_rip & ~0xFFF

    # -- faults and exits -----------------------------------------------------------------------

    def _fail(self, vcpu: UnicornVcpu, page: int, last: FillResult) -> None:
        if last.access & ACCESS_FETCH:
            gva = vcpu.linear_rip if page == vcpu.linear_rip & ~0xFFF else page
            stack = False
        else:
            gva = vcpu.env.invalid_addr
            if gva & ~0xFFF != page:
                gva = page
            stack = last.status == NON_CANONICAL and self._through_stack(vcpu, gva)
        if last.descriptor and self._loads_descriptor(vcpu):
            vcpu.fill.implicit_page = page
            vcpu.intercepts.step_once()
            return
        result = (last.status, last.hpa, last.rights, last.a, last.b, last.c)
        if not last.access & (ACCESS_FETCH | ACCESS_WRITE) and last.status in (
            PAGE_FAULT, EPT_VIOLATION, EPT_MISCONFIG
        ) and is_read_modify_write(self.decode(vcpu)):
            result = vcpu.fill.walk(gva & ~0xFFF, vcpu.fill.access(ACCESS_WRITE))
            if result[0] == OK:
                return
        if result[0] == NON_CANONICAL:
            raise GuestFault(VECTOR_SS if stack else VECTOR_GP, 0)
        raise_walk_failure(result, gva, shadow=vcpu.fill.root != 0)

    def decode(self, vcpu: UnicornVcpu) -> Any:
        """The instruction at RIP, or None where its bytes cannot be had."""
        try:
            code = vcpu.memory.fetch(vcpu.linear_rip, _LONGEST_INSN)
        except (GuestFault, MemoryExit):
            return None
        return self.decoder.decode(code, vcpu.code_bits)

    def code_gone(self, vcpu: UnicornVcpu, device: int) -> bool:
        """Whether bytes of the instruction at RIP, which just ran, have lost their mapping since.

        `device` is the gpa of its device access: an instruction that lies there was never fetched.
        """
        try:
            return len(vcpu.memory.fetch(vcpu.linear_rip, _LONGEST_INSN)) < _LONGEST_INSN
        except MemoryExit as exit_:
            return exit_.reason != REASON_EPT_MISCONFIG and exit_.gpa >> 12 != device >> 12
        except GuestFault:
            return True

    def _through_stack(self, vcpu: UnicornVcpu, gva: int) -> bool:
        return uses_stack_segment(vcpu.env, self.decode(vcpu), gva, vcpu.long_code)

    def _loads_descriptor(self, vcpu: UnicornVcpu) -> bool:
        insn = self.decode(vcpu)
        return insn is not None and self.decoder.reads_descriptor(insn)

    # -- translated code ------------------------------------------------------------------------

    def _new_code(self, vcpu: UnicornVcpu, page: int, pfn: int) -> None:
        ram = vcpu.ram
        others = [v for v in self.vcpus.values() if v is not vcpu]
        mixed = ram.fetched[pfn] == FRAME_MIXED
        if ram.fetched[pfn] == FRAME_DATA or mixed:
            for v in self.vcpus.values():
                if v.fill.may_write(pfn):
                    v.intercepts.flush_tlb()
            # code made before the frame was last written as data
            vcpu.intercepts.drop_code(pfn)
        if mixed and any(pfn in v.fill.code.by_frame for v in others):
            # Unicorn watches stores for its own vCPU only
            ram.fetched[pfn] = FRAME_CODE
        vcpu.fill.mark_code(page, pfn)

    def _frames_at_rip(self, vcpu: UnicornVcpu) -> set[int]:
        access = vcpu.fill.access(ACCESS_FETCH)
        frames = set()
        for gva in {vcpu.linear_rip, (vcpu.linear_rip + _LONGEST_INSN - 1) & _M64}:
            result = vcpu.fill.walk(gva, access)
            if result[0] == OK:
                frames.add(result[1] >> 12)
        return frames

    def _code_write(self, vcpu: UnicornVcpu, page: int, last: FillResult) -> None:
        pfn = last.hpa >> 12
        fetched = vcpu.ram.fetched
        others = [v for v in self.vcpus.values() if v is not vcpu]
        flips = self._flips[pfn] = self._flips.get(pfn, 0) + 1
        executing = pfn in self._frames_at_rip(vcpu)
        if not executing and flips <= _FLIPS_UNTIL_MIXED:
            for v in self.vcpus.values():
                v.drop_code(pfn)
            fetched[pfn] = FRAME_DATA
            return
        shared = any(pfn in v.fill.code.by_frame for v in others)
        if last.rights & RIGHT_X and not shared:
            fetched[pfn] = FRAME_MIXED
            vcpu.fill.mark_code(page, pfn)
            return
        self._open_for_one_instruction(vcpu, pfn)

    def _open_for_one_instruction(self, vcpu: UnicornVcpu, pfn: int) -> None:
        for v in self.vcpus.values():
            if v is not vcpu:
                v.drop_code(pfn)
        vcpu.ram.fetched[pfn] = FRAME_DATA
        vcpu.opened = pfn
        vcpu.intercepts.step_once()

    def close_opened(self, vcpu: UnicornVcpu) -> None:
        """The one instruction ran, or stopped: the frame is code again and what was made of it is gone."""
        pfn = vcpu.opened
        if pfn is None:
            return
        vcpu.opened = None
        vcpu.ram.fetched[pfn] = FRAME_CODE
        vcpu.intercepts.drop_code(pfn)
        vcpu.intercepts.flush_tlb()

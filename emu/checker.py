"""The truths of all floors, checked while a host runs.

Incrementally at scheduling points: each floor notes what it stored to, and the noted entries are
looked at here. A full sweep every now and then and at the end must find nothing that the
increments did not. host_mm's own rules are in host_mm/truths.py, KVM's in kvm_model/truths.py; this
floor adds the one that needs to see the CPU:

    stale-translation   a frame is freed while a vCPU that is in guest mode, or that could enter
                        without a flush, holds a translation to it filled since its last flush

    write-tracked       a vCPU as above holds a writable translation to a page whose writes a device tracks

Not modelled: translations that Unicorn dropped by itself still count as held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from host_mm.truths import audit, nothing_left

if TYPE_CHECKING:
    from emu.board import Board
    from emu.host import Host

__all__ = ["Checker"]

SWEEP_EVERY = 4096
"""Scheduling points between two full sweeps of the SPTEs, at least."""
POINTS_PER_LEAF = 8
"""A sweep looks at every leaf; with many of them it waits for as many more points."""


class Checker:
    """Watches one host. Raises BrokenTruth from the point at which a rule is found broken."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.points = 0
        self.sweeps = 0
        self._next_sweep = SWEEP_EVERY
        self.frames_freed = 0
        host.mm.free_hooks.append(self.frame_freed)
        host.sched.set_on_point(self.point)

    def point(self, kind: str) -> None:
        """A scheduling point: check what was noted since the last."""
        self.points += 1
        for board in self.host.boards:
            truths = board.kvm.truths
            if truths is not None:
                truths.check()
            if board.gpus and board.kvm.mmu_lock.owner is None:
                self._check_tracked(board)
        if self.points >= self._next_sweep:
            self._next_sweep = self.points + max(SWEEP_EVERY, POINTS_PER_LEAF * self._sweep_all())

    def _check_tracked(self, board: Board) -> None:
        for slot in board.kvm.slots():
            for index in slot.gfn_write_track:
                pfn = board.vmm.present_pfn(slot.userspace_addr + (index << 12))
                if pfn >= 0 and any(board.cpu.may_store(vcpu, pfn) for vcpu in board.vcpus):
                    what = f"gfn {slot.base_gfn + index:#x} is tracked and can be written unseen"
                    raise BrokenTruth("write-tracked", what, self.host.stream.here())

    def _sweep_all(self) -> int:
        self.sweeps += 1
        truths = [board.kvm.truths for board in self.host.boards]
        return sum(each.sweep() for each in truths if each is not None)

    def frame_freed(self, pfn: int, order: int) -> None:
        """A free hook: no CPU may still reach the frames."""
        self.frames_freed += 1 << order
        for board in self.host.boards:
            if board.closing:
                # kvm_mmu_notifier_release flushes nothing: KVM_RUN cannot be reached any more.
                continue
            for vcpu in board.vcpus:
                for frame in range(pfn, pfn + (1 << order)):
                    if board.cpu.may_translate(vcpu, frame):
                        raise BrokenTruth(
                            "stale-translation",
                            f"pfn {frame:#x} is freed while vCPU {vcpu.vcpu_id} still translates to it",
                            self.host.stream.here(),
                        )

    def sweep(self) -> None:
        """Everything at once, with nobody inside the host kernel."""
        self.point("sweep")
        self._sweep_all()

    def audit(self) -> None:
        """References and counts, once no daemon works and no I/O is under way."""
        self.rest()
        audit(self.host.mm)

    def leaks(self) -> None:
        """Every VM is gone: nothing may be left of them, nor of what they asked of the host."""
        self.host.sched.run_task("shutdown", self.host.mm.shutdown)
        nothing_left(self.host.mm)

    def rest(self) -> None:
        """Bring the host's mm to rest."""
        self.host.sched.run_task("rest", self.host.mm.quiesce)

    def counts(self) -> dict[str, int]:
        """How much was checked."""
        return {"points": self.points, "sweeps": self.sweeps, "frames_freed": self.frames_freed}

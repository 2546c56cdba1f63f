"""Drops SPTEs at any scheduling point, as KVM may: with its own zap, under mmu_lock, with a flush."""

from __future__ import annotations

import random

from emu.board import Board
from kvm_model.mmu.gfn_range import kvm_zap_gfn_range_locked

__all__ = ["Zapper"]

LENGTHS = (1, 1, 4, 64, 1 << 20)


class Zapper:
    """Hangs itself behind the checker at the scheduling points of `board`'s host; one point in `one_in`."""

    def __init__(self, board: Board, seed: int, one_in: int) -> None:
        self.board = board
        self.rng = random.Random(seed)
        self.one_in = one_in
        self.zaps = 0
        self.sched = board.host.sched
        checker = board.host.checker
        assert checker is not None
        self.check = checker.point
        self.sched.set_on_point(self.point)

    def point(self, kind: str) -> None:
        """A scheduling point: another CPU gets in between, or does not."""
        self.check(kind)
        kvm = self.board.kvm
        if self.board.closing or self.sched.current is self.sched.main or self.rng.randrange(self.one_in):
            return
        if not kvm.mmu_lock.trylock():
            return
        sched, strategy = self.sched, self.sched.strategy
        # The other CPU is done before this one goes on.
        sched.set_on_point(None)
        sched.set_strategy(None)
        try:
            slot = self.rng.choice(list(kvm.slots().id_hash.values()))
            start = slot.base_gfn + self.rng.randrange(slot.npages)
            if kvm_zap_gfn_range_locked(kvm, start, start + self.rng.choice(LENGTHS)):
                self.zaps += 1
                kvm.kvm_flush_remote_tlbs()
            kvm.mmu_lock.unlock()
        finally:
            sched.set_on_point(self.point)
            sched.set_strategy(strategy)

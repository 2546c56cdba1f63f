"""RCU for the MMU's lockless walkers: table pages live until no walker is inside.

Source of truth: arch/x86/kvm/mmu/tdp_iter.h (why TDP SPTEs are RCU protected), include/linux/
rcupdate.h; Linux 6.18. A grace period here is over when nobody is in a read section at all, which is
never earlier than the kernel's.

Not modelled: per-CPU quiescent states, expedited grace periods.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Rcu"]


class Rcu:
    """rcu_read_lock and call_rcu. Read sections nest and may overlap."""

    __slots__ = ("_callbacks", "_readers")

    def __init__(self) -> None:
        self._readers = 0
        self._callbacks: list[Callable[[], None]] = []

    def read_lock(self) -> None:
        """Enter a read section."""
        self._readers += 1

    def read_unlock(self) -> None:
        """Leave it; the last reader out runs what waits."""
        self._readers -= 1
        if not self._readers and self._callbacks:
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    def call_rcu(self, callback: Callable[[], None]) -> None:
        """Run `callback` after a grace period."""
        if self._readers:
            self._callbacks.append(callback)
        else:
            callback()

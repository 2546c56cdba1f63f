"""What the emulator does for the scenarios of dirty tracking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refault.scenarios.layout import DATA_GPA

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emu.board import Board

__all__ = ["DirtySteps"]

_SLOT = 1


class DirtySteps:
    """The steps, for a back end that has `board` and can enter the host."""

    board: Board

    def _host(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def _ioctl(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def log_dirty(self, on: bool) -> Any:
        """KVM_MEM_LOG_DIRTY_PAGES of the data slot."""
        memory = self.board.memory
        return self._ioctl(lambda: memory.set_logging(memory.region_of(DATA_GPA), on))

    def get_dirty_log(self) -> Any:
        """KVM_GET_DIRTY_LOG of the data slot."""
        found = self._ioctl(lambda: self.board.kvm.get_dirty_log(_SLOT))
        if isinstance(found, str):
            return found
        bits = int.from_bytes(found, "little")
        return [page for page in range(bits.bit_length()) if bits >> page & 1]

    def count_dirty_log(self) -> Any:
        """The same, shown by its length and first pages."""
        found = self.get_dirty_log()
        return found if isinstance(found, str) else f"{len(found)} pages {found[:6]}"

    def enable_manual_protect(self, value: int) -> Any:
        """KVM_ENABLE_CAP."""
        return self._ioctl(lambda: self.board.kvm.enable_cap(168, value)) or 0

    def clear_dirty_log(self, first: int, count: int, pages: Sequence[int]) -> Any:
        """KVM_CLEAR_DIRTY_LOG."""
        mask = sum(1 << (page - first) for page in pages).to_bytes((count + 63) // 64 * 8, "little")
        return self._ioctl(lambda: self.board.kvm.clear_dirty_log(_SLOT, first, mask, count)) or 0

    def dirty_ring(self) -> Any:
        """The first entries of vCPU 0's ring."""
        ring = self.board.vcpus[0].dirty_ring
        assert ring is not None
        return [ring.read(n) for n in range(6)]

    def reset_dirty_rings(self) -> Any:
        """Harvest the first entries and KVM_RESET_DIRTY_RINGS."""
        ring = self.board.vcpus[0].dirty_ring
        assert ring is not None
        for n in range(8):
            if ring.read(n)[0] & 1:
                ring.set_flags(n, 2)
        return self._ioctl(self.board.kvm.reset_dirty_rings)

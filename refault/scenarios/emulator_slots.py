"""What the emulator does for a scenario's memory slots: KVM_SET_USER_MEMORY_REGION, as the VMM likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from refault.scenarios.layout import DATA_GPA, MORE_OFFSET

if TYPE_CHECKING:
    from emu.board import Board
    from refault.scenarios.normal import Normalizer

__all__ = ["SlotSteps"]


class SlotSteps:
    """The steps, for a back end that has `board`, `data_hva` and can enter the host."""

    board: Board
    data_hva: int
    normal: Normalizer
    more: int = MORE_OFFSET

    def _host(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def _ioctl(self, call: Callable[[], Any]) -> Any:
        result = self._host(call)
        return result.removeprefix("errno ") if isinstance(result, str) else result

    def memory_for_slot(self, size: int) -> int:
        """Fresh memory of the VMM's."""
        offset, self.more = self.more, self.more + (size + 0x1FFFFF & ~0x1FFFFF)
        self._host(lambda: self.board.vmm.mmap(size, 3, self.data_hva + offset))
        self.normal.slots.append((offset, offset + size))
        return offset

    def set_slot(self, slot: int, offset: int, size: int, memory: int, flags: int) -> Any:
        """KVM_SET_USER_MEMORY_REGION."""
        gpa, hva = DATA_GPA + offset, self.data_hva + memory
        kvm, regions = self.board.kvm, self.board.memory.regions
        answer = self._ioctl(lambda: kvm.set_user_memory_region(slot, gpa, size, hva, flags))
        if answer is None and slot < len(regions):
            region = regions[slot]
            region.deleted = not size
            if size:
                region.gpa, region.size, region.hva, region.flags = gpa, size, hva, flags
        return answer

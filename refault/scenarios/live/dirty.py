"""What a real KVM does for the scenarios of dirty tracking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refault.scenarios.layout import DATA_GPA, DATA_SIZE, PAGE
from refault.scenarios.live.kvm import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES
from refault.scenarios.live.slots import answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refault.scenarios.live.kvm import Vcpu, Vm

__all__ = ["DirtySteps"]

_SLOT = 1


class DirtySteps:
    """The steps, for a back end that has `vm`, `vcpu` and `data`, the address of D."""

    vm: Vm
    vcpu: Vcpu
    data: int

    def log_dirty(self, on: bool) -> Any:
        """KVM_MEM_LOG_DIRTY_PAGES of the data slot."""
        flags = KVM_MEM_LOG_DIRTY_PAGES if on else 0
        return answer(lambda: self.vm.set_slot(_SLOT, DATA_GPA, DATA_SIZE, self.data, flags))

    def get_dirty_log(self) -> Any:
        """KVM_GET_DIRTY_LOG of the data slot."""
        return answer(lambda: self.vm.get_dirty_log(_SLOT, DATA_SIZE // PAGE))

    def count_dirty_log(self) -> Any:
        """The same, shown by its length and first pages."""
        found = self.get_dirty_log()
        return found if isinstance(found, str) else f"{len(found)} pages {found[:6]}"

    def enable_manual_protect(self, value: int) -> Any:
        """KVM_ENABLE_CAP."""
        return answer(lambda: self.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, value)) or 0

    def clear_dirty_log(self, first: int, count: int, pages: Sequence[int]) -> Any:
        """KVM_CLEAR_DIRTY_LOG."""
        mask = sum(1 << (page - first) for page in pages).to_bytes((count + 63) // 64 * 8, "little")
        return answer(lambda: self.vm.clear_dirty_log(_SLOT, first, count, mask)) or 0

    def dirty_ring(self) -> Any:
        """The first entries of the vCPU's ring."""
        return [self.vcpu.dirty_gfn(n) for n in range(6)]

    def reset_dirty_rings(self) -> Any:
        """Harvest the first entries and KVM_RESET_DIRTY_RINGS."""
        for n in range(8):
            if self.vcpu.dirty_gfn(n)[0] & 1:
                self.vcpu.set_dirty_gfn_flags(n, 2)
        return answer(self.vm.reset_dirty_rings)

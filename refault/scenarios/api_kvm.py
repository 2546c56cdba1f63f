"""What a scenario can do of KVM's own: instructions, the guest's tables, memory slots, dirty tracking.

A part of api.py's Scenario, whose conventions hold here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refault.scenarios.layout import DATA_GPA, DATA_SIZE

if TYPE_CHECKING:
    from refault.scenarios.backend import Backend

__all__ = ["KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY", "KvmSteps", "pte"]

KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY = 1, 2


def pte(offset: int, bits: int) -> int:
    """A page-table entry of the guest for D + offset: 0x67 is present, writable, user, accessed, dirty."""
    return DATA_GPA + offset | bits


class KvmSteps:
    """The steps, for a class that has a back end."""

    backend: Backend

    def _step(self, title: str, method: str, *args: Any) -> Any:
        raise NotImplementedError

    # -- the guest ----------------------------------------------------------------------------

    def insn(self, code: str, offset: int, note: str = "", *, rax: int = 0, rcx: int = 0) -> Any:
        """One guest instruction, by a name of guest.INSTRUCTIONS or in hex; RSI and RDI are at D + offset."""
        title = f"guest {code} D+{offset:#x} {note}"
        self.backend.mark(f">> {title}")
        result = self.backend.instruction(code, offset, rax=rax, rcx=rcx)
        self.backend.mark(f"<< {title}: {result}")
        return result

    def fetch(self, offset: int, title: str = "") -> Any:
        """The guest executes what is at D + offset; it must end in `out 0xf4, al`, hex e6f4."""
        return self._step(title or f"guest fetch D+{offset:#x}", "fetch", offset)

    def complete(self, title: str = "complete", *, value: int = 0x1000) -> Any:
        """The VMM answers an MMIO exit; a load gets `value`, as the recordings' did."""
        return self._step(title, "complete", value)

    def loop(
        self, offset: int, count: int, title: str = "guest loop",
        beside: Sequence[tuple[int, str, tuple[Any, ...]]] = (),
    ) -> Any:
        """A guest loop of stores to two pages, and what another thread of the VMM does meanwhile."""
        return self._step(title, "loop", offset, count, beside)

    def poke(self, offset: int, data: bytes) -> None:
        """The VMM stores bytes; no step."""
        self.backend.poke(offset, data)

    def gpte(self, offset: int, bits: int, to: int | None = None) -> None:
        """The VMM stores the guest's PTE of D + offset, to D + `to`, or to where it was; no step."""
        self.backend.poke_pte(offset, pte(offset if to is None else to, bits) if bits else 0)

    def st_pte(self, offset: int, entry: int, title: str = "") -> Any:
        """The guest stores its PTE of D + offset."""
        return self._step(title or f"guest st PTE of D+{offset:#x} := {entry:#x}", "store_pte", offset, entry)

    def load_cr3(self, root: int = 0x2000, title: str = "SET_SREGS reload cr3 (flush)") -> Any:
        """KVM_SET_SREGS with that CR3."""
        return self._step(title, "load_cr3", root)

    # -- memory slots -------------------------------------------------------------------------

    def memory_for_slot(self, size: int) -> int:
        """Fresh memory that no slot shows; its offset from D in the VMM. No step."""
        return self.backend.memory_for_slot(size)

    def set_slot(
        self, title: str = "", slot: int = 1, offset: int = 0, size: int = DATA_SIZE, memory: int = 0,
        flags: int = 0,
    ) -> Any:
        """KVM_SET_USER_MEMORY_REGION: the VMM's memory at D + `memory` is the guest's at D + `offset`."""
        title = title or f"slot {slot} := D+{offset:#x},{size:#x} flags {flags}"
        return self._step(title, "set_slot", slot, offset, size, memory, flags)

    def delete_slot(self, title: str = "", slot: int = 1, offset: int = 0) -> Any:
        """KVM_SET_USER_MEMORY_REGION with size 0."""
        return self._step(title or f"delete slot {slot}", "set_slot", slot, offset, 0, 0, 0)

    def guest_memfd(self, size: int, flags: int, title: str = "") -> Any:
        """KVM_CREATE_GUEST_MEMFD."""
        title = title or f"KVM_CREATE_GUEST_MEMFD size={size:#x} flags={flags}"
        return self._step(title, "create_guest_memfd", size, flags)

    def mmap_guest_memfd(self, title: str = "") -> Any:
        """The VMM maps the guest_memfd."""
        return self._step(title or "mmap guest_memfd", "mmap_guest_memfd")

    def set_guest_memfd_slot(self, slot: int, offset: int, title: str = "") -> Any:
        """KVM_SET_USER_MEMORY_REGION2 of the guest_memfd."""
        title = title or f"slot {slot} guest_memfd at D+{offset:#x}"
        return self._step(title, "set_guest_memfd_slot", slot, offset)

    def read_guest_memfd(self, offset: int, title: str = "") -> Any:
        """The VMM reads through its mapping."""
        return self._step(title or f"host read guest_memfd+{offset:#x}", "read_guest_memfd", offset)

    def punch_guest_memfd(self, offset: int, length: int, title: str = "") -> Any:
        """A hole in the guest_memfd."""
        title = title or f"PUNCH_HOLE guest_memfd+{offset:#x},{length:#x}"
        return self._step(title, "punch_guest_memfd", offset, length)

    # -- dirty tracking -----------------------------------------------------------------------

    def log_dirty(self, on: bool) -> Any:
        """Logging of the data slot begins or ends."""
        return self._step(f"slot flags {'|=' if on else '-='} LOG_DIRTY", "log_dirty", on)

    def get_dirty_log(self, title: str = "GET_DIRTY_LOG") -> Any:
        """KVM_GET_DIRTY_LOG."""
        return self._step(title, "get_dirty_log")

    def count_dirty_log(self, note: str = "") -> Any:
        """KVM_GET_DIRTY_LOG, of many pages."""
        return self._step(f"GET_DIRTY_LOG {note}", "count_dirty_log")

    def manual_protect(self, value: int) -> Any:
        """Manual protection."""
        title = f"ENABLE_CAP MANUAL_DIRTY_LOG_PROTECT2={value}"
        return self._step(title, "enable_manual_protect", value)

    def clear_dirty_log(self, first: int, count: int, pages: Sequence[int]) -> Any:
        """KVM_CLEAR_DIRTY_LOG."""
        shown = list(pages) if len(pages) < 9 else pages
        title = f"CLEAR_DIRTY_LOG first={first} num={count} pages={shown}"
        return self._step(title, "clear_dirty_log", first, count, pages)

    def dirty_ring(self, title: str = "") -> Any:
        """What is in the ring."""
        return self._step(title or "dirty ring", "dirty_ring")

    def reset_dirty_rings(self) -> Any:
        """Harvest and reset."""
        return self._step("KVM_RESET_DIRTY_RINGS", "reset_dirty_rings")

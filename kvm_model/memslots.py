"""Memory slots: the map from guest frames to host virtual addresses.

Source of truth: include/linux/kvm_host.h (kvm_memory_slot, kvm_memslots, gfn_to_hva), virt/kvm/
kvm_main.c (kvm_replace_memslot, search_memslots, mark_page_dirty_in_slot), arch/x86/kvm/x86.c:
kvm_alloc_memslot_metadata (lpage_info), mmu/page_track.c: kvm_gfn_is_write_tracked; Linux 6.18.

Each address space has two sets of slots; an update changes the inactive one and swaps. The hva
"interval tree" is a list sorted by start with the running maximum of ends: slots are few, and two
may share host addresses.

Not modelled: last_used_slot of each vCPU (a set has one for all), the generation's bits by address space.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING

from kvm_model.dirty_ring import kvm_dirty_ring_push
from kvm_model.mmu.spte import PG_LEVEL_1G, PG_LEVEL_2M, kvm_pages_per_hpage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_model.guest_memfd import KvmGmem
    from kvm_model.mmu.rmap import RmapHead
    from kvm_model.vcpu import Vcpu

__all__ = [
    "KVM_LPAGE_MIXED_FLAG", "KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS", "KVM_MEMSLOT_GMEM_ONLY",
    "KVM_MEMSLOT_INVALID", "KVM_MEM_GUEST_MEMFD", "KVM_MEM_LOG_DIRTY_PAGES",
    "KVM_MEM_MAX_NR_PAGES", "KVM_MEM_READONLY", "KVM_MEM_SLOTS_NUM", "KVM_USER_MEM_SLOTS",
    "KvmMemorySlot", "KvmMemslots", "alloc_lpage_info", "hva_to_gfn_memslot", "kvm_gfn_is_write_tracked",
    "kvm_mmu_gfn_allow_lpage",
    "kvm_mmu_gfn_disallow_lpage", "kvm_slot_dirty_track_enabled", "lpage_disallowed",
    "mark_page_dirty_in_slot",
]

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2
KVM_MEMSLOT_INVALID = 1 << 16
KVM_MEMSLOT_GMEM_ONLY = 1 << 17
KVM_LPAGE_MIXED_FLAG = 1 << 31
KVM_MEM_SLOTS_NUM = 32767
KVM_USER_MEM_SLOTS = KVM_MEM_SLOTS_NUM - 3
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS = 1 << 63


class KvmMemorySlot:
    """struct kvm_memory_slot. `dirty_bitmap` holds one bit a page, little-endian, in 64-bit words.

    `lpage_info[level - 2]` counts, per huge page of that level, the reasons not to map it huge. `rmap[level
    - 1]` has the rmap heads that hold something, by the index of their gfn at that level. `gfn_write_track`
    has how many want to hear of the writes to a page of the slot, where that is anybody. `gmem` is the
    guest_memfd that it shows from page `gmem_pgoff` on, None: none, or it was closed.
    """

    __slots__ = (
        "as_id", "base_gfn", "dirty_bitmap", "flags", "gfn_write_track", "gmem", "gmem_pgoff", "id",
        "lpage_info", "npages", "rmap", "userspace_addr",
    )

    def __init__(self, as_id: int, id_: int, base_gfn: int, npages: int, flags: int, hva: int) -> None:
        self.as_id = as_id
        self.id = id_
        self.base_gfn = base_gfn
        self.npages = npages
        self.flags = flags
        self.userspace_addr = hva
        self.dirty_bitmap: bytearray | None = None
        self.lpage_info: tuple[array[int], ...] = ()
        self.rmap: tuple[dict[int, RmapHead], ...] = ({}, {}, {})
        self.gfn_write_track: dict[int, int] = {}
        self.gmem: KvmGmem | None = None
        self.gmem_pgoff = 0

    @property
    def end_gfn(self) -> int:
        """One past the last gfn."""
        return self.base_gfn + self.npages

    @property
    def gmem_only(self) -> bool:
        """kvm_memslot_is_gmem_only: even shared memory is the guest_memfd's."""
        return self.flags & KVM_MEMSLOT_GMEM_ONLY != 0

    def gfn_to_hva(self, gfn: int) -> int:
        """__gfn_to_hva_memslot."""
        return self.userspace_addr + ((gfn - self.base_gfn) << 12)

    def dirty_bitmap_bytes(self) -> int:
        """Size of a bitmap of this slot: whole 64-bit words."""
        return (self.npages + 63) // 64 * 8

    def copy(self) -> KvmMemorySlot:
        """kvm_copy_memslot."""
        new = KvmMemorySlot(self.as_id, self.id, self.base_gfn, self.npages, self.flags, self.userspace_addr)
        new.dirty_bitmap = self.dirty_bitmap
        new.gmem, new.gmem_pgoff = self.gmem, self.gmem_pgoff
        new.take_arch(self)
        return new

    def take_arch(self, old: KvmMemorySlot) -> None:
        """Have the same `arch` part as `old`, for the same gfns."""
        self.lpage_info = old.lpage_info
        self.rmap = old.rmap
        self.gfn_write_track = old.gfn_write_track

    def __repr__(self) -> str:
        return (
            f"<KvmMemorySlot {self.id} gfn {self.base_gfn:#x}+{self.npages:#x} hva {self.userspace_addr:#x} "
            f"flags {self.flags:#x}>"
        )


def hva_to_gfn_memslot(hva: int, slot: KvmMemorySlot) -> int:
    """The gfn whose host address is `hva`."""
    return slot.base_gfn + ((hva - slot.userspace_addr) >> 12)


def kvm_slot_dirty_track_enabled(slot: KvmMemorySlot) -> bool:
    """Whether writes to this slot are logged."""
    return slot.flags & KVM_MEM_LOG_DIRTY_PAGES != 0


def mark_page_dirty_in_slot(vcpu: Vcpu, slot: KvmMemorySlot | None, gfn: int) -> None:
    """Note that `vcpu` writes to `gfn`: in its ring or the slot's bitmap, if the slot is logged."""
    if slot is None or not slot.flags & KVM_MEM_LOG_DIRTY_PAGES:
        return
    rel = gfn - slot.base_gfn
    if vcpu.dirty_ring is not None:
        kvm_dirty_ring_push(vcpu, slot.as_id << 16 | slot.id, rel)
    elif slot.dirty_bitmap is not None:
        slot.dirty_bitmap[rel >> 3] |= 1 << (rel & 7)


def alloc_lpage_info(slot: KvmMemorySlot) -> None:
    """Forbid huge mappings at unaligned ends, or everywhere if gfn and hva do not align alike."""
    infos = []
    ugfn = slot.userspace_addr >> 12
    for level in (PG_LEVEL_2M, PG_LEVEL_1G):
        pages = kvm_pages_per_hpage(level)
        shift = 9 * (level - 1)
        lpages = ((slot.end_gfn - 1) >> shift) - (slot.base_gfn >> shift) + 1
        if (slot.base_gfn ^ ugfn) & (pages - 1):
            info = array("I", [1]) * lpages
        else:
            info = array("I", [0]) * lpages
            if slot.base_gfn & (pages - 1):
                info[0] = 1
            if slot.end_gfn & (pages - 1):
                info[-1] = 1
        infos.append(info)
    slot.lpage_info = tuple(infos)


def lpage_disallowed(slot: KvmMemorySlot, gfn: int, level: int) -> bool:
    """Whether the huge page of `level` around `gfn` may not be mapped huge."""
    shift = 9 * (level - 1)
    return slot.lpage_info[level - 2][(gfn >> shift) - (slot.base_gfn >> shift)] != 0


def kvm_gfn_is_write_tracked(slot: KvmMemorySlot | None, gfn: int) -> bool:
    """Whether a write to `gfn` must be emulated. Faults ask without a lock, and once more under mmu_lock."""
    return slot is not None and bool(slot.gfn_write_track) and gfn - slot.base_gfn in slot.gfn_write_track


def _update_disallow_lpage(slot: KvmMemorySlot, gfn: int, count: int) -> None:
    for level in (PG_LEVEL_2M, PG_LEVEL_1G):
        shift = 9 * (level - 1)
        slot.lpage_info[level - 2][(gfn >> shift) - (slot.base_gfn >> shift)] += count


def kvm_mmu_gfn_disallow_lpage(slot: KvmMemorySlot, gfn: int) -> None:
    """One more reason not to map `gfn` by a huge page; mmu_lock is held for write."""
    _update_disallow_lpage(slot, gfn, 1)


def kvm_mmu_gfn_allow_lpage(slot: KvmMemorySlot, gfn: int) -> None:
    """One reason less."""
    _update_disallow_lpage(slot, gfn, -1)


class KvmMemslots:
    """struct kvm_memslots: one set of slots of one address space, with its generation."""

    __slots__ = (
        "_bases", "_by_gfn", "_by_hva", "_hva_max_end", "_hva_starts", "_last", "generation", "id_hash",
    )

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.id_hash: dict[int, KvmMemorySlot] = {}
        self._by_gfn: list[KvmMemorySlot] = []
        self._bases: list[int] = []
        self._by_hva: list[KvmMemorySlot] = []
        self._hva_starts: list[int] = []
        self._hva_max_end: list[int] = []
        self._last: KvmMemorySlot | None = None

    def replace(self, old: KvmMemorySlot | None, new: KvmMemorySlot | None) -> None:
        """kvm_replace_memslot: take `old` out and put `new` in, either may be None."""
        if old is not None:
            del self.id_hash[old.id]
        if new is not None:
            self.id_hash[new.id] = new
        slots = self.id_hash.values()
        self._by_gfn = sorted(slots, key=lambda s: s.base_gfn)
        self._bases = [s.base_gfn for s in self._by_gfn]
        self._by_hva = sorted(slots, key=lambda s: (s.userspace_addr, s.base_gfn))
        self._hva_starts = [s.userspace_addr for s in self._by_hva]
        self._hva_max_end = []
        top = 0
        for slot in self._by_hva:
            top = max(top, slot.userspace_addr + (slot.npages << 12))
            self._hva_max_end.append(top)
        self._last = None

    def gfn_to_memslot(self, gfn: int) -> KvmMemorySlot | None:
        """The slot that holds `gfn`, one that is being deleted included."""
        slot = self._last
        if slot is not None and slot.base_gfn <= gfn < slot.base_gfn + slot.npages:
            return slot
        index = bisect_right(self._bases, gfn) - 1
        if index < 0:
            return None
        slot = self._by_gfn[index]
        if gfn >= slot.base_gfn + slot.npages:
            return None
        self._last = slot
        return slot

    def in_gfn_range(self, start: int, end: int) -> Iterator[KvmMemorySlot]:
        """Slots that overlap [start, end), by gfn."""
        index = max(bisect_right(self._bases, start) - 1, 0)
        for slot in self._by_gfn[index:]:
            if slot.base_gfn >= end:
                return
            if slot.base_gfn + slot.npages > start:
                yield slot

    def in_hva_range(self, start: int, last: int) -> list[KvmMemorySlot]:
        """kvm_for_each_memslot_in_hva_range: slots that overlap [start, last], by host address."""
        if not self._by_hva:
            return []
        low = bisect_right(self._hva_max_end, start)
        high = bisect_right(self._hva_starts, last)
        return [
            slot for slot in self._by_hva[low:high]
            if slot.userspace_addr + (slot.npages << 12) > start
        ]

    def __iter__(self) -> Iterator[KvmMemorySlot]:
        return iter(self._by_gfn)

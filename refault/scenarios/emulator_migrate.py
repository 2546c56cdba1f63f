"""What the emulator does for the scenarios of migration and compaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvm_model.instrument import leaf_spte
from refault.scenarios.layout import DATA_GPA, DATA_SIZE, PAGE

if TYPE_CHECKING:
    from emu.board import Board
    from host_mm.mmzone import Zone

__all__ = ["MigrateSteps"]


class MigrateSteps:
    """The steps, for a back end that has `board`, `data_hva` and can enter the host."""

    board: Board
    data_hva: int
    stats_before: dict[str, int]

    def _host(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def arrange(self, blocks: Sequence[Sequence[int]]) -> None:
        """Each list's pages into a page block near the bottom, the first highest; all others to the top.

        What moves is mapped again, as it was on the recording's machine, and nobody counts that.
        """
        before = self._stats()
        mapped = [at for at in range(0, DATA_SIZE, PAGE) if self._is_mapped(at)]
        self._host(lambda: self._arrange(blocks))
        for at in mapped:
            self.load(at)
        after = self._stats()
        moved = {name: after[name] - before[name] for name in after}
        self.stats_before = {name: was + moved[name] for name, was in self.stats_before.items()}

    def _is_mapped(self, offset: int) -> bool:
        return leaf_spte(self.board.kvm, (DATA_GPA + offset) >> 12)[0] != 0

    def load(self, offset: int) -> Any:
        """A guest load."""
        raise NotImplementedError

    def _stats(self) -> dict[str, int]:
        raise NotImplementedError

    def _arrange(self, blocks: Sequence[Sequence[int]]) -> None:
        from host_mm.mmzone import PAGEBLOCK_NR_PAGES

        zone = self.board.host.mm.zones[0]
        starts = range(zone.start, zone.end, PAGEBLOCK_NR_PAGES)
        bottoms = [block for block in starts if _is_free(zone, block)]
        wanted: dict[int, int] = {}
        for bottom, offsets in zip(bottoms, blocks, strict=False):
            wanted |= {self.data_hva + at: bottom + len(offsets) - n for n, at in enumerate(offsets, 1)}
        top = zone.end - PAGEBLOCK_NR_PAGES
        for region in self.board.memory.regions:
            for hva in range(region.hva, region.hva + region.size, 4096):
                if self.board.vmm.present_pfn(hva) > self.board.host.mm.zero_pfn and hva not in wanted:
                    wanted[hva] = top
                    top += 1
        for hva, pfn in wanted.items():
            self._move(zone, hva, pfn)

    def _move(self, zone: Zone, hva: int, pfn: int) -> None:
        from host_mm.migrate import MIGRATE_SYNC, MR_SYSCALL, migrate_pages

        host = self.board.host.mm
        source = self.board.vmm.present_pfn(hva)
        if source == pfn:
            return
        host.lru.lru_add_drain_all()
        taken = zone.take_page_off_buddy(pfn) and host.lru.folio_isolate_lru(source)
        assert taken, f"frame {pfn:#x} or {source:#x} is not to be had"
        host.allocator.prep_isolated_page(pfn, 0)
        stayed = migrate_pages(host, [source], lambda src: pfn, MR_SYSCALL, MIGRATE_SYNC)
        assert not stayed

    def bring_in(self, offset: int, byte: int) -> None:
        """mremap of a filled page of another mapping to D + offset."""
        from host_mm.mremap import MREMAP_FIXED, MREMAP_MAYMOVE

        vmm = self.board.vmm

        def body() -> None:
            away = vmm.mmap(4096, 3)
            vmm.write(away, bytes([byte]) * 4096)
            vmm.mremap(away, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, self.data_hva + offset)

        self._host(body)

    def frames(self, offsets: Sequence[int]) -> list[int]:
        """/proc/self/pagemap: the frame behind each page of D."""
        return [self.board.vmm.present_pfn(self.data_hva + at) for at in offsets]

    def compact_memory(self) -> Any:
        """A write to /proc/sys/vm/compact_memory; the bytes that it took."""
        self._host(self.board.host.admin.compact_memory)
        return 1

    def move_pages(self, offset: int, node: int) -> Any:
        """move_pages(2) of one page, MPOL_MF_MOVE_ALL."""
        from host_mm.migrate import move_pages

        process, hva = self.board.process, self.data_hva + offset
        status = self._host(lambda: move_pages(process, [hva], [node], move_all=True))
        return f"rc 0 status {status[0]}"

    def mbind(self, offset: int, length: int, node: int) -> Any:
        """mbind(2) with MPOL_BIND and MPOL_MF_MOVE."""
        self._host(lambda: self.board.vmm.mbind(self.data_hva + offset, length, node))
        return "rc 0"

    def nothing(self) -> Any:
        """A step that only says what was found."""
        return None


def _is_free(zone: Zone, block: int) -> bool:
    from host_mm.mmzone import PAGEBLOCK_ORDER

    head = zone.buddy_of(block)
    return head >= 0 and zone.pages.order[head] >= PAGEBLOCK_ORDER

"""The host's administrator: what is asked of the whole host, by its files in /sys and /proc.

Each method is one entry into the host kernel, in nobody's name, whatever task calls it. What the VMM asks
for itself is in vmm.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from host_mm.host import HostMm

__all__ = ["Administrator"]

WRITEBACK_POLL = 20_000
"""ns between two looks at the swap device's queue."""
KHUGEPAGED_POLL = 100_000
"""ns between two looks at whether khugepaged is through."""


class Administrator:
    """Root, on one host. Frames are pfns."""

    def __init__(self, mm: HostMm) -> None:
        self.mm = mm

    def compact_memory(self) -> int:
        """Write to /proc/sys/vm/compact_memory; how many pages of the host moved."""
        from host_mm.compaction import compact_nodes

        before = self.mm.vmstat["pgmigrate_success"]
        compact_nodes(self.mm)
        return self.mm.vmstat["pgmigrate_success"] - before

    def alloc_contig(self, pfn: int, pages: int) -> None:
        """A driver takes exactly these frames."""
        from host_mm.contig import alloc_contig_range

        alloc_contig_range(self.mm, pfn, pfn + pages)

    def free_contig(self, pfn: int, pages: int) -> None:
        """It gives them back."""
        from host_mm.contig import free_contig_range

        free_contig_range(self.mm, pfn, pages)

    def offline(self, pfn: int) -> None:
        """Write `offline` to the state of the memory block of 2 MiB that begins with this frame."""
        from host_mm.memory_hotplug import offline_pages
        from host_mm.mmzone import PAGEBLOCK_NR_PAGES

        offline_pages(self.mm, pfn, PAGEBLOCK_NR_PAGES)

    def online(self, pfn: int) -> None:
        """Write `online` to it."""
        from host_mm.memory_hotplug import online_pages
        from host_mm.mmzone import PAGEBLOCK_NR_PAGES

        online_pages(self.mm, pfn, PAGEBLOCK_NR_PAGES)

    def hard_offline(self, pfn: int) -> None:
        """Write to /sys/devices/system/memory/hard_offline_page: the memory of this frame has failed."""
        from host_mm.memory_failure import memory_failure

        if err := memory_failure(self.mm, pfn):
            raise KernelError(-err, f"frame {pfn:#x} cannot be taken out of use")

    def khugepaged_round(self) -> int:
        """Wake khugepaged until it has finished a round; how often it collapsed meanwhile."""
        from host_mm.khugepaged import scan_sleep_millisecs_store

        state = self.mm.khugepaged
        before, wanted = state.pages_collapsed, state.full_scans + 1
        while state.full_scans < wanted and state.mms and state.task is not None:
            scan_sleep_millisecs_store(self.mm, state.scan_sleep_millisecs)
            self.mm.sched.sleep(KHUGEPAGED_POLL)
        return state.pages_collapsed - before

    def ksm_scan(self, *, use_zero_pages: bool = False) -> int:
        """Let ksmd run, over every process of the host, until a full scan changes nothing; full scans."""
        from host_mm.ksm import scan_until_quiet

        ksm = self.mm.ksm
        saved, ksm.use_zero_pages = ksm.use_zero_pages, use_zero_pages
        try:
            return scan_until_quiet(self.mm)
        finally:
            ksm.use_zero_pages = saved

    def reclaim(self, pages: int) -> int:
        """Proactive reclaim of `pages` frames over all nodes; how many came free."""
        from host_mm.page_alloc import GFP_KERNEL

        freed = 0
        for node in self.mm.nodes:
            while freed < pages:
                got = self.mm.reclaim(0, node.nid, GFP_KERNEL)
                if not got:
                    break
                freed += got
        return freed

    def wait_for_writeback(self) -> None:
        """Wait until no swap-out of the host is under way."""
        device, sched = self.mm.swap_device, self.mm.sched
        while device.inflight:
            sched.sleep(WRITEBACK_POLL)

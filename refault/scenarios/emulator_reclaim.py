"""What the emulator does for the scenarios of reclaim and of access tracking."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu.board import Board
    from host_mm.damon.core import DamonCtx
    from host_mm.memcontrol import MemCgroup

__all__ = ["ReclaimSteps"]


class ReclaimSteps:
    """The steps, for a back end that has `board`, `data_hva` and can enter the host."""

    board: Board
    data_hva: int
    damon: DamonCtx | None = None
    memcg: MemCgroup | None = None

    def _host(self, call: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def load(self, offset: int) -> Any:
        """A guest load."""
        raise NotImplementedError

    def slow_load(self, offset: int, ns: int) -> Any:
        """A guest load after which the VMM's thread loses the CPU for `ns`."""
        value = self.load(offset)
        self.idle(ns)
        return value

    def idle(self, ns: int) -> Any:
        """The VMM sleeps."""
        self._host(lambda: self.board.host.sched.sleep(ns))
        return None

    def damon_on(self, offset: int) -> Any:
        """kdamond watches the frame of one page, a sample every 5 ms; the bytes that the write took."""
        from host_mm.damon.core import DamonCtx, damon_start
        from host_mm.damon.paddr import PaddrOperations

        host = self.board.host.mm
        frame = self.board.vmm.present_pfn(self.data_hva + offset) << 12

        def start() -> None:
            self.damon = DamonCtx(
                host, PaddrOperations(host), [(frame, frame + 4096)], sample_interval=5_000_000,
                aggr_interval=20_000_000, min_nr_regions=3,
            )
            damon_start(self.damon)
            host.sched.sleep(1000)

        self._host(start)
        return 2

    def damon_off(self) -> Any:
        """kdamond ends; the bytes that the write took."""
        from host_mm.damon.core import damon_stop

        ctx, self.damon = self.damon, None
        assert ctx is not None
        self._host(lambda: damon_stop(ctx))
        return 3

    def memcg_enter(self) -> Any:
        """Into a memory cgroup of its own."""
        self.memcg = self.board.vmm.memcg(create=True)
        return 0

    def memcg_leave(self) -> Any:
        """Back to the root."""
        self.board.host.mm.memcg.attach(self.board.process, None)
        return 0

    def memcg_limit(self, pages: int) -> Any:
        """v1's limit file, as the recordings wrote it."""
        memcg = self.memcg
        assert memcg is not None
        return self._host(lambda: self.board.host.mm.memcg.resize_max(memcg, memcg.usage - pages))

    def memcg_squeeze(self, pages: int) -> Any:
        """v1's limit file, twice."""
        from host_mm.memcontrol import PAGE_COUNTER_MAX

        memcg = self.memcg
        assert memcg is not None
        control = self.board.host.mm.memcg
        self._host(lambda: control.resize_max(memcg, memcg.usage - pages))
        self._host(lambda: control.resize_max(memcg, PAGE_COUNTER_MAX))

    def own_pages(self, pages: int) -> Any:
        """Fresh pages of the VMM's."""

        def use() -> None:
            start = self.board.vmm.mmap(pages << 12, 3)
            for address in range(start, start + (pages << 12), 4096):
                self.board.vmm.write(address, b"own")

        return self._host(use)

    def pages_gone(self, pages: int) -> Any:
        """Were pages of D reclaimed?"""
        return any(self.board.vmm.present_pfn(self.data_hva + (page << 12)) < 0 for page in range(pages))

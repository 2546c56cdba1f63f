"""Reclaim and its policies: memory cgroups, generations, the compressed pool, the OOM killer.

Source: mm/memcontrol.c, mm/vmscan.c (/sys/kernel/mm/lru_gen, /sys/kernel/debug/lru_gen), mm/zswap.c,
mm/oom_kill.c; Linux 6.18.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import check_pages, flag
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []

_TOUCH = (
    "vm.host.dontneed(gpa=0x200000, pages=64); vm.host.mlock(gpa=0x200000, pages=64); "
    "vm.host.munlock(gpa=0x200000, pages=64)"
)


@operation("CLEAR", example=f"memcg_limit(); {_TOUCH}; vm.host.memcg_limit(pages=16)")
def memcg_limit(board: Board, pages: int = 0) -> int:
    """memory.max of the VMM's memory cgroup, made at the first call; 0 lifts it. Answers the pages charged.

    What the VMM has when the group is made stays the root's. A limit that reclaim cannot reach kills the VM.
    """
    from host_mm.memcontrol import PAGE_COUNTER_MAX

    check_pages(pages, 0)
    memcg = board.vmm.memcg(create=True)
    board.host.mm.memcg.write_max(memcg, pages or PAGE_COUNTER_MAX)
    board.host.admin.wait_for_writeback()
    return memcg.usage


@operation("CLEAR", example=f"memcg_limit(); {_TOUCH}; vm.host.memcg_reclaim(pages=16)")
def memcg_reclaim(board: Board, pages: int = 32) -> int:
    """Write to memory.reclaim of the VMM's memory cgroup; answers the frames that came free."""
    check_pages(pages)
    return board.host.mm.memcg.write_reclaim(board.vmm.memcg(), pages)


@operation(example="lru_gen_enable(on=1)")
def lru_gen_enable(board: Board, on: int = 1) -> int:
    """Write to /sys/kernel/mm/lru_gen/enabled; answers the setting before."""
    from host_mm.lru_gen import lru_gen_change_state

    before = board.host.mm.lru_gen_enabled
    lru_gen_change_state(board.host.mm, flag("on", on))
    return int(before)


def _generations(board: Board) -> None:
    if not board.host.mm.lru_gen_enabled:
        raise KernelError(errno.ENOSYS, "the LRU has no generations; lru_gen_enable() first")


@operation(example="lru_gen_enable(on=1); vm.host.lru_gen_age()")
def lru_gen_age(board: Board) -> int:
    """Write `+` to /sys/kernel/debug/lru_gen: walk the page tables, open a generation; answers its number."""
    from host_mm.lru_gen_evict import run_aging

    _generations(board)
    vecs = board.vmm.lruvecs()
    for vec in vecs:
        run_aging(vec, vec.max_seq)
    return max(vec.max_seq for vec in vecs)


@operation(
    "CLEAR",
    example="lru_gen_enable(); [vm.host.lru_gen_age() for _ in range(3)]; vm.host.lru_gen_evict(pages=16)",
)
def lru_gen_evict(board: Board, pages: int = 32) -> int:
    """Write `-` to /sys/kernel/debug/lru_gen: evict the older generations; answers what came free."""
    from host_mm.lru_gen import MIN_NR_GENS
    from host_mm.lru_gen_evict import run_eviction
    from host_mm.page_alloc import GFP_KERNEL
    from host_mm.shrink_folio_list import ScanControl

    check_pages(pages)
    _generations(board)
    freed = 0
    for vec in board.vmm.lruvecs():
        if freed < pages:
            freed += run_eviction(vec, vec.max_seq - MIN_NR_GENS, pages - freed, ScanControl(GFP_KERNEL))
    board.host.admin.wait_for_writeback()
    return freed


@operation(example="zswap_enable(on=1)")
def zswap_enable(board: Board, on: int = 1) -> int:
    """Write to /sys/module/zswap/parameters/enabled; answers the setting before."""
    zswap = board.host.mm.zswap
    if board.host.mm.swap is None:
        raise KernelError(errno.ENOSYS, "this host has no swap")
    before, zswap.enabled = zswap.enabled, flag("on", on)
    return int(before)


@operation(
    example="zswap_enable(on=1); vm.host.swap_out(gpa=0x200000, pages=16); vm.host.zswap_writeback(pages=8)"
)
def zswap_writeback(board: Board, pages: int = 32) -> int:
    """Send the oldest pages of the compressed pool on to the swap file; answers how many went."""
    check_pages(pages)
    written = board.host.mm.zswap.writeback(pages)
    board.host.admin.wait_for_writeback()
    return written


@operation(example="oom_kill(pages=64)")
def oom_kill(board: Board, pages: int = 64) -> int:
    """A bystander with `pages` pages is OOM-killed and reaped, then exits; answers the pages reaped."""
    from host_mm.fork import exit_process
    from host_mm.mm_types import MM_ANONPAGES
    from host_mm.oom_kill import oom_badness, oom_kill_process

    check_pages(pages)
    host = board.host.mm
    victim = board.vmm.bystander(pages)
    had = victim.mm.rss[MM_ANONPAGES]
    oom_kill_process(victim, oom_badness(victim, host.pages.nr_frames) or 0, 0)
    host.oom_wait.wait_event(lambda: victim not in host.oom_victims)
    reaped = had - victim.mm.rss[MM_ANONPAGES]
    exit_process(victim)
    return reaped

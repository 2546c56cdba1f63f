"""NUMA: where vCPUs run, and pages that follow them.

Source: kernel/sched/fair.c (task_numa_work), mm/memory.c (do_numa_page), kernel/sched/syscalls.c
(sched_setaffinity); Linux 6.18. move_pages is in memory.py.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from emu.hostops import operation
from emu.operations.arguments import page_hvas, spans
from host_mm.kernel.errors import KernelError

if TYPE_CHECKING:
    from emu.board import Board

__all__: list[str] = []


@operation("PROTECTION_VMA", example="numa_balance(gpa=0x200000, pages=16)")
def numa_balance(board: Board, gpa: int, pages: int = 1) -> int:
    """One scan of NUMA balancing: the next access to each page tells its node; answers how many will.

    A page that a vCPU on another node meets then moves to that node.
    """
    return sum(board.vmm.numa_scan(hva, length) for hva, length in spans(board, gpa, pages))


@operation(example="vcpu_node(cpu=0, node=1)")
def vcpu_node(board: Board, cpu: int, node: int) -> int:
    """sched_setaffinity of a vCPU's thread to the CPUs of a NUMA node."""
    if not 0 <= cpu < len(board.threads):
        raise KernelError(errno.EINVAL, f"cpu {cpu}: want 0 to {len(board.threads) - 1}")
    if not 0 <= node < len(board.host.mm.nodes):
        raise KernelError(errno.EINVAL, f"node {node}: want 0 to {len(board.host.mm.nodes) - 1}")
    board.set_node(cpu, node)
    return 0


@operation(example="pages_on_node(gpa=0x200000, pages=16, node=0)")
def pages_on_node(board: Board, gpa: int, pages: int = 1, node: int = 0) -> int:
    """How many pages of the range have a frame on a NUMA node: move_pages(2) without nodes."""
    host = board.host.mm
    if not 0 <= node < len(host.nodes):
        raise KernelError(errno.EINVAL, f"node {node}: want 0 to {len(host.nodes) - 1}")
    pfns = [board.vmm.present_pfn(hva) for hva in page_hvas(board, gpa, pages)]
    return sum(1 for pfn in pfns if pfn > host.zero_pfn and host.allocator.nid_of(pfn) == node)

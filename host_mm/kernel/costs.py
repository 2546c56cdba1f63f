"""What the host's events cost, in nanoseconds of logical time.

The orders of magnitude are those of one x86-64 server under Linux 6.18 (a refault 5-10 us, a swap-in
from a fast disk 80 us); only their ratios matter, and that they never change between runs.

Not modelled: anything that depends on cache state or on the number of CPUs.
"""

from __future__ import annotations

__all__ = [
    "COST_CLEAR_PAGE", "COST_COMPRESS_PAGE", "COST_COPY_PAGE", "COST_DECOMPRESS_PAGE",
    "COST_DIRECT_RECLAIM", "COST_FAULT", "COST_KSM_CHECKSUM", "COST_KSM_COMPARE", "COST_MIGRATE_PAGE",
    "COST_SCAN_PAGE", "COST_SWAP_READ", "COST_SWAP_WRITE", "COST_SYSCALL", "COST_TLB_FLUSH",
    "COST_VM_ENTRY", "COST_VM_EXIT", "COST_WALK",
]

COST_SYSCALL = 150
COST_FAULT = 500
COST_WALK = 20
COST_CLEAR_PAGE = 100
COST_CLEAR_HUGE_PAGE = 40_000
COST_COPY_PAGE = 250
COST_COPY_HUGE_PAGE = 90_000
COST_COMPRESS_PAGE = 3_000
COST_DECOMPRESS_PAGE = 1_000
COST_TLB_FLUSH = 400
COST_SCAN_PAGE = 60
COST_KSM_CHECKSUM = 400
COST_KSM_COMPARE = 120
COST_MIGRATE_PAGE = 1_500
COST_DIRECT_RECLAIM = 2_000
COST_SWAP_READ = 80_000
COST_SWAP_WRITE = 60_000
COST_VM_EXIT = 1_200
COST_VM_ENTRY = 600

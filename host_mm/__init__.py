"""Room 1: Linux `mm/`, without any knowledge that KVM exists.

Reading order: `ram.py` (the frames), `page.py` (struct page), `page_alloc.py` (who owns which
frame), `mm_types.py` (processes and VMAs), `memory.py` (faults), `gup.py`, `rmap.py`,
`mmu_notifier.py`, then what takes frames away: `vmscan.py`, `swapfile.py`, `migrate.py`,
`fork.py`, `madvise.py`. `kernel/` holds tasks, locks and the clock; `arch/x86/` the host's
page-table entry layout.
"""

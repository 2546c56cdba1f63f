"""Room 1: Linux `mm/`, without any knowledge that KVM exists.

Reading order:

    ram.py                       the frames
    page.py page_alloc.py        struct page, and who owns which frame
    arch/x86/pgtable.py          the bits of a host page-table entry
    pgtable_generic.py           tables as bytes in RAM; the funnel of every store
    mm_types.py process.py       address spaces, VMAs, processes
    memory.py                    faults; memory_zap.py, memory_copy.py: entries out, entries into a child
    vma.py mmap.py mprotect.py madvise.py task_mmu.py fork.py   the system calls
    gup.py uaccess.py            memory for others than the CPU, and for the process itself
    rmap.py rmap_unmap.py        from a page to its entries
    tlb.py mmu_gather.py         when the host's own translations go
    mmu_notifier.py              how secondary MMUs are told
    lru.py vmscan.py swapfile.py swap_state.py swapin.py migrate.py oom_kill.py   what takes frames away
    host.py                      all of it, wired
    truths.py                    what must hold

`kernel/` holds tasks, locks, costs and the clock; `arch/x86/` what depends on the CPU.
"""

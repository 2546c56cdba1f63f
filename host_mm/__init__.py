"""Room 1: Linux `mm/`, without any knowledge that KVM exists.

Reading order:

    ram.py                       the frames
    page.py page_alloc.py        struct page, and who owns which frame; mm_init.py: at first, nobody
    mmzone.py                    zones, page blocks and the lists of free ones
    mempolicy.py                 and on which node
    pgtable_generic.py           tables as bytes in RAM; the funnel of every store
    mm_types.py process.py       address spaces, VMAs, processes
    memory.py                    faults; memory_folio.py: the folios for them; memory_wp.py: copy on write
    memory_zap.py memory_copy.py entries out, entries into a child
    address_space.py             files and their mappings; memory_file.py: faults on them
    filemap_cache.py             which folio has which page of a file
    filemap_fault.py readahead.py  how a fault finds it, and what is read and mapped around it
    backing_file.py sparse.py     files with their bytes in a real file, and where that has holes
    page_writeback.py             how dirty pages get there
    shmem.py shmem_file.py memfd.py  shared memory
    filemap_rw.py madvise_file.py  read, write and advice
    truncate.py filemap_split.py  how pages leave a file, and how large folios are cut for it
    vma.py mmap.py mprotect.py madvise.py task_mmu.py fork.py   the system calls
    mlock.py mremap.py           and two more; move_page_tables.py: what a move does to the entries
    userfaultfd_k.py             faults that wait for a user task; userfaultfd.py: its ioctls, which fill
                                 (userfaultfd_mfill.py), register and protect (userfaultfd_wp.py) and move
                                 (userfaultfd_move.py) pages
    gup.py gup_range.py          pages for others than the CPU; gup_populate.py: and ahead of use
    gup_pin.py gup_longterm.py   pinned, and pinned for long
    uaccess.py                   memory for the process itself
    pagemap.py pagemap_scan.py   what each page is, and scans that protect what they find
    rmap.py rmap_anon_vma.py     from a page to its entries; rmap_unmap.py: and those gone
    tlb.py mmu_gather.py         when the host's own translations go
    mmu_notifier.py              how secondary MMUs are told; mmu_notifier_types.py: what a bracket is
    mmu_notifier_register.py     and who is told
    interval_notifier.py         the other scheme, by sequence counts
    hmm.py hmm_mirror.py         what a device learns of the tables, and a device that mirrors them
    secondary_tables.py          where the truths find what devices translate by
    memory_pfnmap.py             mappings of raw frames
    memremap.py                  frames that are devices', not RAM
    memory_device.py             entries for pages that a device has
    migrate_device.py migrate_device_collect.py   to a device's memory and back
    rmap_device.py               a device's alone
    lru.py mlock_folio.py        the lists; those that stay
    vmscan.py vmscan_kswapd.py   which page goes; vmscan_trace.py: what is told about it
    shrink_folio_list.py         and how; shrinker.py: caches that shrink meanwhile
    lru_gen.py lru_gen_walk.py lru_gen_evict.py  by generations: the lists, aging by page tables, eviction
    memcontrol.py                whose pages they are, and how many a group may have
    page_idle.py damon/          which pages are used at all
    filemap.py                   the folio lock and writeback
    swapfile.py swap_state.py page_io.py swapin.py   slots, the swap cache, I/O, and back
    huge_mm.py huge_memory.py    transparent huge pages: who may have them, and faults on them
    pgtable_huge.py huge_memory_pmd.py   their level-2 entries: changed as a whole, and split
    huge_memory_map.py madvise_folios.py what the system calls do to them
    huge_memory_split.py         the folio itself becomes small pages
    rmap_large.py page_vma_mapped.py     how often large folios are mapped, and where
    khugepaged.py khugepaged_collapse.py   small pages become huge ones; khugepaged_trace.py: what is told
    khugepaged_file.py huge_memory_file.py   and of shared memory
    khugepaged_types.py          whose small pages could
    swap_readahead.py zram.py zswap.py zsmalloc.py   more than was asked for; swap that is RAM
    hugetlb.py hugetlb_pool.py   the pool of huge pages, and its size; hugetlb_resv.py: who was promised some
    hugetlb_share.py             level-2 tables that processes share
    hugetlb_rmap.py hugetlb_fault.py hugetlb_unmap.py hugetlb_copy.py hugetlb_migrate.py   their life
    hugetlbfs.py                 files of them
    numa_balancing.py            pages go to the node that uses them
    migrate.py migrate_batch.py migrate_types.py oom_kill.py   to another frame; to nowhere
    compaction.py kcompactd.py   many to another place, for large blocks; and the daemon that sees to it
    compaction_scan.py           which and where to; compaction_trace.py: what is told about it
    page_isolation.py contig.py  a range for one who wants just these frames
    memory_hotplug.py            memory out of use and back; memory_failure.py: and never back
    ksm.py ksm_scan.py ksm_merge.py   equal pages become one; ksm_break.py: and are parted again
    ksm_tree.py ksm_types.py     how equal ones are found; where a KSM page is mapped
    host.py                      all of it, wired; tracepoints.py: and what it tells
    truths_running.py            what must hold while it runs; breaks.py: and how to break it
    truths.py truths_files.py truths_rmap.py truths_vmstat.py   and at rest
    truths_hugetlb.py truths_thp.py   and of huge pages
    profile.py                   what differs between kernels

`kernel/` holds tasks, locks, costs and the clock; `arch/x86/` what depends on the CPU.
"""

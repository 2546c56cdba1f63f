"""`arch/x86/kvm/mmu`: SPTEs, TDP MMU, shadow and direct pages with reverse maps, the fault path.

    mmu.py              a fault from PFERR word to RET_PF_*       mmu_internal.py  what the parts share
    fast_page_fault.py  rights given back without mmu_lock        mmio.py          MMIO SPTEs
    marks.py            what SPTEs know goes to struct page       tdp_set_pte.py   change_pte of 5.10
    invalidate.py       the retry protocol                        mmu_roots.py     a vCPU's root
    spte.py             the encoding                              killed_by.py     which zap took a gfn
    tdp_iter.py         the walk                                  rcu.py           when tables may be freed
    tdp_mmu.py          stores, mapping   tdp_pages.py tables, roots   tdp_zap.py tdp_age.py tdp_log.py
    faultin_pfn.py      from a gfn to a frame and a level         shrinker.py      tables given back
    nx_huge_pages.py    code in huge pages, and its recovery      set_mem_attributes.py  private and shared
    pre_fault.py        mapping ahead of faults
    page_track.py       who hears of writes to a page             unprotect.py     giving shadow pages up

The guest's own tables, and shadow paging:

    kvm_mmu.py          how the guest pages: roles, rights        paging_tmpl.py   KVM's walk of its tables
    shadow_fetch.py     shadowing one translation                 shadow_account.py  what a shadowed gfn loses
    unsync.py           tables that the guest may write           shadow_sync.py   what its flush is for
    invalidate_addr.py  INVLPG, and page faults of its own        track_write.py   emulated writes to tables

Without the TDP MMU (kvm.tdp_mmu=N, and shadow paging):

    shadow_page.py      pages: hash, roles, links                 shadow_spte.py   stores to their SPTEs
    shadow_zap.py       zaps, and how many there may be           shadow_roots.py  roots, also kept ones, sync
    rmap.py             from a gfn to its SPTEs                   rmap_log.py      dirty logging by rmaps
    shadow_set_spte.py  one leaf, and its neighbours              shadow_walk.py   the walk of an address
    direct_map.py       mapping a fault in direct pages           gfn_range.py     unmap and age, either MMU
"""

"""Room 2: `virt/kvm` and `arch/x86/kvm`. Never imports Unicorn.

Reading order, which is the way of one fault and of one host event:

    kvm_main.py                   struct kvm, and what the board calls
    vcpu.py x86.py                one vCPU, and the loop around guest entries
    kvm_x86_ops.py vmx/exits.py   how KVM meets the CPU, and what an exit says
    vmx/vmx.py x86_events.py      exit handlers; injecting events
    x86_cr.py                     the guest's control registers
    x86_emulate.py guest_access.py  emulated accesses; KVM's own reads and writes of guest memory
    mmu/mmu.py follow_pfn.py      the fault path; from a guest frame to a host frame
    mmu/invalidate.py             count, sequence, range: when a fault must be retried
    mmu_notifier.py pfncache.py   what the host's brackets do
    smm.py                        system-management mode, the second address space
    lapic.py vmx/apic_access.py   the APIC's page, and its address in the VMCS
    x86_msr.py pvclock.py         MSRs of KVM's own; the clock that it keeps in guest memory
    mmu/spte.py mmu/tdp_mmu.py    what an SPTE says, and every store to one
    mmu/rmap.py mmu/direct_map.py the same without the TDP MMU
    memslots.py memory_region.py  the guest's memory map, and how it changes
    async_pf.py x86_async_pf.py   page faults that the guest need not wait for
    pv_async_pf.py                what a guest needs that takes them
    guest_memfd.py                memory that is a file of KVM's
    mem_attributes.py             which guest frames are private
    dirty_log.py dirty_ring.py    which pages were written, told by bitmap or by ring
    vmx/pml.py requests.py        the CPU's own log; flushes and kicks
    truths_shadow.py mmu/shadow_fetch.py  what must hold of shadow paging; and where it begins
    truths.py truths_leaves.py truths_log.py   what must hold; the leaves there are; the dirty log
    truths_rmap.py truths_gpc.py truths_apic.py   what must hold of the rest
    dirty_log_rmap.py breaks.py   the log without the TDP MMU; how to break what must hold
    instrument.py                 what tools ask of the tables
    profile.py                    what differs between kernels
"""

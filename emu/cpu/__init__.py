"""The CPU: Unicorn executes, and what Unicorn does not have is here.

Reading order, from one access outwards:

    paging.py words.py            the guest's entries; the row of words that a walk reads
    walk.py                       the two-dimensional walk: the specification of translation
    shadow_walk.py cr_exits.py    the walk of KVM's shadow tables; what exits for their sake
    fill.py fill_body.py          a miss of Unicorn's TLB: walk, judge, note
    faults.py                     what a refused fill means: a fault, a VM exit, new code
    code_pages.py                 which pages a vCPU may execute from
    vcpu.py cpu.py                one vCPU and its loop; all of a VM's, as KVM asks for them
    stops.py                      exceptions, private instructions, exits
    block.py block_body.py        counting instructions, ending slices
    intercept.py control.py       instructions that leave the guest; those that change the CPU's mode
    pdpte.py                      the registers of PAE paging
    events.py segments.py         delivery of exceptions and interrupts; segment registers
    memory.py                     the CPU's own accesses: descriptors, stacks, operands
    insn.py mmio.py alu.py        decoding one instruction, emulating it on device memory
    mmio_shadow.py                and on page tables that KVM shadows
    apic_access.py smm.py         the registers of the local APIC; SMM's save area
    portio.py cpuid.py msr.py     IN and OUT; CPUID; MSRs
    env.py registers.py           Unicorn's CPU state in place; registers by name
    compile.py callbacks.py       the same sources as native code
"""

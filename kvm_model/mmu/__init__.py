"""`arch/x86/kvm/mmu`: SPTEs, the TDP MMU, the fault path."""

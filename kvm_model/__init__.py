"""Room 2: `virt/kvm` and `arch/x86/kvm`. Never imports Unicorn."""

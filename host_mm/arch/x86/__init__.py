"""The host's x86-64 page tables."""

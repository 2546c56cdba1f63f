"""The host's x86-64: pgtable.py, the bits of page-table entries; fault.py, the CPU's own accesses."""

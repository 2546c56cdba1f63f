"""The host's x86-64: pgtable.py, the bits of page-table entries; swapops.py, of entries that map
nothing; fault.py, the CPU's own accesses."""

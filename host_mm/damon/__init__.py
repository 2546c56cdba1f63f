"""DAMON, mm/damon: which parts of an address space are used, found by sampling.

| file | subject |
|---|---|
| `ops_common.py` | one folio made old, one folio asked whether it is young |
| `core.py` | regions, and the kdamond task that samples, merges and splits them |
| `vaddr.py` | the regions are addresses of processes |
| `paddr.py` | the regions are physical memory |
"""

"""Room 3: the computer. `cpu/` (Unicorn vCPUs, the hardware walk, event delivery), `devices/`,
`loaders/`, `abi.py` (what guest payloads may know), `host.py` (one host), `board.py` (one VM on
it), `hostops.py` (what can be asked of the host), `truths.py` (the rule only this floor can check).
"""

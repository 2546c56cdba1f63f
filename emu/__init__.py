"""Room 3: the computer.

| what | subject |
|---|---|
| `host.py` | one host: RAM, clock, event stream, mm, and the VMs on it |
| `board.py` | one VM: its VMM process, KVM, vCPU threads, devices |
| `memory.py`, `vmm.py` | the guest's memory as the VMM keeps it; the VMM's system calls |
| `administrator.py` | what is asked of the whole host |
| `files.py` | guest memory that is a file's, and what can be done to that file |
| `hugetlb.py` | guest memory in huge pages, and a process that maps it too |
| `dirty_rings.py` | KVM's dirty rings, harvested by the VMM |
| `dune.py` | a process on an EPT of its own |
| `cpu/` | Unicorn vCPUs, the hardware walk, TLB fills, event delivery |
| `devices/`, `loaders/` | what answers ports and device memory; guest program files |
| `abi.py` | what guest payloads may know of the machine |
| `uffd.py` | the thread of a VMM that serves a userfaultfd: post-copy, snapshots, lent pages |
| `hostops.py`, `operations/` | what can be asked of the host |
| `config.py` | everything that decides what a machine does |
| `inspector.py`, `shadow_inspector.py` | a translation shown without making one |
| `checker.py` | the truths of all rooms, at scheduling points; its own is truth 2's TLB half |
"""

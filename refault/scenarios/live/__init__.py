"""Scenarios on a real `/dev/kvm`: README.md says what it needs, what it does, and when it is skipped.

| file | subject |
|---|---|
| `kvm.py` | ioctls: VMs, vCPUs, memory slots, statistics |
| `libc.py` | system calls that Python has no function for |
| `tracefs.py` | the private trace instance and its events |
| `backend.py` | the machine that a scenario asked for |
| `guest.py` | what its guest does |
| `memory.py`, `files.py`, `uffd.py` | what its VMM does: memory, files, userfaultfd |
| `reclaim.py` | memory cgroups and DAMON |
| `slots.py`, `dirty.py` | KVM's slots, guest_memfd and dirty tracking |
| `machine.py` | what of the whole machine is set meanwhile: swap, ksmd, huge pages |
| `probe.py` | whether this machine can |
"""

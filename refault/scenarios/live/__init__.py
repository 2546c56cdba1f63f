"""Scenarios on a real `/dev/kvm`: README.md says what it needs, what it does, and when it is skipped.

| file | subject |
|---|---|
| `kvm.py` | ioctls: VMs, vCPUs, memory slots, statistics |
| `libc.py` | system calls that Python has no function for |
| `tracefs.py` | the private trace instance and its events |
| `backend.py` | the guest, and what a scenario may ask for |
| `dirty.py` | what it does of dirty tracking |
| `probe.py` | whether this machine can |
"""

"""The host operations, by subject. Importing this package fills `emu.hostops.OPERATIONS`.

| file | subject |
|---|---|
| `memory.py` | madvise, mprotect, move_pages, aging, reads and writes by the VMM |
| `mapping.py` | mlock, munlock, mremap |
| `ksm.py` | samepage merging |
| `tracking.py` | who uses which page: idle tracking, DAMON |
| `process.py` | fork and exit |
| `secondary.py` | the VMM on an EPT of its own, and a device on the VMM's page tables |
| `slots.py` | memory slots and the dirty log |
| `device.py` | a mirroring device, a pinning device, KVM's own mappings |
| `rdma.py` | registrations with the RDMA engine, and its peer |
| `weather.py` | random transparent operations beside the guest |
| `instrument.py` | not Linux's: EPT entries armed for one exit, and questions about the machine |
"""

from emu.operations import (
    device,
    instrument,
    ksm,
    mapping,
    memory,
    process,
    rdma,
    secondary,
    slots,
    tracking,
    weather,
)

__all__ = [
    "device",
    "instrument",
    "ksm",
    "mapping",
    "memory",
    "process",
    "rdma",
    "secondary",
    "slots",
    "tracking",
    "weather",
]

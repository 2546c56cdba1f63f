"""The host operations, by subject. Importing this package fills `emu.hostops.OPERATIONS`.

| file | subject |
|---|---|
| `apic.py` | the page of KVM's own behind the local APIC |
| `arguments.py` | what arguments mean and which are refused; no operations |
| `memory.py` | madvise, mprotect, move_pages, aging, reads and writes by the VMM |
| `mapping.py` | mlock, munlock, mremap |
| `migration.py` | compaction, exact frames, memory offline, mbind, long-term pins, bad memory |
| `files.py` | memory that is a file's: fsync, holes, truncation, other processes' writes |
| `guest_memfd.py` | memory of guest_memfd, private and shared; faults ahead of the guest |
| `gvt.py` | a GPU that the guest shares |
| `hugetlb.py` | huge pages: the pool, memory made of them, a process that shares it |
| `ksm.py` | samepage merging |
| `reclaim.py` | memory cgroups, generations, zswap, the OOM killer |
| `thp.py` | huge pages made of small ones and parted again |
| `tracking.py` | who uses which page: idle tracking, DAMON |
| `userfaultfd.py` | memory that comes when it is asked for, snapshots, PAGEMAP_SCAN |
| `numa.py` | where vCPUs run, and pages that follow them |
| `process.py` | fork and exit |
| `secondary.py` | the VMM on an EPT of its own, and a device on the VMM's page tables |
| `smm.py` | system-management mode |
| `slots.py` | memory slots and the dirty log |
| `clock.py` | the guest's paravirtual clock |
| `device.py` | a mirroring device, a pinning device, KVM's own mappings |
| `device_memory.py` | a device with memory of its own: pages there, pages its alone |
| `pfnmap.py` | a PCI function's memory in a slot |
| `rdma.py` | registrations with the RDMA engine, and its peer |
| `weather.py` | random transparent operations beside the guest |
| `instrument.py` | not Linux's: EPT entries armed for one exit, and questions about the machine |
"""

from emu.operations import (
    apic,
    clock,
    device,
    device_memory,
    files,
    guest_memfd,
    gvt,
    hugetlb,
    instrument,
    ksm,
    mapping,
    memory,
    migration,
    numa,
    pfnmap,
    process,
    rdma,
    reclaim,
    secondary,
    slots,
    smm,
    thp,
    tracking,
    userfaultfd,
    weather,
)

__all__ = [
    "apic",
    "clock",
    "device",
    "device_memory",
    "files",
    "guest_memfd",
    "gvt",
    "hugetlb",
    "instrument",
    "ksm",
    "mapping",
    "memory",
    "migration",
    "numa",
    "pfnmap",
    "process",
    "rdma",
    "reclaim",
    "secondary",
    "slots",
    "smm",
    "thp",
    "tracking",
    "userfaultfd",
    "weather",
]

"""The contract between a guest payload and the machine: ports, memory map, CPUID leaf, vmcalls.

Every integer constant here, VMCALL_* too, is also a symbol of the payload assembler
(guest_payloads/builder.py), so payload sources name them and never repeat a number. Nothing else of
the machine is visible to a payload, and this module imports nothing of it.

Sources of truth: kvm-unit-tests (serial 0x3f8 and isa-debug-exit 0xf4 dialect), the Multiboot 0.6.96
specification, Intel SDM vol. 2A (CPUID leaves 40000000H-4FFFFFFFH are left to hypervisors).

The guest's memory (gpa):

    0x0000_0000  +---------------------------------------+
                 | page 0: never mapped by the runtime   |
    0x0000_1000  | low memory: multiboot mbi, GDT, ...   |  LOW_MEMORY
    0x0010_0000  +---------------------------------------+  IMAGE_BASE
                 | payload image: text, rodata,          |
                 | data, bss; each on its own pages      |
    0x0020_0000  +---------------------------------------+  HEAP_BASE
                 | heap: identity-map page tables that   |
                 | do not fit the image, then free RAM   |
    RAM size     +---------------------------------------+  1 MiB + mbi.mem_upper KiB
                 | unbacked: reads all ones              |
    0xe000_0000  +---------------------------------------+  SLOT_TEST_GPA
                 | slots made by VMCALL_SLOT_CREATE      |
    0xe100_0000  +---------------------------------------+
    0xfeb0_0000  | MMIO test device, 1 page              |  MMIO_TEST_GPA
    0xfeb1_0000  | never backed: open bus                |  OPEN_BUS_GPA
    0xfeb2_0000  | RDMA engine, 1 page                   |  RDMA_GPA

A vmcall: RAX = number, RBX, RCX, RDX, RSI = arguments; RAX on return is the result, >= 0 for success
or a negative errno; no other register changes and RIP is behind the instruction. Where CPUID lacks the
signature a payload makes no vmcall. Host operations are transparent: whatever page one takes, the
guest's memory reads as before, except where the operation's own words say otherwise (dontneed,
host_write, slot_delete, slot_move).

Errors common to all: -ENOSYS for a number that does not exist or an operation that this machine's
configuration cannot do (the payload prints SKIP); -EINVAL for an unaligned `gpa` or `pages` == 0;
-EFAULT where the range is not wholly inside memory slots. An error leaves everything as it was.

Not modelled: Linux's own KVM_HC_* hypercalls and their numbers, but for KVM_HC_MAP_GPA_RANGE.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "CPUID_KERNEL_LEAF",
    "CPUID_SIGNATURE",
    "CPUID_SIGNATURE_EBX",
    "CPUID_SIGNATURE_ECX",
    "CPUID_SIGNATURE_EDX",
    "CPUID_SIGNATURE_LEAF",
    "EBUSY",
    "ECHILD",
    "EEXIST",
    "EFAULT",
    "EINVAL",
    "ENODATA",
    "ENOENT",
    "ENOMEM",
    "ENOSYS",
    "ENOTTY",
    "EXIT_FAIL",
    "EXIT_OK",
    "EXIT_PORT",
    "EXIT_SKIPPED",
    "HEAP_BASE",
    "IMAGE_BASE",
    "LAST_EXIT_CAUGHT",
    "LAST_EXIT_GPA",
    "LAST_EXIT_GVA",
    "LAST_EXIT_QUALIFICATION",
    "LAST_EXIT_REASON",
    "LOW_MEMORY",
    "MMIO_COUNT",
    "MMIO_LAST_ACCESS",
    "MMIO_LAST_VALUE",
    "MMIO_STORE_SIZE",
    "MMIO_TEST_GPA",
    "MMIO_TEST_SIZE",
    "OPEN_BUS_GPA",
    "PIC1_COMMAND",
    "PIC1_DATA",
    "PIC2_COMMAND",
    "PIC2_DATA",
    "PIT_CHANNEL0",
    "PIT_COMMAND",
    "PIT_HZ",
    "PROT_EXEC",
    "PROT_READ",
    "PROT_WRITE",
    "RDMA_COMPLETED",
    "RDMA_CQ",
    "RDMA_CQE_SIZE",
    "RDMA_DOORBELL",
    "RDMA_ERROR",
    "RDMA_FETCH_ADD",
    "RDMA_GPA",
    "RDMA_MAX_BYTES",
    "RDMA_READ",
    "RDMA_READY",
    "RDMA_RESET",
    "RDMA_RING_ENTRIES",
    "RDMA_RING_KEY",
    "RDMA_SIZE",
    "RDMA_SQ",
    "RDMA_STATE",
    "RDMA_WQE_SIZE",
    "RDMA_WRITE",
    "SERIAL_PORT",
    "SLOT_TEST_GPA",
    "VMCALLS",
    "VMCALL_AGE",
    "VMCALL_CHILD_EXIT",
    "VMCALL_CHILD_READ",
    "VMCALL_CLEAR_DIRTY",
    "VMCALL_CLEAR_REFS",
    "VMCALL_COLD",
    "VMCALL_CPU_COUNT",
    "VMCALL_DIRTY_LOG",
    "VMCALL_DMA_WRITE",
    "VMCALL_DONTNEED",
    "VMCALL_EPT_AD",
    "VMCALL_EPT_RESTORE",
    "VMCALL_EPT_SET",
    "VMCALL_FORK",
    "VMCALL_FREE",
    "VMCALL_GET_DIRTY",
    "VMCALL_HARVEST_RINGS",
    "VMCALL_HOST_READ",
    "VMCALL_HOST_WRITE",
    "VMCALL_KVM_MAP_WRITE",
    "VMCALL_LAST_EXIT",
    "VMCALL_MANUAL_DIRTY",
    "VMCALL_MAP_LEVEL",
    "VMCALL_MIGRATE",
    "VMCALL_MIRROR_READ",
    "VMCALL_MLOCK",
    "VMCALL_MMIO_DEVICE",
    "VMCALL_MREMAP",
    "VMCALL_MUNLOCK",
    "VMCALL_PROTECT",
    "VMCALL_PROTECT_FAULTS",
    "VMCALL_RECLAIM",
    "VMCALL_SLOT_CREATE",
    "VMCALL_SLOT_DELETE",
    "VMCALL_SLOT_MOVE",
    "VMCALL_SLOT_RESTORE",
    "VMCALL_START_CPU",
    "VMCALL_SWAP_OUT",
    "VMCALL_WEATHER",
    "WC_LOC_PROT_ERR",
    "WC_LOC_QP_OP_ERR",
    "WC_REM_ACCESS_ERR",
    "WC_SUCCESS",
    "WC_WR_FLUSH_ERR",
    "Vmcall",
    "cpuid_kernel_leaf",
    "cpuid_signature_leaf",
    "vmcall_by_name",
    "vmcall_by_number",
]

CPUID_SIGNATURE_LEAF = 0x4000_0000
CPUID_KERNEL_LEAF = 0x4000_0001
"""EAX is the version of the host's kernel, major << 16 | minor << 8, as LINUX_VERSION_CODE counts."""
CPUID_SIGNATURE = b"refault\0\0\0\0\0"
"""EBX, ECX, EDX of the leaf, in this order, little-endian; EAX is the highest leaf of the range."""
CPUID_SIGNATURE_EBX = int.from_bytes(CPUID_SIGNATURE[0:4], "little")
CPUID_SIGNATURE_ECX = int.from_bytes(CPUID_SIGNATURE[4:8], "little")
CPUID_SIGNATURE_EDX = int.from_bytes(CPUID_SIGNATURE[8:12], "little")

SERIAL_PORT = 0x3F8
EXIT_PORT = 0xF4
"""A 32-bit OUT ends the run with the status written. QEMU's isa-debug-exit turns v into 2v + 1."""
EXIT_OK = 0
EXIT_FAIL = 1
EXIT_SKIPPED = 77
"""Every test of the payload was skipped (kvm-unit-tests' report_summary)."""

PIC1_COMMAND, PIC1_DATA = 0x20, 0x21
PIC2_COMMAND, PIC2_DATA = 0xA0, 0xA1
PIT_CHANNEL0, PIT_COMMAND = 0x40, 0x43
PIT_HZ = 1_193_182

LOW_MEMORY = 0x1000
IMAGE_BASE = 0x10_0000
HEAP_BASE = 0x20_0000
SLOT_TEST_GPA = 0xE000_0000
MMIO_TEST_GPA = 0xFEB0_0000
MMIO_TEST_SIZE = 0x1000
OPEN_BUS_GPA = 0xFEB1_0000

MMIO_STORE_SIZE = 0x800
"""Offsets below this are plain bytes: a store of any size and alignment is kept, a load gives it back.
They start as zeros. Loads and stores of 1, 2, 4 and 8 bytes; the registers behind count each of them."""
MMIO_LAST_ACCESS = 0x800
"""u32, read only: offset | size << 16 | is_write << 24 of the last access to the plain bytes."""
MMIO_LAST_VALUE = 0x808
"""u64, read only: the value of that access, zero-extended."""
MMIO_COUNT = 0x810
"""u32: accesses to the plain bytes so far; a store of any value sets it to 0. Other offsets read all ones."""

RDMA_GPA = 0xFEB2_0000
RDMA_SIZE = 0x1000
RDMA_SQ = 0x00
"""u64: gpa of the send ring. A store resets the queue: nothing produced, nothing completed, ready."""
RDMA_CQ = 0x08
"""u64: gpa of the completion ring; its entry n belongs to request n of the send ring."""
RDMA_RING_KEY = 0x10
"""u32: key of the memory region that both rings lie in."""
RDMA_STATE = 0x14
"""u32, read only: RDMA_RESET, RDMA_READY, or RDMA_ERROR after a request failed."""
RDMA_DOORBELL = 0x18
"""u32: how many requests were produced since the reset; a store makes the engine look."""
RDMA_COMPLETED = 0x1C
"""u32, read only: how many of them have their completion. Other offsets read all ones."""
RDMA_RESET, RDMA_READY, RDMA_ERROR = 0, 1, 2
RDMA_RING_ENTRIES = 64
RDMA_WQE_SIZE = 64
"""u32 opcode, wr_id, lkey, rkey; u64 laddr, raddr; u32 length, 0; u64 operand of the fetch-add; zeros."""
RDMA_CQE_SIZE = 16
"""u32 wr_id, status (WC_*); u64 the request's number, from 1: written last, so it says that the rest is."""
RDMA_MAX_BYTES = 0x1_0000
RDMA_WRITE, RDMA_READ, RDMA_FETCH_ADD = 1, 2, 3
"""Opcodes: local to remote; remote to local; add the operand to 8 remote bytes, what was there to local."""
WC_SUCCESS, WC_LOC_QP_OP_ERR, WC_LOC_PROT_ERR, WC_WR_FLUSH_ERR, WC_REM_ACCESS_ERR = 0, 2, 4, 5, 10
"""Statuses (enum ib_wc_status): bad request; local key or address; behind a failed one; the remote's."""

ENOENT, ECHILD, ENOMEM, EFAULT, EBUSY, EEXIST, EINVAL, ENOTTY = 2, 10, 12, 14, 16, 17, 22, 25
ENOSYS, ENODATA = 38, 61
EIO, EHWPOISON = 5, 133
EAGAIN, EOPNOTSUPP = 11, 95
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4

VMCALL_SWAP_OUT = 0x5246_0001
VMCALL_MIGRATE = 0x5246_0002
VMCALL_DONTNEED = 0x5246_0003
VMCALL_PROTECT = 0x5246_0004
VMCALL_PROTECT_FAULTS = 0x5246_0005
VMCALL_AGE = 0x5246_0006
VMCALL_MAP_LEVEL = 0x5246_0007
VMCALL_HOST_READ = 0x5246_0008
VMCALL_HOST_WRITE = 0x5246_0009
VMCALL_RECLAIM = 0x5246_000A
VMCALL_FORK = 0x5246_0010
VMCALL_CHILD_READ = 0x5246_0011
VMCALL_CHILD_EXIT = 0x5246_0012
VMCALL_DIRTY_LOG = 0x5246_0020
VMCALL_GET_DIRTY = 0x5246_0021
VMCALL_SLOT_CREATE = 0x5246_0030
VMCALL_SLOT_DELETE = 0x5246_0031
VMCALL_SLOT_RESTORE = 0x5246_0032
VMCALL_SLOT_MOVE = 0x5246_0033
VMCALL_EPT_SET = 0x5246_0040
VMCALL_EPT_RESTORE = 0x5246_0041
VMCALL_EPT_AD = 0x5246_0042
VMCALL_LAST_EXIT = 0x5246_0043
VMCALL_CPU_COUNT = 0x5246_0050
VMCALL_START_CPU = 0x5246_0051
VMCALL_MMIO_DEVICE = 0x5246_0060
VMCALL_WEATHER = 0x5246_0070
VMCALL_MIRROR_READ = 0x5246_0080
VMCALL_DMA_WRITE = 0x5246_0081
VMCALL_KVM_MAP_WRITE = 0x5246_0082
VMCALL_KSM_MERGE = 0x5246_0090
VMCALL_KSM_UNMERGE = 0x5246_0091
VMCALL_RDMA_REGISTER = 0x5246_01B0
VMCALL_RDMA_DEREGISTER = 0x5246_01B1
VMCALL_RDMA_PEER_READ = 0x5246_01B2
VMCALL_RDMA_PEER_WRITE = 0x5246_01B3
VMCALL_RDMA_PEER_ADD = 0x5246_01B4
VMCALL_UFFD_MISSING = 0x5246_0170
VMCALL_UFFD_WP = 0x5246_0171
VMCALL_UFFD_MOVE = 0x5246_0172
VMCALL_UFFD_END = 0x5246_0173
VMCALL_UFFD_READ = 0x5246_0174
VMCALL_PAGEMAP_SCAN = 0x5246_0175
VMCALL_UFFD_MINOR = 0x5246_0176
VMCALL_NUMA_BALANCE = 0x5246_0178
VMCALL_VCPU_NODE = 0x5246_0179
VMCALL_PAGES_ON_NODE = 0x5246_017A
VMCALL_DUNE_READ = 0x5246_01B5
VMCALL_DUNE_WRITE = 0x5246_01B6
VMCALL_SVA_READ = 0x5246_01B7
VMCALL_SVA_WRITE = 0x5246_01B8
VMCALL_PFNMAP_CREATE = 0x5246_01B9
VMCALL_PFNMAP_REVOKE = 0x5246_01BA
VMCALL_DEVICE_MIGRATE = 0x5246_01BB
VMCALL_DEVICE_READ = 0x5246_01BC
VMCALL_DEVICE_WRITE = 0x5246_01BD
VMCALL_DEVICE_ADD = 0x5246_01BE
VMCALL_NR_HUGEPAGES = 0x5246_0140
VMCALL_HUGETLB_CREATE = 0x5246_0141
VMCALL_HUGETLB_PEER_READ = 0x5246_0142
VMCALL_HUGETLB_PEER_WRITE = 0x5246_0143
VMCALL_HUGETLB_SHARERS = 0x5246_0144
VMCALL_HUGETLB_UNSHARE = 0x5246_0145
VMCALL_THP_ENABLE = 0x5246_0120
VMCALL_COLLAPSE = 0x5246_0121
VMCALL_THP_SPLIT = 0x5246_0122
VMCALL_KHUGEPAGED = 0x5246_0123
VMCALL_PAGE_IDLE_SET = 0x5246_0150
VMCALL_PAGE_IDLE_GET = 0x5246_0151
VMCALL_DAMON = 0x5246_0152
VMCALL_COMPACT = 0x5246_0190
VMCALL_CONTIG_ALLOC = 0x5246_0191
VMCALL_CONTIG_FREE = 0x5246_0192
VMCALL_OFFLINE = 0x5246_0193
VMCALL_ONLINE = 0x5246_0194
VMCALL_MBIND = 0x5246_0195
VMCALL_PIN = 0x5246_0196
VMCALL_UNPIN = 0x5246_0197
VMCALL_SOFT_OFFLINE = 0x5246_0198
VMCALL_MEMORY_FAILURE = 0x5246_0199
VMCALL_MEMCG_LIMIT = 0x5246_0153
VMCALL_MEMCG_RECLAIM = 0x5246_0154
VMCALL_LRU_GEN_ENABLE = 0x5246_0155
VMCALL_LRU_GEN_AGE = 0x5246_0156
VMCALL_LRU_GEN_EVICT = 0x5246_0157
VMCALL_ZSWAP_ENABLE = 0x5246_0158
VMCALL_ZSWAP_WRITEBACK = 0x5246_0159
VMCALL_OOM_KILL = 0x5246_015A
VMCALL_COLD = 0x5246_01D0
VMCALL_FREE = 0x5246_01D1
VMCALL_CLEAR_REFS = 0x5246_01D2
VMCALL_MLOCK = 0x5246_01D3
VMCALL_MUNLOCK = 0x5246_01D4
VMCALL_MREMAP = 0x5246_01D5
VMCALL_MEMFD_CREATE = 0x5246_0100
VMCALL_FILE_CREATE = 0x5246_0101
VMCALL_FSYNC = 0x5246_0102
VMCALL_PUNCH_HOLE = 0x5246_0103
VMCALL_REMOVE = 0x5246_0104
VMCALL_TRUNCATE = 0x5246_0105
VMCALL_FILE_WRITE = 0x5246_0106
VMCALL_PEER_WRITE = 0x5246_0107
VMCALL_FADVISE_DONTNEED = 0x5246_0108
VMCALL_MAP_GPA_RANGE = 12
"""Linux's own number of this hypercall, KVM_HC_MAP_GPA_RANGE."""
VMCALL_GMEM_CREATE = 0x5246_0250
VMCALL_GMEM_PUNCH = 0x5246_0251
VMCALL_MEMORY_ATTRIBUTES = 0x5246_0252
VMCALL_PREFAULT = 0x5246_0253
VMCALL_SET_CLOCK = 0x5246_0230
VMCALL_KVMCLOCK_CTRL = 0x5246_0231
VMCALL_APIC_PAGE = 0x5246_0232
VMCALL_GVT_OPEN = 0x5246_0233
VMCALL_GVT_CLOSE = 0x5246_0234
VMCALL_GVT_SHADOW = 0x5246_0235
VMCALL_GVT_UNSHADOW = 0x5246_0236
VMCALL_GVT_STALE = 0x5246_0237
VMCALL_GVT_TOLD = 0x5246_0238
VMCALL_GVT_READ = 0x5246_0239
VMCALL_SMRAM = 0x5246_023A
VMCALL_SMI = 0x5246_023B
VMCALL_SMRAM_OUT = 0x5246_023C
VMCALL_FLASH = 0x5246_023D
VMCALL_MANUAL_DIRTY = 0x5246_0210
VMCALL_CLEAR_DIRTY = 0x5246_0211
VMCALL_HARVEST_RINGS = 0x5246_0212

KVM_CLOCK_MSR = 0x4B56_4D01
"""Where the guest says in which page KVM keeps its time: arch/x86/include/asm/pvclock-abi.h."""
KVM_CLOCK_STOPPED = 2

APIC_GPA = 0xFEE0_0000
"""The local APIC's registers, where CPUID leaf 1 says that there is one: Intel SDM vol. 3A 11.4."""

SMRAM_GPA = 0x3_0000
"""SMBASE after reset, and where SMRAM is."""

LAST_EXIT_REASON = 0
LAST_EXIT_QUALIFICATION = 1
LAST_EXIT_GPA = 2
LAST_EXIT_GVA = 3
LAST_EXIT_CAUGHT = 4
"""The fields of VMCALL_LAST_EXIT."""


class Vmcall(NamedTuple):
    """One vmcall: `args` in register order RBX, RCX, RDX, RSI; `errnos` beyond the common ones."""

    nr: int
    name: str
    args: tuple[str, ...]
    result: str
    errnos: tuple[str, ...]
    doc: str


VMCALLS: tuple[Vmcall, ...] = (
    Vmcall(VMCALL_SWAP_OUT, "swap_out", ("gpa", "pages"), "pages of the range without a frame", (),
           "madvise(MADV_PAGEOUT) on the VMM's mapping of the range. The result counts the pages whose "
           "host PTE is not present when the call returns, whether this call or an earlier reclaim took "
           "them; less than `pages` where swap is full or a page is shared. The VMM waits for the "
           "writes. -ENOSYS without swap."),
    Vmcall(VMCALL_MIGRATE, "migrate", ("gpa", "pages"), "pages that moved to another frame", (),
           "move_pages(2) of each present page to another NUMA node (to any other frame where there is "
           "one node). Pages without a frame stay so and do not count; nor does one that could not be "
           "moved."),
    Vmcall(VMCALL_DONTNEED, "dontneed", ("gpa", "pages"), "0", (),
           "madvise(MADV_DONTNEED): the range reads as zeros afterwards."),
    Vmcall(VMCALL_PROTECT, "protect", ("gpa", "pages", "prot"), "0", (),
           "mprotect(2) of the VMM's mapping of the range with PROT_READ | PROT_WRITE | PROT_EXEC bits; "
           "0 is PROT_NONE; -EINVAL for other bits. Zeroes the count of protect_faults. A guest access "
           "that the protection forbids leaves KVM_RUN with a memory fault (-EFAULT); the VMM then "
           "mprotects every range protected by this vmcall back to PROT_READ | PROT_WRITE, as it was, "
           "adds one to the count and re-enters: the access is repeated and succeeds. A host_read or "
           "host_write that it forbids gives -EFAULT and lifts nothing. PROT_EXEC does not matter to "
           "the guest: KVM maps executable whatever it may read."),
    Vmcall(VMCALL_PROTECT_FAULTS, "protect_faults", (), "memory faults since the last protect", (),
           "How many accesses of the guest (all vCPUs) met the protection since the last protect()."),
    Vmcall(VMCALL_AGE, "age", ("gpa", "pages"), "pages of the range that were young", (),
           "What folio_referenced and page_idle do to each page: test and clear the accessed bit in the "
           "host PTE and, through the notifier's clear_flush_young, in every SPTE. The result counts "
           "4 KiB pages that were young in either; a huge mapping that was young counts all its pages "
           "in the range. Pages without a frame are not young. The host's A bits that the vmcall itself "
           "makes young do not count: nothing in the range is touched after the clearing."),
    Vmcall(VMCALL_MAP_LEVEL, "map_level", ("gpa",), "0 unmapped, 1 4 KiB, 2 2 MiB, 3 1 GiB", (),
           "The level of the present leaf SPTE that maps `gpa` in the caller's root; 0 where there is "
           "none. -ENOSYS in shadow mode."),
    Vmcall(VMCALL_HOST_READ, "host_read", ("gpa", "size"), "the value, zero-extended", (),
           "The VMM reads `size` bytes (1, 2 or 4, else -EINVAL) at `gpa`, aligned to the size, through "
           "its own mapping, faulting pages in."),
    Vmcall(VMCALL_HOST_WRITE, "host_write", ("gpa", "value", "size"), "0", (),
           "The VMM stores the low `size` bytes (1, 2 or 4) of `value` at `gpa`, as host_read. Guest "
           "code in that page is fetched anew. Not seen by dirty_log: the log has KVM's writes only."),
    Vmcall(VMCALL_RECLAIM, "reclaim", ("pages",), "frames that came free", (),
           "Asks the host's reclaim for `pages` frames, whosever they are, as a write to memory.reclaim "
           "does. -EINVAL for 0."),
    Vmcall(VMCALL_FORK, "fork", (), "0", ("EBUSY", "ENOMEM"),
           "fork(2) of the VMM process. The child never runs; its memory is the guest's bytes of this "
           "moment, shared copy-on-write. -EBUSY while a child of an earlier call lives."),
    Vmcall(VMCALL_CHILD_READ, "child_read", ("gpa", "size"), "the value, zero-extended", ("ECHILD",),
           "As host_read, but through the forked child's address space. -ECHILD without a child."),
    Vmcall(VMCALL_CHILD_EXIT, "child_exit", (), "0", ("ECHILD",),
           "The forked child exits: its address space is torn down. -ECHILD without a child."),
    Vmcall(VMCALL_DIRTY_LOG, "dirty_log", ("gpa", "on"), "0", (),
           "KVM_SET_USER_MEMORY_REGION of the slot that holds `gpa` with KVM_MEM_LOG_DIRTY_PAGES set "
           "(on = 1) or clear (on = 0). -EINVAL for another `on`."),
    Vmcall(VMCALL_GET_DIRTY, "get_dirty", ("gpa", "pages", "buffer"), "dirty pages of the range",
           ("ENOENT",),
           "KVM_GET_DIRTY_LOG of the slot that holds `gpa` (the log of the whole slot is fetched and "
           "cleared and its pages are write-protected or their D bits cleared again). Of the bitmap, "
           "the bits of the range, first page in bit 0, are stored at gpa `buffer` by the VMM, in whole "
           "bytes, the last one padded with zeros; `buffer` 0 stores nothing. `pages` <= 32768. The "
           "range must lie in one slot. -ENOENT while the slot is not logged. Pages the CPU dirtied by "
           "setting guest A/D bits count; host_write and this vmcall's own store do not."),
    Vmcall(VMCALL_MAP_GPA_RANGE, "map_gpa_range", ("gpa", "pages", "attributes"), "0", (),
           "KVM_HC_MAP_GPA_RANGE: the pages become private (16: KVM_MAP_GPA_RANGE_ENCRYPTED) or shared (0) "
           "and read as zeros where they were not already; what they held as the other kind is dropped. "
           "host_read and host_write do not reach private pages: they see the shared ones. -EINVAL for "
           "other attributes, and for 16 on a VM without private memory."),
    Vmcall(VMCALL_GMEM_CREATE, "gmem_create", ("gpa", "pages", "flags"), "slot number >= 1",
           ("EEXIST", "ENOMEM"),
           "A memory slot of a new guest_memfd with KVM_CREATE_GUEST_MEMFD's `flags`: 1 MMAP, 2 INIT_SHARED. "
           "With both the VMM has the same pages mapped; with 0 it has others, which the guest sees as "
           "shared. -EINVAL for flags that the VM does not support: a protected VM has no 2. -ENOSYS before "
           "Linux 6.8."),
    Vmcall(VMCALL_GMEM_PUNCH, "gmem_punch", ("gpa", "pages"), "0", (),
           "fallocate(PUNCH_HOLE) of the range's pages of guest_memfd: zeros from now on. -EINVAL where "
           "there is none."),
    Vmcall(VMCALL_MEMORY_ATTRIBUTES, "memory_attributes", ("gpa", "pages", "attributes"), "0", (),
           "KVM_SET_MEMORY_ATTRIBUTES: 8 private, 0 shared. Both kinds of a page keep their bytes. -EINVAL "
           "for attributes that the VM does not support: only a protected one has 8. -ENOSYS before 6.8."),
    Vmcall(VMCALL_PREFAULT, "prefault", ("gpa", "pages"), "pages mapped, from `gpa` on", (),
           "KVM_PRE_FAULT_MEMORY on the calling vCPU: the range is mapped, as far as it goes, as by faults "
           "for reading, but counts as not accessed. -ENOSYS with shadow paging and before Linux 6.11."),
    Vmcall(VMCALL_MANUAL_DIRTY, "manual_dirty", ("value",), "0", (),
           "KVM_ENABLE_CAP with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: with `value` 1 get_dirty neither clears "
           "nor protects, clear_dirty does; with 3 also every page of a log is set from its start, and "
           "nothing protected; 0 as without. -EINVAL for others."),
    Vmcall(VMCALL_CLEAR_DIRTY, "clear_dirty", ("gpa", "pages"), "0", ("ENOENT", "ENXIO"),
           "KVM_CLEAR_DIRTY_LOG: clears the range's bits and protects those pages that had one. The range "
           "must lie in one slot. -ENOENT while the slot is not logged, -ENXIO on a VM with dirty rings."),
    Vmcall(VMCALL_HARVEST_RINGS, "harvest_rings", ("reset",), "entries found", (),
           "The VMM takes every vCPU's dirty ring's new entries, which get_dirty then answers, and if "
           "`reset` is 1 calls KVM_RESET_DIRTY_RINGS. 0 on a VM without rings. -EINVAL for another `reset`."),
    Vmcall(VMCALL_SLOT_CREATE, "slot_create", ("gpa", "pages"), "slot number >= 1", ("EEXIST", "ENOMEM"),
           "mmap of fresh zeroed memory and a new memory slot that shows it at `gpa`. -EEXIST where it "
           "overlaps another slot. The numbers given out are not reused."),
    Vmcall(VMCALL_SLOT_DELETE, "slot_delete", ("slot",), "0", ("ENOENT",),
           "KVM_SET_USER_MEMORY_REGION with size 0. The memory is kept by the VMM. Until it is restored "
           "loads from there read all ones and stores go nowhere (MMIO exits to nobody). -ENOENT for a "
           "number that slot_create did not give or that is deleted already."),
    Vmcall(VMCALL_SLOT_RESTORE, "slot_restore", ("slot",), "0", ("ENOENT", "EEXIST"),
           "A deleted slot's memory becomes visible again where it last was, with its old bytes. "
           "-EEXIST where something else is there now or the slot is not deleted."),
    Vmcall(VMCALL_SLOT_MOVE, "slot_move", ("slot", "gpa"), "0", ("ENOENT", "EEXIST"),
           "KVM_SET_USER_MEMORY_REGION with another base: the same memory at `gpa`, nothing at the old "
           "place. The slot must not be deleted (-ENOENT). -EEXIST on overlap."),
    Vmcall(VMCALL_SET_CLOCK, "set_clock", ("ns",), "0", (),
           "KVM_SET_CLOCK: kvmclock (MSR KVM_CLOCK_MSR holds the address of its page, bit 0 set) shows `ns` "
           "now and goes on from there. -EINVAL from 2^63 on."),
    Vmcall(VMCALL_KVMCLOCK_CTRL, "kvmclock_ctrl", ("cpu",), "1, without a clock 0", (),
           "KVM_KVMCLOCK_CTRL: the flag KVM_CLOCK_STOPPED is set in the page of vCPU `cpu`. -EINVAL for a "
           "CPU that does not exist."),
    Vmcall(VMCALL_APIC_PAGE, "apic_page", ("move",), "pages taken: 0 or 1", (),
           "The host swaps KVM's APIC-access page out or, with `move` 1, moves it to another frame. 0 where "
           "the machine has no local APIC. -EINVAL for other values."),
    Vmcall(VMCALL_GVT_OPEN, "gvt_open", (), "a device's number, from 1 on", ("ENODEV",),
           "A GPU that translates by tables in guest memory. -ENODEV beyond eight."),
    Vmcall(VMCALL_GVT_CLOSE, "gvt_close", ("device",), "0", ("ENOENT",),
           "The GPU goes, with its hold on tables and pages."),
    Vmcall(VMCALL_GVT_SHADOW, "gvt_shadow", ("device", "gpa"), "0", ("ENOENT", "EEXIST"),
           "The page is a table of the GPU from now on: 512 entries, bit 0 present, bits 12-51 a guest page. "
           "The GPU follows each write of the guest; what the host changes it does not see."),
    Vmcall(VMCALL_GVT_UNSHADOW, "gvt_unshadow", ("device", "gpa"), "0", ("ENOENT",),
           "It is a table of this GPU no more."),
    Vmcall(VMCALL_GVT_STALE, "gvt_stale", ("device",), "entries that differ", ("ENOENT",),
           "Compares the GPU's copy of its tables with guest memory."),
    Vmcall(VMCALL_GVT_TOLD, "gvt_told", ("device",), "writes that the GPU was told of", ("ENOENT",),
           "A store that crosses into the table or out of it counts for its part there."),
    Vmcall(VMCALL_GVT_READ, "gvt_read", ("device", "gpa", "index", "offset"), "the value", ("ENOENT",),
           "The GPU reads 8 bytes at `offset`, aligned to 8, of the page that entry `index` of table `gpa` "
           "maps. -EFAULT where it maps nothing."),
    Vmcall(VMCALL_SMRAM, "smram", ("gpa", "size"), "0", ("EEXIST",),
           "The VMM makes an address space for SMM: SMRAM of 64 KiB at SMRAM_GPA, seen in SMM only, and "
           "beside it the memory there is. `size` bytes at `gpa`, within a page, are copied to SMRAM_GPA + "
           "0x8000, where 16-bit code begins at an SMI."),
    Vmcall(VMCALL_SMI, "smi", ("cpu",), "0", ("ENOTTY",),
           "An SMI to vCPU `cpu`, taken before its next instruction. -ENOTTY before smram, -EINVAL for a CPU "
           "that does not exist."),
    Vmcall(VMCALL_SMRAM_OUT, "smram_out", (), "pages of SMRAM without a frame", (),
           "madvise(MADV_PAGEOUT) of SMRAM."),
    Vmcall(VMCALL_FLASH, "flash", ("gpa", "pages", "source"), "the slot's number", ("EEXIST",),
           "NOR flash at `gpa` with a copy of `pages` pages at `source`: a read-only memory slot for reads "
           "and fetches; stores are commands as QEMU's pflash has them: 0x40 and a store of data clear bits, "
           "0x20 and 0xd0 erase a page to ones, 0x70 shows the status; 0xff shows the array again."),
    Vmcall(VMCALL_EPT_SET, "ept_set", ("gpa", "rwx"), "0", (),
           "An instrument on the CPU, not an act of Linux. Makes sure that a 4 KiB EPT leaf maps `gpa` "
           "(faulting it in, splitting a huge one), notes its entry and replaces bits 2:0 with `rwx` "
           "(read 1, write 2, execute 4; others -EINVAL), then flushes. The next EPT violation or "
           "misconfiguration at that page is caught before KVM's handler sees it: reason, "
           "qualification, gpa and gva are recorded for last_exit, the entry gets its bits back (the "
           "A/D bits it gathered stay), the vCPU is flushed and re-entered. So one call causes at most "
           "one exit. Records of earlier calls are forgotten. All entries above the leaf allow "
           "everything. Only one page is armed at a time: another call restores the first. "
           "Execute-only entries (4) are legal on this CPU; 2 and 6 are misconfigurations. "
           "-ENOSYS outside EPT mode."),
    Vmcall(VMCALL_EPT_RESTORE, "ept_restore", (), "exits caught since ept_set: 0 or 1", (),
           "Gives the armed entry its bits back if no exit did, and flushes. The record stays."),
    Vmcall(VMCALL_EPT_AD, "ept_ad", ("on",), "the setting before: 0 or 1", (),
           "Sets EPTP bit 6 (accessed and dirty flags for EPT) of every vCPU to `on` from the next "
           "entry, and flushes. Part of the same instrument: put it back when done. -EINVAL for other "
           "values, -ENOSYS outside EPT mode."),
    Vmcall(VMCALL_LAST_EXIT, "last_exit", ("field",), "the field", ("ENODATA",),
           "What the exit caught by ept_set recorded: LAST_EXIT_REASON 0 (48 violation, 49 "
           "misconfiguration), LAST_EXIT_QUALIFICATION 1 (SDM Table 28-7; 0 for 49), LAST_EXIT_GPA 2 "
           "(full address; for the walk's own accesses that of the entry), LAST_EXIT_GVA 3, "
           "LAST_EXIT_CAUGHT 4 (0 or 1, never -ENODATA). -ENODATA while nothing was caught; -EINVAL "
           "for another field."),
    Vmcall(VMCALL_CPU_COUNT, "cpu_count", (), "vCPUs of the VM", (),
           "How many vCPUs exist, started or not. They are numbered from 0; the one that boots is 0."),
    Vmcall(VMCALL_START_CPU, "start_cpu", ("cpu", "entry", "stack", "arg"), "0", ("EBUSY",),
           "vCPU `cpu` starts in 64-bit mode at RIP = `entry` with RSP = `stack`, RDI = `arg`, RSI = "
           "`cpu`, other registers 0, RFLAGS = 2 (interrupts off), and CR0, CR3, CR4, EFER, segments, "
           "GDTR and IDTR of the caller; LDTR and TR are null (it loads its own TSS). It stops at HLT "
           "with interrupts off and can then be started again. -EBUSY while it runs, -EINVAL for 0 and "
           "for a CPU that does not exist."),
    Vmcall(VMCALL_MMIO_DEVICE, "mmio_device", (), "MMIO_TEST_GPA", (),
           "Asks whether the MMIO test device (MMIO_*) exists. It always does where it is implemented; "
           "it is outside every memory slot and its accesses leave KVM as MMIO exits. Loads from "
           "OPEN_BUS_GPA give all ones of their size, stores there go nowhere."),
    Vmcall(VMCALL_WEATHER, "weather", ("period",), "0", ("EBUSY",),
           "Until the guest ends, a host thread does something to random pages about every `period` ns: "
           "migrates, swaps out, ages, cools or reclaims them, or forks the VMM for a while. All of it is "
           "transparent. -EBUSY when it is on already, -EINVAL below 1000 ns."),
    Vmcall(VMCALL_MIRROR_READ, "mirror_read", ("gpa", "size"), "the value, zero-extended", (),
           "A device that keeps page tables of its own for the slot's memory, as an interval notifier's "
           "user does, reads `size` bytes (1, 2, 4 or 8) at `gpa`, aligned to the size."),
    Vmcall(VMCALL_DMA_WRITE, "dma_write", ("gpa", "value", "size", "ns"), "0", ("ENOMEM",),
           "A device pins the page of `gpa`, stores the low `size` bytes of `value` by DMA `ns` later and "
           "unpins the page, dirty. The call returns after that; other CPUs go on meanwhile. The device "
           "goes by the frame: were the page moved in spite of the pin, the store would be lost."),
    Vmcall(VMCALL_KVM_MAP_WRITE, "kvm_map_write", ("gpa", "value", "size", "ns"), "0", (),
           "The same, but it is KVM that maps the page for itself, as the VMCS12 of a nested guest: with a "
           "plain reference, marked dirty at the end without the folio lock."),
    Vmcall(VMCALL_KSM_MERGE, "ksm_merge", ("gpa", "pages", "zero_pages"), "merged pages of the range",
           ("ENOMEM",),
           "madvise(MADV_MERGEABLE) of the range, then ksmd scans every mergeable page of the host until a "
           "full scan changes nothing, or at most a dozen times. With `zero_pages` 1 pages of zeros become "
           "the zero page; -EINVAL for other values. Other CPUs go on meanwhile."),
    Vmcall(VMCALL_KSM_UNMERGE, "ksm_unmerge", ("gpa", "pages"), "0", ("ENOMEM",),
           "madvise(MADV_UNMERGEABLE): every merged page of the range is copied to a frame of its own."),
    Vmcall(VMCALL_RDMA_REGISTER, "rdma_register", ("gpa", "pages", "pinned"), "a key >= 1", ("ENOMEM",),
           "The VMM registers the range with the RDMA engine (RDMA_GPA), whose addresses are then the gpas: "
           "on demand (pinned = 0: the engine faults pages in and loses them to the host like the guest "
           "does) or pinned for good (1). The range must lie in one slot. -EINVAL for another `pinned`."),
    Vmcall(VMCALL_RDMA_DEREGISTER, "rdma_deregister", ("key",), "0", ("ENOENT",),
           "The key opens nothing any more; waits for the request that works on its region."),
    Vmcall(VMCALL_RDMA_PEER_READ, "rdma_peer_read", ("key", "gpa", "size"), "the value, zero-extended",
           ("ENOENT",), "The engine's peer reads `size` bytes (1, 2, 4 or 8) of the region."),
    Vmcall(VMCALL_RDMA_PEER_WRITE, "rdma_peer_write", ("key", "gpa", "value", "size"), "0", ("ENOENT",),
           "The engine's peer stores the low `size` bytes of `value` into the region."),
    Vmcall(VMCALL_RDMA_PEER_ADD, "rdma_peer_add", ("key", "gpa", "value"), "what was there", ("ENOENT",),
           "The engine's peer adds `value` to the 8 bytes at `gpa`, aligned to 8, at once."),
    Vmcall(VMCALL_NUMA_BALANCE, "numa_balance", ("gpa", "pages"), "pages that will fault", (),
           "One scan of NUMA balancing over the range: mapped pages lose their rights, and the next access "
           "gives them back or, from another node, moves the page to it first."),
    Vmcall(VMCALL_VCPU_NODE, "vcpu_node", ("cpu", "node"), "0", (),
           "sched_setaffinity of vCPU `cpu`'s thread to the CPUs of NUMA node `node`. -EINVAL where one of "
           "them does not exist."),
    Vmcall(VMCALL_PAGES_ON_NODE, "pages_on_node", ("gpa", "pages", "node"), "pages of the range on the node",
           (),
           "move_pages(2) without nodes: how many pages of the range have a frame on `node`."),
    Vmcall(VMCALL_UFFD_MISSING, "uffd_missing", ("gpa", "pages"), "pages that were set aside", (),
           "Post-copy: the VMM keeps the bytes of the range's pages, drops them with MADV_DONTNEED, and a "
           "thread of its brings each when somebody touches it, by UFFDIO_COPY; pages that were never there "
           "come as UFFDIO_ZEROPAGE. Accesses wait meanwhile. Ends what an earlier uffd_* began."),
    Vmcall(VMCALL_UFFD_WP, "uffd_wp", ("gpa", "pages"), "0", (),
           "Snapshot: the range is write-protected with UFFDIO_WRITEPROTECT; the first write to each page "
           "waits until a thread of the VMM has saved the page. Ends what an earlier one began."),
    Vmcall(VMCALL_UFFD_MOVE, "uffd_move", ("gpa", "pages"), "pages that went", (),
           "UFFDIO_MOVE of the range's pages to another place of the VMM, and of each back when somebody "
           "touches it. Pages that are pinned or shared stay. Ends what an earlier one began."),
    Vmcall(VMCALL_UFFD_MINOR, "uffd_minor", ("gpa", "pages"), "0", (),
           "The range, which is memfd_create's, is unmapped; its pages stay in the memfd, and each is mapped "
           "by UFFDIO_CONTINUE when somebody touches it. Ends what an earlier one began. -EINVAL for other "
           "memory."),
    Vmcall(VMCALL_UFFD_END, "uffd_end", (), "pages written after uffd_wp, else faults served", ("ENOENT",),
           "Ends what uffd_missing, uffd_wp or uffd_move began: what is elsewhere comes back first. -ENOENT "
           "when nothing was begun."),
    Vmcall(VMCALL_UFFD_READ, "uffd_read", ("gpa", "size"), "the value, zero-extended", ("ENOENT",),
           "As host_read, of the memory as it was at uffd_wp. -ENOENT without a snapshot."),
    Vmcall(VMCALL_PAGEMAP_SCAN, "pagemap_scan", ("gpa", "pages", "protect"), "written pages of the range",
           (),
           "PAGEMAP_SCAN of the range for pages that were written since they were protected last; those that "
           "never were count as written. With `protect` 1 (else 0) what was found is protected "
           "(PM_SCAN_WP_MATCHING); the next write lifts that and nobody waits. Ends what uffd_* began."),
    Vmcall(VMCALL_DUNE_READ, "dune_read", ("gpa", "size"), "the value, zero-extended", ("ENOMEM",),
           "As host_read, also of 8 bytes, but the VMM runs on an EPT of its own, which its faults fill and "
           "brackets empty, like a guest's."),
    Vmcall(VMCALL_DUNE_WRITE, "dune_write", ("gpa", "value", "size"), "0", ("ENOMEM",),
           "As host_write, also of 8 bytes, in the same way."),
    Vmcall(VMCALL_SVA_READ, "sva_read", ("gpa", "size"), "the value, zero-extended", (),
           "A device reads `size` bytes (1, 2, 4 or 8) at `gpa`, aligned to the size, through an IOMMU that "
           "walks the VMM's own page tables."),
    Vmcall(VMCALL_SVA_WRITE, "sva_write", ("gpa", "value", "size"), "0", (),
           "That device stores the low `size` bytes of `value`."),
    Vmcall(VMCALL_PFNMAP_CREATE, "pfnmap_create", ("gpa", "pages"), "slot number >= 1",
           ("EEXIST", "ENOSPC"),
           "A PCI function's memory, zeros, in a new memory slot at `gpa`: frames that no struct page "
           "counts, mapped raw into the VMM. Reads and writes are plain accesses, no exits. The slot may be "
           "deleted, restored and moved like slot_create's."),
    Vmcall(VMCALL_PFNMAP_REVOKE, "pfnmap_revoke", ("slot",), "0", ("ENOENT", "ENOSPC"),
           "The function is reset: its memory is taken from the VMM and the guest, and the next access finds "
           "other frames, with zeros. -ENOENT for a slot that pfnmap_create did not give."),
    Vmcall(VMCALL_DEVICE_MIGRATE, "device_migrate", ("gpa", "pages"), "pages in device memory then",
           ("ENOSPC",),
           "Pages of the range go to the memory of a device, with their bytes, as far as it has room (256 "
           "pages a slot); pages that nobody has touched go there as zeros. The guest's next access to one "
           "brings it back."),
    Vmcall(VMCALL_DEVICE_READ, "device_read", ("gpa", "size"), "the value, zero-extended", ("ENOSPC",),
           "That device reads `size` bytes (1, 2, 4 or 8) at `gpa`, aligned to the size, from its own memory "
           "or from RAM, wherever the page is."),
    Vmcall(VMCALL_DEVICE_WRITE, "device_write", ("gpa", "value", "size"), "0", ("ENOSPC",),
           "That device stores the low `size` bytes of `value`, in the same way."),
    Vmcall(VMCALL_DEVICE_ADD, "device_add", ("gpa", "value"), "what was there", ("ENOSPC",),
           "That device adds `value` to the 8 bytes at `gpa`, aligned to 8, while the page is its alone: the "
           "guest's next access takes the page back."),
    Vmcall(VMCALL_NR_HUGEPAGES, "nr_hugepages", ("count",), "huge pages that the pool has then", (),
           "Writes `count` to /proc/sys/vm/nr_hugepages: the host's pool of 2 MiB pages grows to that, as "
           "far as free blocks of that size can be had, or shrinks to it, as far as they are free."),
    Vmcall(VMCALL_HUGETLB_CREATE, "hugetlb_create", ("gpa", "pages", "shared", "reserve"), "slot number >= 1",
           ("EEXIST", "ENOMEM"),
           "As slot_create, but of huge pages: `gpa` and the range are whole 2 MiB (-EINVAL). `shared` 1: of "
           "a memfd, which others can map; 0: private. `reserve` 1: the pool promises every page, -ENOMEM if "
           "it cannot; 0: a fault that finds no page leaves KVM_RUN with -EFAULT. -EINVAL for other values."),
    Vmcall(VMCALL_HUGETLB_PEER_READ, "hugetlb_peer_read", ("gpa", "size"), "the value, zero-extended", (),
           "Another process of the host maps the same memfd, on the first question about it, and reads "
           "`size` bytes (1, 2, 4 or 8) of it. Where 1 GiB of the file is mapped whole by both they use one "
           "page table. -EINVAL in other memory."),
    Vmcall(VMCALL_HUGETLB_PEER_WRITE, "hugetlb_peer_write", ("gpa", "value", "size"), "0", (),
           "That process stores the low `size` bytes of `value`."),
    Vmcall(VMCALL_HUGETLB_SHARERS, "hugetlb_sharers", ("gpa",), "other users of the page table", (),
           "How many other processes use the VMM's level-2 page table of `gpa`. -EINVAL outside huge pages."),
    Vmcall(VMCALL_HUGETLB_UNSHARE, "hugetlb_unshare", ("gpa",), "0", (),
           "The VMM gives up every page table that it shares for the region of `gpa`, as registering "
           "userfaultfd there does. Faults may share them again. -EINVAL outside huge pages."),
    Vmcall(VMCALL_THP_ENABLE, "thp_enable", ("gpa", "pages"), "0", (),
           "madvise(MADV_HUGEPAGE) of the range: the VMM's faults there map 2 MiB where 2 MiB fit, and "
           "khugepaged makes huge pages of small ones."),
    Vmcall(VMCALL_COLLAPSE, "collapse", ("gpa", "pages"), "pages of the range that are parts of huge ones",
           ("ENOMEM", "EBUSY", "EAGAIN"),
           "madvise(MADV_COLLAPSE): every aligned 2 MiB of the VMM's mapping in the range becomes one page. "
           "-ENOMEM without 2 MiB of free memory in one piece, -EAGAIN while somebody holds a page, -EINVAL "
           "where huge pages are not allowed or nothing was ever mapped. -ENOSYS on a kernel without it."),
    Vmcall(VMCALL_THP_SPLIT, "thp_split", ("gpa", "pages"), "huge pages that were split", (),
           "A write to /sys/kernel/debug/split_huge_pages: the huge pages of the range become small ones, "
           "but for those that somebody holds."),
    Vmcall(VMCALL_KHUGEPAGED, "khugepaged", (), "collapses", (),
           "Wakes khugepaged and waits until it has been through all memory that may have huge pages; 0 at "
           "once if there is none."),
    Vmcall(VMCALL_PAGE_IDLE_SET, "page_idle_set", ("gpa", "pages"), "frames made idle", (),
           "Sets the idle bits of the range's frames; accessed bits of host and guest are cleared. Frames "
           "on no LRU list, and pages without a frame, do not count."),
    Vmcall(VMCALL_PAGE_IDLE_GET, "page_idle_get", ("gpa", "pages"), "frames still idle", (),
           "How many of the range's frames nobody used since page_idle_set. Asking clears accessed bits."),
    Vmcall(VMCALL_DAMON, "damon", ("gpa", "pages", "ns", "sample_ns"), "pages of regions in use", (),
           "kdamond watches the VMM's mapping of the range for `ns` of logical time, one sample of each "
           "region every `sample_ns`; other CPUs go on meanwhile. The result is the size of the regions "
           "that the last aggregation found in use. -EINVAL unless 0 < sample_ns <= ns <= 10 s."),
    Vmcall(VMCALL_COMPACT, "compact", (), "pages moved", (),
           "A write to /proc/sys/vm/compact_memory: every zone of the host, from end to end."),
    Vmcall(VMCALL_CONTIG_ALLOC, "contig_alloc", ("gpa", "pages"), "a frame number >= 2", ("EBUSY", "ENOMEM"),
           "A device takes exactly the `pages` frames (a power of two up to 512, else -EINVAL), aligned to "
           "their size, among which is the page at `gpa`; what is in them moves away. -EBUSY where something "
           "cannot, -EFAULT where `gpa` has no page yet."),
    Vmcall(VMCALL_CONTIG_FREE, "contig_free", ("pfn",), "frames", (),
           "The device gives back what contig_alloc answered `pfn` for; -EINVAL for another."),
    Vmcall(VMCALL_OFFLINE, "offline", ("gpa",), "a frame number >= 2", ("EBUSY",),
           "The 2 MiB of host memory that the page at `gpa` is in go out of use; what is in them moves away. "
           "-EBUSY where something cannot: the kernel's own memory, a page that is pinned."),
    Vmcall(VMCALL_ONLINE, "online", ("pfn",), "0", (),
           "The memory that offline answered `pfn` for comes back into use; -EINVAL for another."),
    Vmcall(VMCALL_MBIND, "mbind", ("gpa", "pages", "node"), "pages of the range on the node", (),
           "mbind(MPOL_BIND, MPOL_MF_MOVE) of the VMM's mapping of the range. -EINVAL for a node that does "
           "not exist."),
    Vmcall(VMCALL_PIN, "pin", ("gpa", "pages"), "0", ("ENOMEM",),
           "A device pins the range for long and for writing, as io_uring pins a registered buffer: its "
           "frames stay where they are. -ENOMEM where a page cannot be moved out of movable memory first."),
    Vmcall(VMCALL_UNPIN, "unpin", ("gpa", "pages"), "0", (),
           "The pins of an earlier call of pin with the same range, the oldest; -EINVAL without one."),
    Vmcall(VMCALL_SOFT_OFFLINE, "soft_offline", ("gpa", "pages"), "0", ("EBUSY", "EIO"),
           "madvise(MADV_SOFT_OFFLINE) of the range: each page moves to another frame, and its old one is "
           "never used again. -EBUSY where a page is in use and stays, -EIO where it cannot be moved."),
    Vmcall(VMCALL_MEMORY_FAILURE, "memory_failure", ("gpa", "recover"), "0", ("EBUSY", "EHWPOISON"),
           "The memory of the frame behind `gpa` fails: its bytes are lost. At the next access KVM sends the "
           "VMM a SIGBUS. With `recover` 1 the VMM maps a page of zeros there and the access is repeated; "
           "with 0 the run ends. -EFAULT where `gpa` has no page of its own yet, -EBUSY "
           "where the frame is in use by somebody who cannot be told."),
    Vmcall(VMCALL_MEMCG_LIMIT, "memcg_limit", ("pages",), "pages charged to the group", ("ENOMEM",),
           "memory.max of the VMM's memory cgroup in pages; 0 lifts it. The first call makes the group; "
           "pages that the VMM has by then stay uncharged. A limit that reclaim cannot reach ends the run."),
    Vmcall(VMCALL_MEMCG_RECLAIM, "memcg_reclaim", ("pages",), "frames that came free", ("ENOENT", "EAGAIN"),
           "A write to memory.reclaim of the VMM's memory cgroup. -ENOENT before memcg_limit, -EAGAIN when "
           "so much cannot be had."),
    Vmcall(VMCALL_LRU_GEN_ENABLE, "lru_gen_enable", ("on",), "the setting before: 0 or 1", (),
           "Switches the host between the classic LRU (0) and the multi-generational one (1)."),
    Vmcall(VMCALL_LRU_GEN_AGE, "lru_gen_age", (), "the youngest generation", ("EEXIST",),
           "The host walks the page tables of the VMM's memory cgroup, clears accessed bits in host PTEs "
           "and SPTEs and opens a generation. -ENOSYS with the classic LRU."),
    Vmcall(VMCALL_LRU_GEN_EVICT, "lru_gen_evict", ("pages",), "frames that came free", (),
           "Reclaims up to `pages` frames from all but the two youngest generations. -ENOSYS with the "
           "classic LRU."),
    Vmcall(VMCALL_ZSWAP_ENABLE, "zswap_enable", ("on",), "the setting before: 0 or 1", (),
           "From now on swapped-out pages go into a compressed pool first (1), or not (0). -ENOSYS without "
           "swap."),
    Vmcall(VMCALL_ZSWAP_WRITEBACK, "zswap_writeback", ("pages",), "pages written", (),
           "Writes up to `pages` pages of the compressed pool to the swap file, oldest first."),
    Vmcall(VMCALL_OOM_KILL, "oom_kill", ("pages",), "pages reaped", ("ENOMEM",),
           "Another process of the host with so many pages is killed as by the OOM killer; its memory is "
           "reaped two seconds later. Other CPUs go on meanwhile."),
    Vmcall(VMCALL_COLD, "cold", ("gpa", "pages"), "0", (),
           "madvise(MADV_COLD): the range's pages are not young any more and go first when memory is short. "
           "-EINVAL where the range is locked."),
    Vmcall(VMCALL_FREE, "free", ("gpa", "pages"), "0", (),
           "madvise(MADV_FREE): until it is written again each page reads as before or, once reclaim "
           "dropped it, as zeros. -EINVAL where the range is locked."),
    Vmcall(VMCALL_CLEAR_REFS, "clear_refs", ("kind",), "0", (),
           "A write of `kind` to /proc/PID/clear_refs of the VMM: 1 to 3 forget that pages were accessed, 4 "
           "forgets that they were written (soft-dirty) and write-protects them until they are; -EINVAL for "
           "other values."),
    Vmcall(VMCALL_MLOCK, "mlock", ("gpa", "pages"), "0", ("ENOMEM",),
           "mlock(2): the range's pages are faulted in, for writing, and stay: reclaim leaves them, "
           "swap_out, dontneed, cold and free answer -EINVAL. Others may still move them."),
    Vmcall(VMCALL_MUNLOCK, "munlock", ("gpa", "pages"), "0", (),
           "munlock(2) of the range, whether or not it is locked."),
    Vmcall(VMCALL_MREMAP, "mremap", ("gpa", "pages"), "0", ("EBUSY", "ENOMEM"),
           "mremap(2) of the VMM's mapping to another place and back again. An access by another CPU that "
           "meets the hole leaves KVM_RUN with -EFAULT and waits until the memory is back. -EBUSY while "
           "another mremap is under way."),
    Vmcall(VMCALL_MEMFD_CREATE, "memfd_create", ("gpa", "pages"), "slot number >= 1", ("EEXIST", "ENOMEM"),
           "A memfd of `pages` pages, mapped MAP_SHARED by the VMM, in a new memory slot at `gpa`; it is "
           "a slot as slot_create makes them."),
    Vmcall(VMCALL_FILE_CREATE, "file_create", ("gpa", "pages", "private"), "slot number >= 1",
           ("EEXIST", "ENOMEM"),
           "As memfd_create, with a fresh temporary file of zeros, mapped MAP_SHARED, or MAP_PRIVATE if "
           "`private` is 1; -EINVAL for other values."),
    Vmcall(VMCALL_FSYNC, "fsync", ("gpa",), "0", ("EBADF",),
           "fsync(2) of the file that the VMM maps at `gpa`: its dirty pages are made clean and read- "
           "only wherever they are mapped shared, then written. -EBADF where no file is mapped."),
    Vmcall(VMCALL_PUNCH_HOLE, "punch_hole", ("gpa", "pages"), "0", ("EBADF",),
           "fallocate(2) with FALLOC_FL_PUNCH_HOLE of the file's pages behind the range: they read as "
           "zeros afterwards, but for pages that a private mapping has written."),
    Vmcall(VMCALL_REMOVE, "remove", ("gpa", "pages"), "0", ("EACCES",),
           "madvise(MADV_REMOVE) of the VMM's mapping: as punch_hole. -EINVAL where no file is mapped, "
           "-EACCES where it is mapped private."),
    Vmcall(VMCALL_TRUNCATE, "truncate", ("gpa",), "0", ("EBADF",),
           "ftruncate(2) of the file behind `gpa` to end at `gpa`, and at once to its old size again: "
           "memory from `gpa` to the end of the file reads as zeros, also what a private mapping had "
           "written. An access by another CPU in between leaves KVM_RUN with -EFAULT."),
    Vmcall(VMCALL_FILE_WRITE, "file_write", ("gpa", "value", "size"), "0", ("EBADF",),
           "pwrite(2) of the low `size` bytes (1, 2 or 4) of `value` into the file where it is mapped at "
           "`gpa`: seen by shared mappings, and by private ones that did not write the page yet."),
    Vmcall(VMCALL_PEER_WRITE, "peer_write", ("gpa", "value", "size"), "0", ("EBADF", "ENOMEM"),
           "Another process maps the file behind `gpa` MAP_SHARED, stores the low `size` bytes (1, 2 or "
           "4) of `value` there, and ends."),
    Vmcall(VMCALL_FADVISE_DONTNEED, "fadvise_dontneed", ("gpa", "pages"), "0", ("EBADF",),
           "posix_fadvise(POSIX_FADV_DONTNEED) of the file's range: starts writing what is dirty and "
           "drops what is clean and mapped by nobody. Shared memory has nothing to drop."),
)


def vmcall_by_name(name: str) -> Vmcall:
    """The vmcall called `name`. Raises KeyError."""
    for call in VMCALLS:
        if call.name == name:
            return call
    raise KeyError(name)


def vmcall_by_number(nr: int) -> Vmcall | None:
    """The vmcall with number `nr`, or None: the answer to that is -ENOSYS."""
    for call in VMCALLS:
        if call.nr == nr:
            return call
    return None


def cpuid_signature_leaf() -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of leaf CPUID_SIGNATURE_LEAF on a machine that serves these vmcalls."""
    return (CPUID_KERNEL_LEAF, CPUID_SIGNATURE_EBX, CPUID_SIGNATURE_ECX, CPUID_SIGNATURE_EDX)


def cpuid_kernel_leaf(version_code: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of leaf CPUID_KERNEL_LEAF on a host whose kernel is `version_code`."""
    return (version_code, 0, 0, 0)

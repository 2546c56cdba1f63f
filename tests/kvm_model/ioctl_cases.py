"""KVM's ioctls with bad arguments, one table for the model and for a real /dev/kvm.

A case is a list of calls on a new VM: all but the last succeed, the last answers `errno` (0: it succeeds).
`Machine` is what the calls are made on; tests/kvm_model/test_ioctls.py and tests/live/test_ioctls.py each
have one.

Source of truth: virt/kvm/kvm_main.c (Linux 6.18), in its order of checks: kvm_set_memory_region,
kvm_get_dirty_log_protect, kvm_clear_dirty_log_protect, kvm_vm_ioctl_enable_cap_generic,
kvm_vm_ioctl_enable_dirty_log_ring, kvm_vm_ioctl_reset_dirty_pages, kvm_vm_ioctl_create_vcpu,
kvm_vm_ioctl_set_mem_attributes, kvm_vcpu_pre_fault_memory;
virt/kvm/guest_memfd.c: kvm_gmem_create, kvm_gmem_bind.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import E2BIG, EBADF, EEXIST, EFAULT, EINVAL, ENOENT, ENOTTY, ENXIO
from typing import NamedTuple, Protocol

__all__ = ["ARENA", "ATTRIBUTES", "CASES", "TDP_ONLY", "Case", "Machine"]

PAGE = 4096
ARENA = 256 * PAGE
"""Bytes of user memory from `Machine.hva` on."""
LOG, READONLY, GMEM = 1, 2, 4
MANUAL, RING = 168, 192
MANUAL_ENABLE, INITIALLY_SET = 1, 2
U64 = (1 << 64) - 1
GMEM_MMAP, GMEM_INIT_SHARED = 1, 2
ATTRIBUTE_PRIVATE = 8
RESERVED_RING_ENTRIES = 64
RING_ENTRY = 16


class Machine(Protocol):
    """One VM without slots and vCPUs. A refusal is an OSError or the model's KernelError."""

    hva: int
    max_vcpu_ids: int
    user_mem_slots: int
    address_spaces: int

    def region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION."""

    def get_log(self, slot: int) -> None:
        """KVM_GET_DIRTY_LOG into memory enough for every slot of these tests."""

    def clear_log(self, slot: int, first: int, count: int, mask: int | None = 0) -> None:
        """KVM_CLEAR_DIRTY_LOG with all bits of `mask`, or of memory that does not exist."""

    def enable_cap(self, cap: int, value: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP."""

    def reset_rings(self) -> None:
        """KVM_RESET_DIRTY_RINGS."""

    def create_vcpu(self, vcpu_id: int) -> None:
        """KVM_CREATE_VCPU."""

    def create_gmem(self, size: int, flags: int = 0) -> None:
        """KVM_CREATE_GUEST_MEMFD; `region2` shows the last one made."""

    def region2(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = GMEM, offset: int = 0, *,
        bad_file: bool = False,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 of that file, or of no open file."""

    def pre_fault(self, gpa: int, size: int, flags: int = 0) -> None:
        """KVM_PRE_FAULT_MEMORY of the last vCPU."""

    def attributes(self, gpa: int, size: int, attributes: int = 0, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""


Call = Callable[[Machine], None]


class Case(NamedTuple):
    """`profiles`: where it holds, if not everywhere."""

    name: str
    calls: tuple[Call, ...]
    errno: int
    profiles: tuple[str, ...] = ("linux-6.18", "linux-5.10")


def region(slot: int, gpa: int = 0, pages: int = 16, at: int = 0, flags: int = 0) -> Call:
    """Slot of `pages` at `gpa`, backed from page `at` of the arena on."""
    return lambda m: m.region(slot, gpa, pages * PAGE, m.hva + at * PAGE, flags)


def ring(size: int) -> Call:
    return lambda m: m.enable_cap(RING, size)


def vcpu(number: int = 0) -> Call:
    return lambda m: m.create_vcpu(number)


SLOT = region(0)
LOGGED = region(0, flags=LOG)
NEW = ("linux-6.18",)

REGIONS = (
    Case("a slot", (SLOT,), 0),
    Case("the same again changes nothing", (SLOT, SLOT), 0),
    Case("an unknown flag", (region(0, flags=1 << 3),), EINVAL),
    Case("guest_memfd by the old ioctl", (region(0, flags=1 << 2),), EINVAL),
    Case("half a page", (lambda m: m.region(0, 0, PAGE // 2, m.hva),), EINVAL),
    Case("a guest address within a page", (lambda m: m.region(0, 8, PAGE, m.hva),), EINVAL),
    Case("a host address within a page", (lambda m: m.region(0, 0, PAGE, m.hva + 8),), EINVAL),
    Case("a host address of the kernel", (lambda m: m.region(0, 0, PAGE, U64 - PAGE + 1),), EINVAL),
    Case("a host address that is none", (lambda m: m.region(0, 0, PAGE, 1 << 60),), EINVAL),
    Case("host memory that nobody mapped", (lambda m: m.region(0, 0, PAGE, 0x10000),), 0),
    Case("an end behind the last guest address", (
        lambda m: m.region(0, U64 - PAGE + 1, 2 * PAGE, m.hva),
    ), EINVAL),
    Case("beyond what the CPU can address", (lambda m: m.region(0, 1 << 62, PAGE, m.hva),), EINVAL),
    Case("the last user slot", (lambda m: m.region(m.user_mem_slots - 1, 0, PAGE, m.hva),), 0),
    Case("a slot of KVM's own", (lambda m: m.region(m.user_mem_slots, 0, PAGE, m.hva),), EINVAL),
    Case("no such address space", (lambda m: m.region(m.address_spaces << 16, 0, PAGE, m.hva),), EINVAL),
    Case("more pages than a bitmap counts", (lambda m: m.region(0, 0, 1 << 43, 0),), EINVAL),
    Case("deleting what is not there", (region(0, pages=0),), EINVAL),
    Case("deleting", (SLOT, region(0, pages=0)), 0),
    Case("deleting twice", (SLOT, region(0, pages=0), region(0, pages=0)), EINVAL),
    Case("deleting with a bad host address", (SLOT, lambda m: m.region(0, 0, 0, m.hva + 8)), EINVAL),
    Case("deleting with a bad flag", (SLOT, region(0, pages=0, flags=1 << 3)), EINVAL),
    Case("another size", (SLOT, region(0, pages=8)), EINVAL),
    Case("another host address", (SLOT, region(0, at=1)), EINVAL),
    Case("read-only afterwards", (SLOT, region(0, flags=READONLY)), EINVAL),
    Case("writable afterwards", (region(0, flags=READONLY), SLOT), EINVAL),
    Case("logged afterwards", (SLOT, LOGGED), 0),
    Case("moved", (SLOT, region(0, gpa=64 * PAGE)), 0),
    Case("moved and logged at once", (SLOT, region(0, gpa=64 * PAGE, flags=LOG)), 0),
    Case("over another's first page", (SLOT, region(1, gpa=15 * PAGE, at=16)), EEXIST),
    Case("over another's last page", (region(0, gpa=15 * PAGE), region(1, pages=16, at=16)), EEXIST),
    Case("around another", (region(0, gpa=4 * PAGE, pages=1), region(1, pages=16, at=16)), EEXIST),
    Case("beside another", (SLOT, region(1, gpa=16 * PAGE, at=16)), 0),
    Case("moved onto another", (
        SLOT, region(1, gpa=16 * PAGE, at=16), region(1, gpa=8 * PAGE, at=16),
    ), EEXIST),
    Case("moved onto itself", (SLOT, region(0, gpa=8 * PAGE)), 0),
    Case("two of the same host memory", (SLOT, region(1, gpa=64 * PAGE)), 0),
    Case("moved out of reach leaves the slot", (
        SLOT, lambda m: refused(m, region(0, gpa=1 << 62)), region(1, gpa=0, at=32),
    ), EEXIST),
)


def refused(m: Machine, call: Call) -> None:
    """`call` is refused in passing."""
    try:
        call(m)
    except OSError:
        return
    except Exception as exc:
        if hasattr(exc, "errno"):
            return
        raise
    raise AssertionError("it was served")


LOGS = (
    Case("a log", (LOGGED, lambda m: m.get_log(0)), 0),
    Case("no slot", (lambda m: m.get_log(0),), ENOENT),
    Case("a slot without a log", (SLOT, lambda m: m.get_log(0)), ENOENT),
    Case("a slot whose log was turned off", (LOGGED, SLOT, lambda m: m.get_log(0)), ENOENT),
    Case("a slot of KVM's own has no log", (lambda m: m.get_log(m.user_mem_slots),), EINVAL),
    Case("no such address space has a log", (lambda m: m.get_log(m.address_spaces << 16),), EINVAL),
    Case("no log beside rings", (ring(PAGE), LOGGED, lambda m: m.get_log(0)), ENXIO, NEW),
    Case("rings are asked about first", (ring(PAGE), lambda m: m.get_log(m.user_mem_slots)), ENXIO, NEW),
)

LOGGED_100 = region(0, pages=100, flags=LOG)
CLEARS = (
    Case("clearing all", (LOGGED_100, lambda m: m.clear_log(0, 0, 100)), 0),
    Case("clearing whole words", (LOGGED_100, lambda m: m.clear_log(0, 0, 64)), 0),
    Case("clearing the rest", (LOGGED_100, lambda m: m.clear_log(0, 64, 36)), 0),
    Case("clearing nothing", (LOGGED_100, lambda m: m.clear_log(0, 0, 0)), 0),
    Case("clearing nothing at the end", (region(0, pages=64, flags=LOG), lambda m: m.clear_log(0, 64, 0)), 0),
    Case("from the middle of a word", (LOGGED_100, lambda m: m.clear_log(0, 1, 64)), EINVAL),
    Case("to the middle of a word", (LOGGED_100, lambda m: m.clear_log(0, 0, 63)), EINVAL),
    Case("beyond the end", (LOGGED_100, lambda m: m.clear_log(0, 0, 128)), EINVAL),
    Case("from beyond the end", (LOGGED_100, lambda m: m.clear_log(0, 128, 0)), EINVAL),
    Case("the word is asked about before the slot", (lambda m: m.clear_log(0, 1, 64),), EINVAL),
    Case("no slot to clear", (lambda m: m.clear_log(0, 0, 64),), ENOENT),
    Case("no log to clear", (SLOT, lambda m: m.clear_log(0, 0, 16)), ENOENT),
    Case("clearing a slot of KVM's own", (lambda m: m.clear_log(m.user_mem_slots, 0, 64),), EINVAL),
    Case("clearing beside rings", (ring(PAGE), LOGGED, lambda m: m.clear_log(0, 1, 64)), ENXIO, NEW),
    Case("a bitmap that is not there", (LOGGED_100, lambda m: m.clear_log(0, 0, 100, None)), EFAULT),
)

CAPS = (
    Case("manual protection", (lambda m: m.enable_cap(MANUAL, MANUAL_ENABLE),), 0),
    Case("logs that start full", (lambda m: m.enable_cap(MANUAL, MANUAL_ENABLE | INITIALLY_SET),), 0),
    Case("full logs without manual protection", (lambda m: m.enable_cap(MANUAL, INITIALLY_SET),), EINVAL),
    Case("an unknown option", (lambda m: m.enable_cap(MANUAL, MANUAL_ENABLE | 4),), EINVAL),
    Case("manual protection with a flag", (lambda m: m.enable_cap(MANUAL, MANUAL_ENABLE, 1),), EINVAL),
    Case("manual protection off again", (
        lambda m: m.enable_cap(MANUAL, MANUAL_ENABLE), lambda m: m.enable_cap(MANUAL, 0),
    ), 0),
    Case("an unknown capability", (lambda m: m.enable_cap(0xFFFF, 1),), EINVAL),
    Case("rings", (ring(PAGE),), 0, NEW),
    Case("rings with the other name", (lambda m: m.enable_cap(223, PAGE),), 0, NEW),
    Case("no rings before 5.11", (ring(PAGE),), EINVAL, ("linux-5.10",)),
    Case("rings of nothing", (ring(0),), EINVAL),
    Case("a size that is no power of two", (ring(3 * PAGE),), EINVAL),
    Case("rings with reserved entries only", (ring(RESERVED_RING_ENTRIES * RING_ENTRY // 2),), EINVAL),
    Case("rings smaller than a page", (ring(PAGE // 2),), EINVAL),
    Case("the largest rings", (ring(65536 * RING_ENTRY),), 0, NEW),
    Case("rings too large", (ring(2 * 65536 * RING_ENTRY),), E2BIG, NEW),
    Case("a size cut to 32 bits", (ring(1 << 40 | PAGE),), 0, NEW),
    Case("a size of which 32 bits are nothing", (ring(1 << 40),), EINVAL),
    Case("rings twice", (ring(PAGE), ring(PAGE)), EINVAL, NEW),
    Case("rings after a vCPU", (vcpu(), ring(PAGE)), EINVAL, NEW),
    Case("too large is asked before twice", (ring(PAGE), ring(2 * 65536 * RING_ENTRY)), E2BIG, NEW),
    Case("resetting no rings", (lambda m: m.reset_rings(),), EINVAL),
    Case("resetting rings without a vCPU", (ring(PAGE), lambda m: m.reset_rings()), 0, NEW),
    Case("resetting empty rings", (ring(PAGE), vcpu(), lambda m: m.reset_rings()), 0, NEW),
)

VCPUS = (
    Case("a vCPU", (vcpu(0),), 0),
    Case("numbers in any order", (vcpu(3), vcpu(0)), 0),
    Case("a vCPU twice", (vcpu(1), vcpu(1)), EEXIST),
    Case("the highest number", (lambda m: m.create_vcpu(m.max_vcpu_ids - 1),), 0),
    Case("too high a number", (lambda m: m.create_vcpu(m.max_vcpu_ids),), EINVAL),
    Case("a negative number", (lambda m: m.create_vcpu(U64),), EINVAL),
)



def gmem(size: int = 16 * PAGE, flags: int = GMEM_MMAP) -> Call:
    return lambda m: m.create_gmem(size, flags)


def shown(slot: int, gpa: int = 0, pages: int = 16, flags: int = GMEM, offset: int = 0, at: int = 0) -> Call:
    """Slot of `pages` of the last guest_memfd from byte `offset` on."""
    return lambda m: m.region2(slot, gpa, pages * PAGE, m.hva + at * PAGE, flags, offset)


GMEMS = (
    Case("a guest_memfd", (gmem(),), 0, NEW),
    Case("a guest_memfd that begins shared", (gmem(flags=GMEM_MMAP | GMEM_INIT_SHARED),), 0, NEW),
    Case("no guest_memfd before 6.8", (gmem(),), ENOTTY, ("linux-5.10",)),
    Case("a guest_memfd with an unknown flag", (gmem(flags=4),), EINVAL, NEW),
    Case("a guest_memfd of nothing", (gmem(0),), EINVAL, NEW),
    Case("a guest_memfd of half a page", (gmem(PAGE // 2),), EINVAL, NEW),
    Case("a guest_memfd of negative size", (gmem(1 << 63),), EINVAL, NEW),
    Case("a slot of it", (gmem(), shown(0)), 0, NEW),
    Case("a slot without it by the new ioctl", (lambda m: m.region2(0, 0, PAGE, m.hva, 0),), 0, NEW),
    Case("no new ioctl before 6.8", (lambda m: m.region2(0, 0, PAGE, m.hva),), ENOTTY, ("linux-5.10",)),
    Case("a slot of no open file", (lambda m: m.region2(0, 0, PAGE, m.hva, bad_file=True),), EBADF, NEW),
    Case("it cannot be logged", (gmem(), shown(0, flags=GMEM | LOG)), EINVAL, NEW),
    Case("nor read-only", (gmem(), shown(0, flags=GMEM | READONLY)), EINVAL, NEW),
    Case("an offset within a page", (gmem(), shown(0, pages=1, offset=8)), EINVAL, NEW),
    Case("an offset that wraps", (gmem(), shown(0, offset=U64 - PAGE + 1)), EINVAL, NEW),
    Case("a slot beyond its end", (gmem(), shown(0, pages=17)), EINVAL, NEW),
    Case("an offset beyond its end", (gmem(), shown(0, pages=8, offset=9 * PAGE)), EINVAL, NEW),
    Case("the same pages in two slots", (
        gmem(), shown(0, pages=8), shown(1, gpa=64 * PAGE, pages=8, offset=7 * PAGE),
    ), EINVAL, NEW),
    Case("halves of it in two slots", (
        gmem(), shown(0, pages=8), shown(1, gpa=64 * PAGE, pages=8, offset=8 * PAGE),
    ), 0, NEW),
    Case("a slot of it cannot move", (gmem(), shown(0), shown(0, gpa=64 * PAGE)), EINVAL, NEW),
    Case("nor be set again", (gmem(), shown(0), shown(0)), EINVAL, NEW),
    Case("but be deleted", (gmem(), shown(0), region(0, pages=0)), 0, NEW),
    Case("and its pages shown again", (gmem(), shown(0), region(0, pages=0), shown(1)), 0, NEW),
    Case("over another slot before the file is looked at", (
        SLOT, lambda m: m.region2(1, 0, PAGE, m.hva, bad_file=True),
    ), EEXIST, NEW),
)

ATTRIBUTES = (
    Case("no attributes before 6.8", (lambda m: m.attributes(0, PAGE),), ENOTTY, ("linux-5.10",)),
    Case("attributes with a flag", (lambda m: m.attributes(0, PAGE, 0, 1),), EINVAL, NEW),
    Case("an unknown attribute", (lambda m: m.attributes(0, PAGE, 1),), EINVAL, NEW),
    Case("private memory of a VM that has none", (
        lambda m: m.attributes(0, PAGE, ATTRIBUTE_PRIVATE),
    ), EINVAL, NEW),
    Case("attributes of nothing", (lambda m: m.attributes(0, 0),), EINVAL, NEW),
    Case("attributes that wrap", (lambda m: m.attributes(U64 - PAGE + 1, 2 * PAGE),), EINVAL, NEW),
    Case("attributes of half a page", (lambda m: m.attributes(0, PAGE // 2),), EINVAL, NEW),
    Case("attributes from within a page", (lambda m: m.attributes(8, PAGE),), EINVAL, NEW),
)



def pre_fault(gpa: int, size: int, flags: int = 0) -> tuple[Call, ...]:
    return (SLOT, vcpu(), lambda m: m.pre_fault(gpa, size, flags))


PRE_FAULTS = (
    Case("mapping nothing ahead", pre_fault(0, 0), EINVAL),
    Case("mapping half a page ahead", pre_fault(0, PAGE // 2), EINVAL),
    Case("mapping ahead from within a page", pre_fault(8, PAGE), EINVAL),
    Case("mapping ahead what wraps", pre_fault(U64 - PAGE + 1, 2 * PAGE), EINVAL),
    Case("mapping ahead with a flag", pre_fault(0, PAGE, 1), EINVAL),
    Case("mapping ahead before 6.11", pre_fault(0, PAGE), EINVAL, ("linux-5.10",)),
)
TDP_ONLY = (
    Case("mapping ahead", pre_fault(0, PAGE), 0, NEW),
    Case("mapping ahead beyond the memory", pre_fault(15 * PAGE, 2 * PAGE), 0, NEW),
    Case("mapping ahead where no memory is", pre_fault(16 * PAGE, PAGE), ENOENT, NEW),
)
"""Where the guest's addresses are translated by hardware; elsewhere EOPNOTSUPP."""

CASES = (*REGIONS, *LOGS, *CLEARS, *CAPS, *VCPUS, *GMEMS, *ATTRIBUTES, *PRE_FAULTS, *TDP_ONLY)

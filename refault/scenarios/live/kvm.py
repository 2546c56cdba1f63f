"""KVM's ioctls, as far as scenarios need them. Refusals are OSError.

Source of truth: include/uapi/linux/kvm.h, Documentation/virt/kvm/api.rst; Linux 6.18, x86.
"""

from __future__ import annotations

import mmap
import os
import struct
from ctypes import addressof, c_char

from refault.scenarios.guest import CR4
from refault.scenarios.live.libc import ioctl

__all__ = [
    "EXIT_IO", "EXIT_MMIO", "EXIT_NAMES", "KVM_CAP_DIRTY_LOG_RING", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    "KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY", "Vcpu", "Vm",
]

KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VCPU = 0xAE41
KVM_GET_DIRTY_LOG = 0x4010AE42
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_GET_REGS, KVM_SET_REGS = 0x8090AE81, 0x4090AE82
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90
KVM_ENABLE_CAP = 0x4068AEA3
KVM_CLEAR_DIRTY_LOG = 0xC018AEC0
KVM_RESET_DIRTY_RINGS = 0xAEC7
KVM_GET_STATS_FD = 0xAECE

KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEM_GUEST_MEMFD = 1, 2, 4
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_DIRTY_LOG_RING = 168, 192
_DIRTY_LOG_PAGE_OFFSET = 64
_DIRTY_GFN = struct.Struct("<IIQ")

EXIT_IO, EXIT_MMIO = 2, 6
EXIT_NAMES = {
    0: "UNKNOWN", 2: "IO", 5: "HLT", 6: "MMIO", 8: "SHUTDOWN", 9: "FAIL_ENTRY", 10: "INTR",
    17: "INTERNAL_ERROR", 31: "DIRTY_RING_FULL", 39: "MEMORY_FAULT",
}

_REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "rip", "rflags",
)
_REGS = struct.Struct("<18Q")
_SREGS_SIZE = 0x138
_TABLES = 8 * 24
"""struct kvm_sregs: eight segments of 24 bytes, then gdt and idt of 16 each, then CR0 and what follows."""
_CONTROL = struct.Struct("<7Q")
"""cr0, cr2, cr3, cr4, cr8, efer, apic_base."""
_LONG_MODE = {"cr0": 0x80050033, "cr4": CR4, "efer": 0x500}


def _statistics(fd: int) -> dict[str, int]:
    """What KVM_GET_STATS_FD's file says, by the kernel's names."""
    stats = ioctl(fd, KVM_GET_STATS_FD, 0)
    try:
        _, name_size, count, _, descriptors, data = struct.unpack("<6I", os.pread(stats, 24, 0))
        found: dict[str, int] = {}
        for index in range(count):
            raw = os.pread(stats, 16 + name_size, descriptors + index * (16 + name_size))
            _, _, size, offset, _ = struct.unpack("<IhHII", raw[:16])
            name = raw[16:].split(b"\0")[0].decode()
            found[name] = sum(struct.unpack(f"<{size}Q", os.pread(stats, 8 * size, data + offset)))
        return found
    finally:
        os.close(stats)


def _segment(selector: int, kind: int, *, dpl: int, long: bool) -> bytes:
    return struct.pack("<QIH10B", 0, 0xFFFFFFFF, selector | dpl, kind, 1, dpl, not long, 1, long, 1, 0, 0, 0)


class Vm:
    """One VM. Memory slots keep no reference here: the caller owns the memory."""

    def __init__(self) -> None:
        self._kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.fd = ioctl(self._kvm, KVM_CREATE_VM, 0)
        ioctl(self.fd, KVM_SET_TSS_ADDR, 0xFFFBD000)
        self.vcpus: list[Vcpu] = []
        self.ring_size = 0

    def set_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        ioctl(
            self.fd, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", slot, flags, gpa, size, hva)
        )

    def create_guest_memfd(self, size: int, flags: int) -> int:
        """KVM_CREATE_GUEST_MEMFD; the descriptor."""
        return ioctl(self.fd, KVM_CREATE_GUEST_MEMFD, struct.pack("<8Q", size, flags, *[0] * 6))

    def set_slot2(self, slot: int, gpa: int, size: int, hva: int, guest_memfd: int, offset: int) -> None:
        """KVM_SET_USER_MEMORY_REGION2 with a guest_memfd."""
        ioctl(self.fd, KVM_SET_USER_MEMORY_REGION2, struct.pack(
            "<IIQQQQII14Q", slot, KVM_MEM_GUEST_MEMFD, gpa, size, hva, offset, guest_memfd, 0, *[0] * 14
        ))

    def get_dirty_log(self, slot: int, pages: int) -> list[int]:
        """KVM_GET_DIRTY_LOG: the dirty pages' numbers."""
        bitmap = bytearray((pages + 63) // 64 * 8)
        pointer = addressof(c_char.from_buffer(bitmap))
        ioctl(self.fd, KVM_GET_DIRTY_LOG, struct.pack("<IIQ", slot, 0, pointer))
        bits = int.from_bytes(bitmap, "little")
        return [page for page in range(pages) if bits >> page & 1]

    def clear_dirty_log(self, slot: int, first: int, count: int, mask: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG of `count` pages from `first`."""
        bitmap = bytearray(mask)
        pointer = addressof(c_char.from_buffer(bitmap))
        ioctl(self.fd, KVM_CLEAR_DIRTY_LOG, struct.pack("<IIQQ", slot, count, first, pointer))

    def enable_cap(self, cap: int, value: int) -> None:
        """KVM_ENABLE_CAP; rings of `value` bytes must come before the first vCPU."""
        ioctl(self.fd, KVM_ENABLE_CAP, struct.pack("<II4Q64s", cap, 0, value, 0, 0, 0, b""))
        if cap == KVM_CAP_DIRTY_LOG_RING:
            self.ring_size = value

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS."""
        return ioctl(self.fd, KVM_RESET_DIRTY_RINGS, 0)

    def create_vcpu(self) -> Vcpu:
        """The next vCPU, with all of CPUID that KVM supports."""
        vcpu = Vcpu(self.fd, self._kvm, len(self.vcpus), self.ring_size)
        self.vcpus.append(vcpu)
        return vcpu

    def stats(self) -> dict[str, int]:
        """The VM's statistics and its vCPUs', added up."""
        total = _statistics(self.fd)
        for vcpu in self.vcpus:
            for name, value in _statistics(vcpu.fd).items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """Destroy the VM."""
        for vcpu in self.vcpus:
            vcpu.close()
        os.close(self.fd)
        os.close(self._kvm)


class Vcpu:
    """One vCPU in long mode."""

    def __init__(self, vm_fd: int, kvm_fd: int, number: int, ring_size: int = 0) -> None:
        self.fd = ioctl(vm_fd, KVM_CREATE_VCPU, number)
        self._run = mmap.mmap(self.fd, ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0))
        offset = _DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
        self._ring = mmap.mmap(self.fd, ring_size, offset=offset) if ring_size else None
        cpuid = bytearray(8 + 40 * 256)
        struct.pack_into("<I", cpuid, 0, 256)
        ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid)
        ioctl(self.fd, KVM_SET_CPUID2, cpuid)

    def start_in_long_mode(self, cr3: int, *, dpl: int = 3) -> None:
        """64-bit mode at CPL `dpl` with flat segments and the tables at `cr3`."""
        sregs = bytearray(_SREGS_SIZE)
        ioctl(self.fd, KVM_GET_SREGS, sregs)
        code, data = _segment(8, 11, dpl=dpl, long=True), _segment(16, 3, dpl=dpl, long=False)
        for index, segment in enumerate([code, *[data] * 5]):
            sregs[index * 24 : index * 24 + 24] = segment
        at = _TABLES + 32
        *_, apic_base = _CONTROL.unpack_from(sregs, at)
        mode = _LONG_MODE
        _CONTROL.pack_into(sregs, at, mode["cr0"], 0, cr3, mode["cr4"], 0, mode["efer"], apic_base)
        ioctl(self.fd, KVM_SET_SREGS, sregs)

    def set_regs(self, **values: int) -> None:
        """Every general register, rip and rflags; those not given are 0."""
        ioctl(self.fd, KVM_SET_REGS, _REGS.pack(*(values.get(name, 0) for name in _REGISTERS)))

    def get_regs(self) -> dict[str, int]:
        """The general registers, rip and rflags."""
        raw = bytearray(_REGS.size)
        ioctl(self.fd, KVM_GET_REGS, raw)
        return dict(zip(_REGISTERS, _REGS.unpack(raw), strict=True))

    def run(self) -> int:
        """KVM_RUN; the exit reason."""
        ioctl(self.fd, KVM_RUN, 0)
        reason: int = struct.unpack_from("<I", self._run, 8)[0]
        return reason

    def io_exit(self) -> tuple[bool, int, int]:
        """(out, port, size) of an IO exit."""
        direction, size, port = struct.unpack_from("<BBH", self._run, 32)
        return bool(direction), port, size

    def mmio_exit(self) -> tuple[bool, int, int, bytes]:
        """(write, gpa, length, data) of an MMIO exit."""
        gpa, data, length, write = struct.unpack_from("<Q8sI?", self._run, 32)
        return write, gpa, length, data[:length]

    def answer_mmio(self, value: int) -> None:
        """What the load of an MMIO exit gets."""
        self._run[40:48] = struct.pack("<Q", value)

    def dirty_gfn(self, index: int) -> tuple[int, int, int]:
        """(flags, slot, offset) of an entry of the dirty ring."""
        assert self._ring is not None
        flags, slot, offset = _DIRTY_GFN.unpack_from(self._ring, index * _DIRTY_GFN.size)
        return flags, slot, offset

    def set_dirty_gfn_flags(self, index: int, flags: int) -> None:
        """Store an entry's flags."""
        assert self._ring is not None
        struct.pack_into("<I", self._ring, index * _DIRTY_GFN.size, flags)

    def close(self) -> None:
        """Give the descriptor and the mappings back."""
        if self._ring is not None:
            self._ring.close()
        self._run.close()
        os.close(self.fd)

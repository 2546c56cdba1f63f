"""This machine's KVM answers bad arguments with the errnos of the model. `make live`, as root."""

from __future__ import annotations

import os
import struct
from ctypes import addressof, c_char
from errno import ENOTTY, EOPNOTSUPP, errorcode
from pathlib import Path

import pytest

from refault.scenarios.live import kvm as uapi
from refault.scenarios.live.libc import ioctl
from tests.kvm_model.ioctl_cases import ARENA, ATTRIBUTES, CASES, TDP_ONLY, Case

LIVE = "REFAULT_LIVE" in os.environ and os.access("/dev/kvm", os.R_OK | os.W_OK)
pytestmark = pytest.mark.skipif(not LIVE, reason="asked for by make live only, and needs /dev/kvm")

KVM_CHECK_EXTENSION = 0xAE03
KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
KVM_SET_MEMORY_ATTRIBUTES = 0x4020AED2
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
KVM_PRE_FAULT_MEMORY = 0xC040AED5
NO_FILE = 0xFFFFFFFF
CAP_NR_MEMSLOTS, CAP_MULTI_ADDRESS_SPACE, CAP_MAX_VCPU_ID = 10, 118, 128
BITMAP_BYTES = 1 << 16


class RealKvm:
    """ioctl_cases.Machine on /dev/kvm."""

    def __init__(self, hva: int) -> None:
        self.hva = hva
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.fds = [kvm]
        self.fd = ioctl(kvm, uapi.KVM_CREATE_VM, 0)
        self.fds.append(self.fd)
        self.max_vcpu_ids = self.ask(CAP_MAX_VCPU_ID)
        self.user_mem_slots = self.ask(CAP_NR_MEMSLOTS)
        self.gmem = NO_FILE
        self.address_spaces = self.ask(CAP_MULTI_ADDRESS_SPACE) or 1

    def ask(self, cap: int) -> int:
        return ioctl(self.fd, KVM_CHECK_EXTENSION, cap)

    def region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        ioctl(self.fd, uapi.KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", slot, flags, gpa, size, hva))

    def get_log(self, slot: int) -> None:
        bitmap = bytearray(BITMAP_BYTES)
        pointer = addressof(c_char.from_buffer(bitmap))
        ioctl(self.fd, uapi.KVM_GET_DIRTY_LOG, struct.pack("<IIQ", slot, 0, pointer))

    def clear_log(self, slot: int, first: int, count: int, mask: int | None = 0) -> None:
        bitmap = bytearray((mask or 0).to_bytes(BITMAP_BYTES, "little"))
        pointer = addressof(c_char.from_buffer(bitmap)) if mask is not None else 0x10
        ioctl(self.fd, uapi.KVM_CLEAR_DIRTY_LOG, struct.pack("<IIQQ", slot, count, first, pointer))

    def enable_cap(self, cap: int, value: int, flags: int = 0) -> None:
        ioctl(self.fd, uapi.KVM_ENABLE_CAP, struct.pack("<II4Q64s", cap, flags, value, 0, 0, 0, b""))

    def reset_rings(self) -> None:
        ioctl(self.fd, uapi.KVM_RESET_DIRTY_RINGS, 0)

    def create_vcpu(self, vcpu_id: int) -> None:
        self.fds.append(ioctl(self.fd, uapi.KVM_CREATE_VCPU, vcpu_id))

    def create_gmem(self, size: int, flags: int = 0) -> None:
        args = struct.pack("<3Q40x", size, flags, 0)
        self.gmem = ioctl(self.fd, KVM_CREATE_GUEST_MEMFD, args)
        self.fds.append(self.gmem)

    def region2(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = 4, offset: int = 0, *,
        bad_file: bool = False,
    ) -> None:
        args = struct.pack(
            "<IIQQQQII112x", slot, flags, gpa, size, hva, offset, NO_FILE if bad_file else self.gmem, 0
        )
        ioctl(self.fd, KVM_SET_USER_MEMORY_REGION2, args)

    def pre_fault(self, gpa: int, size: int, flags: int = 0) -> None:
        ioctl(self.fds[-1], KVM_PRE_FAULT_MEMORY, struct.pack("<3Q40x", gpa, size, flags))

    def attributes(self, gpa: int, size: int, attributes: int = 0, flags: int = 0) -> None:
        ioctl(self.fd, KVM_SET_MEMORY_ATTRIBUTES, struct.pack("<4Q", gpa, size, attributes, flags))

    def has_attributes(self) -> bool:
        try:
            self.attributes(0, 0)
        except OSError as exc:
            return exc.errno != ENOTTY
        return True

    def shadows(self) -> bool:
        return Path("/sys/module/kvm/parameters/tdp_mmu").read_text().strip() == "N"

    def close(self) -> None:
        for fd in reversed(self.fds):
            os.close(fd)


@pytest.fixture
def real() -> object:
    from refault.scenarios.live.libc import MAP_ANONYMOUS, MAP_PRIVATE, mmap, munmap

    hva = mmap(0, ARENA, 3, MAP_PRIVATE | MAP_ANONYMOUS)
    machine = RealKvm(hva)
    yield machine
    machine.close()
    munmap(hva, ARENA)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_this_machine_answers_as_the_model(case: Case, real: RealKvm) -> None:
    if "linux-6.18" not in case.profiles:
        pytest.skip("of an older kernel")
    if case in ATTRIBUTES and not real.has_attributes():
        pytest.skip("this kernel was built without memory attributes")
    for call in case.calls[:-1]:
        call(real)
    answer = 0
    try:
        case.calls[-1](real)
    except OSError as exc:
        answer = exc.errno or 0
    if case in TDP_ONLY and real.shadows():
        assert answer == EOPNOTSUPP
        return
    assert errorcode.get(answer, "0") == errorcode.get(case.errno, "0")

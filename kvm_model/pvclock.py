"""kvmclock: a page of the guest's in which KVM keeps the time, written through a pfn cache.

Source of truth: arch/x86/kvm/x86.c (Linux 6.18): kvm_write_system_time, kvm_guest_time_update,
kvm_setup_guest_pvclock, kvm_gen_kvmclock_update, kvm_vm_ioctl_set_clock, kvm_set_guest_paused;
arch/x86/include/asm/pvclock-abi.h: struct pvclock_vcpu_time_info. In 5.10 kvm_setup_pvclock_page, by the
VMM's address.

    0 version   8 tsc_timestamp   16 system_time   24 tsc_to_system_mul   28 tsc_shift   29 flags   32

The time is system_time + ((tsc - tsc_timestamp) << tsc_shift) * tsc_to_system_mul >> 32; the version is odd
while KVM writes. The TSC ticks once a nanosecond here, so the scale is a constant. The guest gives the page's
address by an MSR; KVM writes before the next entry after that, and whenever somebody changes the clock.

Not modelled: the master clock and its stable bit, TSC catch-up, Xen's and Hyper-V's clocks, the wall clock,
the periodic update of 300 seconds.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from kvm_model.guest_access import kvm_vcpu_read_guest, kvm_vcpu_write_guest
from kvm_model.pfncache import GfnToPfnCache
from kvm_model.requests import (
    KVM_REQ_CLOCK_UPDATE,
    KVM_REQ_GLOBAL_CLOCK_UPDATE,
    kvm_make_all_cpus_request,
    kvm_make_request,
    kvm_vcpu_kick,
)
from trace_events.tracepoint import Tracepoint

if TYPE_CHECKING:
    from kvm_model.kvm_main import Kvm
    from kvm_model.vcpu import Vcpu

__all__ = [
    "MSR_KVM_SYSTEM_TIME", "MSR_KVM_SYSTEM_TIME_NEW", "PVCLOCK_GUEST_STOPPED", "TRACEPOINTS", "PvClock",
    "kvm_gen_kvmclock_update", "kvm_guest_time_update", "kvm_set_guest_paused", "kvm_vm_ioctl_set_clock",
    "kvm_write_system_time",
]

MSR_KVM_SYSTEM_TIME = 0x12
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
PVCLOCK_GUEST_STOPPED = 1 << 1

_INFO = struct.Struct("<I4xQQIbBxx")
_VERSION = struct.Struct("<I")
_FLAGS_AT = 29
_MSR_TSC = 0x10
_TSC_TO_SYSTEM_MUL = 1 << 31
_TSC_SHIFT = 1

KVM_PVCLOCK_UPDATE = Tracepoint(
    "kvm", "kvm_pvclock_update",
    (
        "vcpu_id", "version", "tsc_timestamp", "system_time", "tsc_to_system_mul", "tsc_shift", "flags",
    ),
    lambda vcpu_id, version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags:
        f"vcpu_id {vcpu_id}, pvclock {{ version {version}, tsc_timestamp {tsc_timestamp:#x}, "
        f"system_time {system_time:#x}, tsc_to_system_mul {tsc_to_system_mul:#x}, tsc_shift {tsc_shift}, "
        f"flags {flags:#x} }}",
)
TRACEPOINTS = (KVM_PVCLOCK_UPDATE,)


class PvClock:
    """A vCPU's part: what it wrote to the MSR, the cache of the page, a pause to be told."""

    def __init__(self, kvm: Kvm) -> None:
        self.msr = 0
        self.cache = GfnToPfnCache(kvm)
        self.stopped = False


def kvm_write_system_time(vcpu: Vcpu, value: int) -> None:
    """The guest says where its time page is; bit 0 turns it on."""
    clock = vcpu.pv_time
    clock.msr = value
    kvm_make_request(KVM_REQ_GLOBAL_CLOCK_UPDATE, vcpu)
    if not vcpu.kvm.profile.pfn_caches:
        return
    if value & 1:
        clock.cache.activate(value & ~1, _INFO.size)
    else:
        clock.cache.deactivate()


def kvm_gen_kvmclock_update(vcpu: Vcpu) -> None:
    """KVM_REQ_GLOBAL_CLOCK_UPDATE: every vCPU's page is to be written."""
    for each in vcpu.kvm.vcpus:
        kvm_make_request(KVM_REQ_CLOCK_UPDATE, each)
        if each is not vcpu:
            kvm_vcpu_kick(each)


def kvm_guest_time_update(vcpu: Vcpu) -> None:
    """KVM_REQ_CLOCK_UPDATE: write the page, if the guest has one."""
    kvm = vcpu.kvm
    clock = vcpu.pv_time
    if not clock.msr & 1:
        return
    tsc = kvm.cpu.get_msr(vcpu, _MSR_TSC) or 0
    flags = PVCLOCK_GUEST_STOPPED if clock.stopped else 0
    clock.stopped = False
    fields = (tsc, kvm.sched.now + kvm.kvmclock_offset & (1 << 64) - 1, _TSC_TO_SYSTEM_MUL, _TSC_SHIFT, flags)
    if kvm.profile.pfn_caches:
        _kvm_setup_guest_pvclock(vcpu, clock.cache, fields)
    else:
        _kvm_setup_pvclock_page(vcpu, clock.msr & ~1, fields)


def _traced(vcpu: Vcpu, version: int, fields: tuple[int, int, int, int, int]) -> None:
    if (t := vcpu.kvm.trace.kvm_pvclock_update) is not None:
        t(vcpu.vcpu_id, version, *fields)


def _kvm_setup_guest_pvclock(
    vcpu: Vcpu, gpc: GfnToPfnCache, fields: tuple[int, int, int, int, int]
) -> None:
    gpc.lock.read_lock()
    while not gpc.check(_INFO.size):
        gpc.lock.read_unlock()
        if gpc.refresh(_INFO.size):
            return
        gpc.lock.read_lock()
    ram = vcpu.kvm.ram
    at = gpc.khva
    version = (_VERSION.unpack(ram.read(at, 4))[0] + 1 | 1) & 0xFFFFFFFF
    # A pause that the guest has not taken note of yet stays.
    fields = (*fields[:4], fields[4] | ram.read(at + _FLAGS_AT, 1)[0] & PVCLOCK_GUEST_STOPPED)
    ram.write(at, _VERSION.pack(version))
    ram.write(at, _INFO.pack(version, *fields))
    version = version + 1 & 0xFFFFFFFF
    ram.write(at, _VERSION.pack(version))
    gpc.mark_dirty_in_slot(vcpu)
    gpc.lock.read_unlock()
    _traced(vcpu, version, fields)


def _kvm_setup_pvclock_page(vcpu: Vcpu, gpa: int, fields: tuple[int, int, int, int, int]) -> None:
    """5.10's, by the VMM's mapping."""
    try:
        old = kvm_vcpu_read_guest(vcpu, gpa, _INFO.size)
        version = _VERSION.unpack(old[:4])[0]
        # Somebody else may have left it odd.
        version = (version + 1 if version & 1 else version) + 1 & 0xFFFFFFFF
        fields = (*fields[:4], fields[4] | old[_FLAGS_AT] & PVCLOCK_GUEST_STOPPED)
        kvm_vcpu_write_guest(vcpu, gpa, _VERSION.pack(version))
        kvm_vcpu_write_guest(vcpu, gpa, _INFO.pack(version, *fields))
        version = version + 1 & 0xFFFFFFFF
        kvm_vcpu_write_guest(vcpu, gpa, _VERSION.pack(version))
    except KernelError:
        return
    _traced(vcpu, version, fields)


def kvm_vm_ioctl_set_clock(kvm: Kvm, clock: int) -> None:
    """KVM_SET_CLOCK: from now on the guest's time is `clock` ns and goes on from there."""
    kvm.kvmclock_offset = clock - kvm.sched.now
    kvm_make_all_cpus_request(kvm, KVM_REQ_CLOCK_UPDATE)
    for vcpu in kvm.vcpus:
        kvm_vcpu_kick(vcpu)


def kvm_set_guest_paused(vcpu: Vcpu) -> bool:
    """KVM_KVMCLOCK_CTRL: the guest was stopped for a while; false where it has no clock."""
    if not vcpu.pv_time.msr & 1:
        return False
    vcpu.pv_time.stopped = True
    kvm_make_request(KVM_REQ_CLOCK_UPDATE, vcpu)
    return True

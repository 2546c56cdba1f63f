"""struct kvm: one VM, its creation and destruction, and the calls the board makes.

Source of truth: virt/kvm/kvm_main.c (Linux 6.18): kvm_create_vm, kvm_destroy_vm,
kvm_vm_ioctl_create_vcpu; arch/x86/kvm/mmu/mmu.c: kvm_mmu_init_vm, kvm_mmu_uninit_vm;
vmx/vmx.c: the eptad and pml parameters; kvm_vm_ioctl_enable_cap_generic.

The protocol parts stand in their own files: mmu_notifier.py (host events), mmu/invalidate.py (count,
sequence, retry), memory_region.py (memslots), requests.py (flushes and kicks), mmu/ (SPTEs).

Not modelled: in-kernel irqchips, file descriptors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import EEXIST, EINVAL, ENOMEM
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth, KernelError
from host_mm.kernel.locks import Mutex, RwLock, Spinlock, Srcu
from host_mm.kernel.sched import WaitQueue
from host_mm.mmu_notifier_register import mmu_notifier_register, mmu_notifier_unregister
from host_mm.page import put_page
from host_mm.page_alloc import GFP_KERNEL_ACCOUNT, GFP_ZERO, alloc_pages
from kvm_model import (
    async_pf,
    dirty_log,
    dirty_ring,
    follow_pfn,
    lapic,
    memory_region,
    mmu_notifier,
    pfncache,
    pvclock,
    requests,
    smm,
    x86,
    x86_async_pf,
    x86_cr,
    x86_emulate,
    x86_events,
    x86_msr,
)
from kvm_model.async_pf import AsyncPfQueues, kvm_clear_async_pf_completion_queue
from kvm_model.guest_memfd import KvmGmem, kvm_gmem_create
from kvm_model.mem_attributes import KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM
from kvm_model.memslots import KVM_MEM_GUEST_MEMFD, KvmMemslots
from kvm_model.mmu import (
    fast_page_fault,
    faultin_pfn,
    gfn_range,
    invalidate,
    mmio,
    mmu_roots,
    page_track,
    paging_tmpl,
    set_mem_attributes,
    shrinker,
    tdp_mmu,
    tdp_pages,
    unsync,
)
from kvm_model.mmu.killed_by import KilledBy
from kvm_model.mmu.kvm_mmu import kvm_init_mmu
from kvm_model.mmu.mmu_internal import (
    KvmMmuPage,
    tdp_root_role,
)
from kvm_model.mmu.nx_huge_pages import NxRecovery
from kvm_model.mmu.pre_fault import kvm_vcpu_pre_fault_memory
from kvm_model.mmu.rcu import Rcu
from kvm_model.mmu.set_mem_attributes import kvm_vm_ioctl_set_mem_attributes
from kvm_model.mmu.spte import (
    ept_masks,
    legacy_masks,
)
from kvm_model.mmu.tdp_zap import (
    kvm_tdp_mmu_invalidate_roots,
    kvm_tdp_mmu_zap_invalidated_roots,
)
from kvm_model.mmu.track_write import kvm_mmu_track_write
from kvm_model.pfncache import GfnToPfnCache
from kvm_model.profile import LINUX_6_18, KvmProfile
from kvm_model.truths import KvmTruths
from kvm_model.vcpu import Vcpu
from kvm_model.vmx import apic_access, pml, vmx
from kvm_model.vmx.ept import PML_ENTRIES

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm
    from host_mm.process import Process
    from kvm_model.kvm_x86_ops import KvmX86Ops

__all__ = ["KVM_CAP_DISABLE_QUIRKS2", "TRACEPOINTS", "Kvm"]

KVM_CAP_DISABLE_QUIRKS2 = 213

TRACEPOINTS = (
    *requests.TRACEPOINTS, *mmu_notifier.TRACEPOINTS, *memory_region.TRACEPOINTS,
    *follow_pfn.TRACEPOINTS, *gfn_range.TRACEPOINTS, *invalidate.TRACEPOINTS, *dirty_ring.TRACEPOINTS,
    *faultin_pfn.TRACEPOINTS, *mmu_roots.TRACEPOINTS, *page_track.TRACEPOINTS, *x86_emulate.TRACEPOINTS,
    *fast_page_fault.TRACEPOINTS, *mmio.TRACEPOINTS,
    *pfncache.TRACEPOINTS, *pvclock.TRACEPOINTS, *x86_msr.TRACEPOINTS,
    *lapic.TRACEPOINTS, *smm.TRACEPOINTS, *apic_access.TRACEPOINTS,
    *tdp_mmu.TRACEPOINTS, *tdp_pages.TRACEPOINTS, *unsync.TRACEPOINTS,
    *paging_tmpl.TRACEPOINTS, *x86.TRACEPOINTS,
    *x86_events.TRACEPOINTS, *vmx.TRACEPOINTS, *set_mem_attributes.TRACEPOINTS,
    *async_pf.TRACEPOINTS, *x86_async_pf.TRACEPOINTS,
)
"""Every tracepoint of this room, each declared beside the code that fires it."""

_VM_STATS = (
    "mmu_shadow_zapped", "mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_recycled", "mmu_cache_miss",
    "mmu_unsync", "max_mmu_rmap_size",
    "remote_tlb_flush_requests", "remote_tlb_flush", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits",
)


def _flag(params: Mapping[str, str], name: str, default: bool) -> bool:
    """A bool module parameter, spelled as the kernel accepts it; KernelError(EINVAL)."""
    value = params.get(name)
    if value is None:
        return default
    word = value.lower()
    if word in ("1", "y", "yes", "on", "true", "force"):
        return True
    if word in ("0", "n", "no", "off", "false", "never"):
        return False
    raise KernelError(EINVAL, f"parameter {name}={value!r} is not a bool")


def _frames_of(vcpu: Vcpu) -> tuple[int, ...]:
    """Frames that a vCPU has for itself, -1 for those that it has not."""
    return (*vcpu.mmu_shadow_page_cache, vcpu.vmcs, vcpu.pml_pg, vcpu.mmu.pae_root)


class _MmuSpinlock(RwLock):
    """mmu_lock as it was up to 5.11: who asks for it shared has it for himself."""

    __slots__ = ()

    def read_lock(self) -> None:
        self.lock()

    def read_unlock(self) -> None:
        self.unlock()


class Kvm:
    """struct kvm with its arch part. `memslots[as_id]` is the active set of `memslot_sets[as_id]`.

    `cpu` is the CPU under the VM, `process` the VMM whose address space backs guest memory. `sps` finds
    a table page by its pfn. `instrumented` holds SPTEs that a tool changed behind KVM's back: no truth
    is asked of them.
    """

    def __init__(
        self, host: HostMm, process: Process, cpu: KvmX86Ops, *, profile: KvmProfile = LINUX_6_18,
        params: Mapping[str, str] | None = None, breaks: frozenset[str] = frozenset(), checks: bool = False,
        tdp_enabled: bool = True, vm_type: int = KVM_X86_DEFAULT_VM,
    ) -> None:
        params = params or {}
        self.host = host
        self.process = process
        self.mm = process.mm
        self.cpu = cpu
        self.profile = profile
        self.breaks = breaks
        self.tdp_enabled = tdp_enabled
        self.sched = host.sched
        self.stream = host.stream
        self.ram = host.ram
        self.trace = host.stream.bind(TRACEPOINTS, profile.absent_events)
        self.stat: dict[str, int] = dict.fromkeys(_VM_STATS, 0)
        self._init_params(params)
        self._init_type(vm_type)
        self._init_slots()
        self._init_mmu()
        self.nx_recovery = NxRecovery(
            self, int(params.get("kvm.nx_huge_pages_recovery_ratio", "60")),
            int(params.get("kvm.nx_huge_pages_recovery_period_ms", "0")),
        )
        self.vcpus: list[Vcpu] = []
        self.gpc_list: list[GfnToPfnCache] = []
        self.kvmclock_offset = 0
        self.truths: KvmTruths | None = KvmTruths(self) if checks else None
        self.shadow_truths = self.truths.shadow if self.truths is not None else None
        self.mmu_notifier = mmu_notifier.KvmMmuNotifier(self)
        mmu_notifier_register(self.mmu_notifier, self.mm)
        self.alive = True
        if profile.mmu_shrinker:
            shrinker.register(self)
        host.frame_holders.append(self._table_frames)

    def _init_params(self, params: Mapping[str, str]) -> None:
        self.tdp_mmu_enabled = self.tdp_enabled and _flag(params, "kvm.tdp_mmu", self.profile.tdp_mmu)
        mmio_caching = _flag(params, "kvm.mmio_caching", True)
        nx_huge_pages = _flag(params, "kvm.nx_huge_pages", False)
        if self.tdp_enabled:
            has_ad_bits = _flag(params, "kvm_intel.eptad", True)
            self.spte = ept_masks(
                has_ad_bits=has_ad_bits, mmio_caching=mmio_caching, nx_huge_pages=nx_huge_pages
            )
        else:
            self.spte = legacy_masks(mmio_caching=mmio_caching, nx_huge_pages=nx_huge_pages)
        self.enable_apicv = _flag(params, "kvm_intel.enable_apicv", False)
        self.apic_access_memslot_enabled = False
        self.eager_page_split = _flag(params, "kvm.eager_page_split", True)
        # Linux has it where the local APIC is its own. Off here unless asked for: the waits are what shows.
        self.async_pf = _flag(params, "kvm.async_pf", False)
        self.manual_dirty_log_protect = 0
        # Linux has pml on where the CPU can do it. Off here unless asked for: protection is what shows.
        enable_pml = _flag(params, "kvm_intel.pml", False) and self.spte.ad_enabled and self.tdp_enabled
        self.cpu_dirty_log_size = PML_ENTRIES if enable_pml else 0
        self.nr_memslots_dirty_logging = 0
        self.dirty_ring_size = 0
        self.disabled_quirks = 0

    def _init_type(self, vm_type: int) -> None:
        """kvm_is_vm_type_supported; KernelError(EINVAL)."""
        protected = self.profile.guest_memfd and self.tdp_mmu_enabled
        if vm_type != KVM_X86_DEFAULT_VM and (vm_type != KVM_X86_SW_PROTECTED_VM or not protected):
            raise KernelError(EINVAL, f"VM type {vm_type} is not supported")
        self.vm_type = vm_type
        self.has_private_mem = vm_type == KVM_X86_SW_PROTECTED_VM
        self.mem_attr_array: dict[int, int] = {}
        self.gmems: list[KvmGmem] = []

    def _init_slots(self) -> None:
        sched = self.sched
        count = self.profile.nr_memslot_as_ids
        self.memslot_sets = [(KvmMemslots(as_id), KvmMemslots(as_id)) for as_id in range(count)]
        self.memslots = [pair[0] for pair in self.memslot_sets]
        self.nr_memslot_pages = 0
        self.slots_lock = Mutex(sched, "slots_lock")
        self.slots_arch_lock = Mutex(sched, "slots_arch_lock")
        self.srcu = Srcu(sched, "kvm_srcu")
        self.mn_invalidate_lock = Spinlock(sched, "mn_invalidate_lock")
        self.mn_active_invalidate_count = 0
        self.mn_memslots_update_wait = WaitQueue(sched, "mn_memslots_update")
        self.gpc_lock = Spinlock(sched, "gpc_list_lock")

    def _init_mmu(self) -> None:
        lock = RwLock if self.profile.mmu_lock_is_rwlock else _MmuSpinlock
        self.mmu_lock: RwLock = lock(self.sched, "mmu_lock")
        self.mmu_invalidate_seq = 0
        self.mmu_invalidate_in_progress = 0
        self.mmu_invalidate_range_start = invalidate.INVALID_GPA
        self.mmu_invalidate_range_end = invalidate.INVALID_GPA
        self.mmu_valid_gen = 0
        self.root_role = tdp_root_role(ad_disabled=not self.spte.ad_enabled)
        self.rcu = Rcu()
        self.sps: dict[int, KvmMmuPage] = {}
        self.tdp_mmu_roots: list[KvmMmuPage] = []
        self.tdp_mmu_pages_lock = Spinlock(self.sched, "tdp_mmu_pages_lock")
        self.active_mmu_pages: dict[int, KvmMmuPage] = {}
        self.mmu_page_hash: dict[int, list[KvmMmuPage]] = {}
        self.n_used_mmu_pages = 0
        self.n_max_mmu_pages = 0
        self.killed_by = KilledBy()
        self.indirect_shadow_pages = 0
        self.mmu_unsync_pages_lock = Spinlock(self.sched, "mmu_unsync_pages_lock")
        self.shadow_root_allocated = False
        self._init_page_track()
        self.instrumented: set[int] = set()

    def _init_page_track(self) -> None:
        self.track_notifier_list: list[page_track.KvmPageTrackNotifierNode] = []
        self.track_srcu = Srcu(self.sched, "track_srcu")
        self.external_write_tracking_enabled = False
        self.mmu_track_write: Callable[[Vcpu, int, bytes], None] = kvm_mmu_track_write
        if self.profile.mmu_is_page_track_node:
            self.track_notifier_list.append(mmu_roots.KvmMmuPageTrackNode(self))

    def _table_frames(self) -> dict[int, int]:
        """The frames KVM allocated for itself, for the host's audit: one reference each."""
        own = [pfn for vcpu in self.vcpus for pfn in _frames_of(vcpu)]
        own += [vcpu.apic.regs for vcpu in self.vcpus if vcpu.apic is not None]
        own += [pfn for vcpu in self.vcpus if vcpu.dirty_ring is not None for pfn in vcpu.dirty_ring.pfns]
        return dict.fromkeys([*self.sps, *(pfn for pfn in own if pfn >= 0)], 1)

    def alloc_zeroed_page(self) -> int:
        """A frame for KVM itself; KernelError(ENOMEM)."""
        pfn = alloc_pages(self.host, GFP_KERNEL_ACCOUNT | GFP_ZERO, 0, self.process.home_node)
        if pfn < 0:
            raise KernelError(ENOMEM, "no frame for KVM")
        return pfn

    def slots(self) -> KvmMemslots:
        """kvm_memslots: the active set of normal memory."""
        return self.memslots[0]

    # -- ioctls ---------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU; KernelError(EINVAL, EEXIST), ENOMEM as its frames are refused."""
        if not 0 <= vcpu_id < self.profile.max_vcpu_ids:
            raise KernelError(EINVAL, f"no vCPU may be number {vcpu_id}")
        if len(self.vcpus) >= self.profile.max_vcpus:
            raise KernelError(EINVAL, f"a VM has no more than {self.profile.max_vcpus} vCPUs")
        if any(v.vcpu_id == vcpu_id for v in self.vcpus):
            raise KernelError(EEXIST, f"vCPU {vcpu_id} exists")
        vcpu = Vcpu(self, vcpu_id)
        vcpu.async_pf = AsyncPfQueues(vcpu)
        if not self.tdp_enabled:
            vcpu.mmu.pae_root = self.alloc_zeroed_page()
        kvm_init_mmu(vcpu)
        if self.cpu_dirty_log_size:
            pml.vmx_pml_create(vcpu)
        if self.enable_apicv:
            lapic.kvm_alloc_apic_access_page(self)
            vcpu.apic = lapic.Lapic(self, vcpu)
            requests.kvm_make_request(requests.KVM_REQ_APIC_PAGE_RELOAD, vcpu)
        if self.dirty_ring_size:
            vcpu.dirty_ring = dirty_ring.KvmDirtyRing(self, vcpu_id, self.dirty_ring_size)
        self.vcpus.append(vcpu)
        return vcpu

    def set_sregs(self, vcpu: Vcpu) -> None:
        """KVM_SET_SREGS: the control registers that user space has just given the vCPU count from now on."""
        with vcpu.mutex:
            idx = self.srcu.read_lock()
            x86_cr.kvm_set_sregs(vcpu)
            self.srcu.read_unlock(idx)

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION; size 0 deletes."""
        if flags & KVM_MEM_GUEST_MEMFD:
            raise KernelError(EINVAL, "guest_memfd is for KVM_SET_USER_MEMORY_REGION2")
        memory_region.kvm_set_user_memory_region(self, slot, gpa, size, hva, flags)

    def set_user_memory_region2(
        self, slot: int, gpa: int, size: int, hva: int, flags: int, guest_memfd: AddressSpace | None = None,
        offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2."""
        memory_region.kvm_set_user_memory_region(
            self, slot, gpa, size, hva, flags, guest_memfd=guest_memfd, offset=offset
        )

    def create_guest_memfd(self, size: int, flags: int = 0) -> AddressSpace:
        """KVM_CREATE_GUEST_MEMFD: a file, to be closed with fput before the VM is destroyed."""
        return kvm_gmem_create(self, size, flags)

    def pre_fault_memory(self, vcpu: Vcpu, gpa: int, size: int, flags: int = 0) -> int:
        """KVM_PRE_FAULT_MEMORY: how many bytes from `gpa` on are mapped now, some; KernelError."""
        return kvm_vcpu_pre_fault_memory(vcpu, gpa, size, flags)

    def set_memory_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        kvm_vm_ioctl_set_mem_attributes(self, gpa, size, attributes, flags)

    def enable_manual_dirty_log(self, *, init_set: bool = False) -> None:
        """Reading a log does not clear it; `init_set`: logs start full."""
        both = dirty_log.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | dirty_log.KVM_DIRTY_LOG_INITIALLY_SET
        value = both if init_set else dirty_log.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        self.enable_cap(dirty_log.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, value)

    def enable_cap(self, cap: int, value: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP of the VM: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, _DIRTY_LOG_RING, _DISABLE_QUIRKS2."""
        if cap == KVM_CAP_DISABLE_QUIRKS2 and self.profile.quirks:
            if flags or value & ~self.profile.quirks:
                raise KernelError(EINVAL, f"there are no such quirks to disable: {value:#x}")
            self.disabled_quirks |= value
            return
        dirty_log.kvm_vm_ioctl_enable_cap(self, cap, value, flags)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: take back what user space harvested; how many entries."""
        return dirty_log.kvm_vm_ioctl_reset_dirty_pages(self)

    def get_dirty_log(self, slot: int) -> bytearray:
        """KVM_GET_DIRTY_LOG: one bit a page."""
        return dirty_log.kvm_get_dirty_log(self, slot)

    def clear_dirty_log(
        self, slot: int, first: int, bitmap: bytes | bytearray, num_pages: int | None = None
    ) -> None:
        """KVM_CLEAR_DIRTY_LOG; without `num_pages` as many as `bitmap` holds and the slot has."""
        if num_pages is None:
            memslot = self.slots().id_hash.get(slot)
            num_pages = min(len(bitmap) * 8, memslot.npages - first if memslot is not None else 0)
        dirty_log.kvm_clear_dirty_log(self, slot, first, num_pages, bitmap)

    def destroy(self) -> None:
        """kvm_destroy_vm. No vCPU may be running, and every guest_memfd must be closed."""
        if not self.alive:
            return
        if self.gmems:
            raise BrokenTruth("file-count", "a guest_memfd is open: it holds the VM", self.stream.here())
        self.alive = False
        self.clear_async_pf()
        mmu_notifier_unregister(self.mmu_notifier, self.mm)
        self.mn_active_invalidate_count = 0
        for vcpu in self.vcpus:
            vcpu.pv_time.cache.deactivate()
            lapic.kvm_free_lapic(vcpu)
            mmu_roots.kvm_mmu_unload(vcpu)
            mmu_roots.mmu_free_memory_caches(vcpu)
            pml.vmx_destroy_pml_buffer(vcpu)
            if vcpu.mmu.pae_root >= 0:
                put_page(self.host, vcpu.mmu.pae_root)
            if vcpu.dirty_ring is not None:
                vcpu.dirty_ring.free(self)
        kvm_tdp_mmu_invalidate_roots(self)
        kvm_tdp_mmu_zap_invalidated_roots(self, shared=False)
        self.vcpus.clear()
        if self.profile.mmu_shrinker:
            shrinker.unregister(self)
        self.host.frame_holders.remove(self._table_frames)
        if self.truths is not None:
            self.truths.detach()

    def clear_async_pf(self) -> None:
        """Wait until no work item brings pages in any more, and forget them. Each holds the address space."""
        for vcpu in self.vcpus:
            kvm_clear_async_pf_completion_queue(vcpu)
            vcpu.apf.gfns.clear()

    # -- for the board and its tools ------------------------------------------------------------

    def kvm_flush_remote_tlbs(self) -> None:
        """Every vCPU flushes before its next guest instruction."""
        requests.kvm_flush_remote_tlbs(self)

    def kick_for_interrupt(self, vcpu: Vcpu) -> None:
        """The vCPU's interrupt controller has something new."""
        requests.kvm_make_request(requests.KVM_REQ_EVENT, vcpu)
        requests.kvm_vcpu_kick(vcpu)

    def request_exit(self, vcpu: Vcpu) -> None:
        """Get the vCPU's thread back to user space with `intr`: a signal."""
        vcpu.immediate_exit = True
        requests.kvm_vcpu_kick(vcpu)

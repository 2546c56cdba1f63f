"""The module parameters that `--param NAME=VALUE` takes: the kernel's, and a few of the machine's own.

The models read them by name where they need them; a test holds this list against the sources.
"""

from __future__ import annotations

import msgspec

from refault.errors import UsageError

__all__ = ["PARAMS", "Param", "check_params"]

_BOOLS = ("y", "n", "1", "0", "on", "off", "yes", "no", "true", "false")
_UINT_MAX = 0xFFFF_FFFF


class Param(msgspec.Struct, frozen=True):
    """One parameter: what it takes, its default, its meaning.

    It takes a `bool`, a `count`, a `number` (a count or 0), a `size` or one of several words separated by |,
    of which one may be `bool`; `most` is a number's greatest value.
    """

    takes: str
    default: str
    doc: str
    most: int = _UINT_MAX


PARAMS: dict[str, Param] = {
    "kernel.numa_balancing": Param("bool", "N", "hinting faults move pages to the node that uses them"),
    "kernel.numa_balancing_scan_period_min_ms": Param("count", "1000", "ms between two scans of a process"),
    "kernel.numa_balancing_scan_size_mb": Param("count", "256", "MiB of mapped memory in one scan"),
    "hugetlb.nr_hugepages": Param("number", "0", "huge pages of 2 MiB in the host's pool from the start"),
    "hugetlb.nr_overcommit_hugepages": Param(
        "number", "0", "huge pages that the pool may grow by while they are asked for"
    ),
    "kvm.async_pf": Param("bool", "N", "a vCPU need not wait for a page that is read in; Linux has Y"),
    "kvm.eager_page_split": Param(
        "bool", "Y", "split huge pages when dirty logging starts, not at the fault"
    ),
    "kvm.mmio_caching": Param("bool", "Y", "remember MMIO pages as misconfigured EPT entries"),
    "kvm.nx_huge_pages": Param("bool|force|never", "N", "no huge page is executable"),
    "kvm.nx_huge_pages_recovery_period_ms": Param(
        "number", "0", "ms between two recoveries of huge pages split for code; 0: an hour by the ratio"
    ),
    "kvm.nx_huge_pages_recovery_ratio": Param("number", "60", "1 in so many is recovered each time; 0: none"),
    "kvm.tdp_mmu": Param(
        "bool", "Y", "EPT by the TDP MMU, not by direct pages with rmaps; N in profile linux-5.10"
    ),
    "kvm_intel.enable_apicv": Param("bool", "N", "a local APIC, whose page the CPU virtualizes; Linux has Y"),
    "kvm_intel.eptad": Param("bool", "Y", "EPT accessed and dirty bits"),
    "kvm_intel.pml": Param("bool", "N", "the CPU logs what it dirties; Linux has Y, see dirty_log"),
    "mm.fault_around_bytes": Param(
        "number", "65536", "what a read fault of a file maps if it is cached, rounded down to 2**N",
        most=(513 << 12) - 1,
    ),
    "mm.read_ahead_kb": Param("number", "128", "what a miss in the page cache reads around it"),
    "mm.max_gather_pages": Param("count", "9698", "pages that an unmap frees in one go"),
    "mm.movablecore": Param("size", "0", "memory of ZONE_MOVABLE, over all nodes; plain bytes or K, M, G"),
    "mm.nr_cpus": Param("count", "64", "CPUs of the host: vCPU N's thread is on CPU N modulo this"),
    "mm.page_group_by_mobility": Param(
        "bool", "N", "keep what cannot move out of the blocks of what can, as large machines do"
    ),
    "mm.soft_dirty": Param(
        "bool", "Y", "entries know if they were written since clear_refs; N: no CONFIG_MEM_SOFT_DIRTY"
    ),
    "swap.device": Param("file|zram", "file", "swap to a file, or to compressed RAM"),
    "swap.vma_ra_enabled": Param("bool", "Y", "swap readahead goes by address, not by slot"),
    "vmm.dirty_ring_size": Param("number", "0", "entries of each vCPU's dirty ring; 0: bitmaps, no rings"),
    "vmm.quirk_slot_zap_all": Param(
        "bool", "Y", "KVM drops all of its tables with a slot; N: the VMM has it drop the slot's leaves only"
    ),
    "vmm.vm_type": Param(
        "default|sw-protected", "default", "KVM_CREATE_VM's type: with sw-protected pages can be private"
    ),
    "zswap.accept_threshold_percent": Param("count", "90", "how full a full zswap pool may stay", most=100),
    "zswap.enabled": Param("bool", "N", "keep swapped pages compressed in RAM before they go to the file"),
    "zswap.max_pool_percent": Param("count", "20", "how much of RAM the zswap pool may take", most=100),
    "zswap.shrinker_enabled": Param("bool", "N", "reclaim writes the zswap pool back, too"),
    "vm.page_cluster": Param("0|1|2|3|4|5", "0", "swap readahead of up to 2**N pages"),
    "mm.lru_gen": Param("bool", "N", "multi-generational LRU instead of the active and inactive lists"),
    "thp.enabled": Param("always|madvise|never", "madvise", "which anonymous memory gets huge pages"),
    "thp.defrag": Param(
        "always|defer|defer+madvise|madvise|never", "madvise", "whose fault reclaims and compacts for one"
    ),
    "thp.shmem_enabled": Param(
        "always|within_size|advise|never", "never", "which shared memory gets huge pages"
    ),
    "thp.use_zero_page": Param("bool", "Y", "a read maps the huge page of zeros"),
    "khugepaged.pages_to_scan": Param("count", "4096", "entries looked at between two sleeps"),
    "khugepaged.scan_sleep_millisecs": Param("number", "10000", "how long khugepaged sleeps then"),
    "khugepaged.alloc_sleep_millisecs": Param("number", "60000", "and when there was no huge page"),
    "khugepaged.max_ptes_none": Param("number", "511", "empty entries in 2 MiB that are collapsed", most=511),
    "khugepaged.max_ptes_swap": Param(
        "number", "64", "swapped-out pages in 2 MiB that are collapsed", most=511
    ),
    "khugepaged.max_ptes_shared": Param(
        "number", "256", "pages of others in 2 MiB that are collapsed", most=511
    ),
    "sched.period": Param(
        "count", "8", "switch tasks at one scheduling point in so many, with sched.strategy=random"
    ),
    "sched.strategy": Param(
        "block|random", "block", "run each task until it blocks, or switch at random points"
    ),
}


def check_params(params: dict[str, str], ram: int) -> None:
    """UsageError for a name that no model reads, or a value that it could not or that `ram` bytes forbid."""
    for name, value in params.items():
        param = PARAMS.get(name)
        if param is None:
            from difflib import get_close_matches

            near = get_close_matches(name, PARAMS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "see refault list params"
            raise UsageError(f"no parameter {name!r}; {hint}")
        takes = param.takes
        if takes in ("count", "number"):
            good = value.isdecimal() and int(value) >= (takes == "count")
            if good and int(value) > param.most:
                raise UsageError(f"parameter {name}={value}: it takes at most {param.most}")
        elif takes == "size":
            good = value.rstrip("kmgKMG").isdecimal() and len(value) - len(value.rstrip("kmgKMG")) < 2
        else:
            words = takes.split("|")
            good = (value in words and value != "bool") or ("bool" in words and value.lower() in _BOOLS)
        if not good:
            said = {"count": "a number from 1", "number": "a number", "size": "bytes, or 64M and the like"}
            takes = said.get(takes, "Y or N" if takes == "bool" else takes.replace("bool", "Y|N"))
            raise UsageError(f"parameter {name}={value}: it takes {takes}")
    if (movable := params.get("mm.movablecore")) is not None:
        from host_mm.mm_init import memparse

        if memparse(movable) >= ram:
            raise UsageError(f"parameter mm.movablecore={movable}: the host has {ram >> 10}K of RAM in all")

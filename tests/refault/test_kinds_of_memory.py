"""Operations on every kind of guest memory, in random order: done or refused, and no truth breaks."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

import emu.operations  # noqa: F401  (fills the registry)
import refault
from emu.hostops import OPERATIONS

MEMORY = 8 << 20
ELSEWHERE = {
    "hugetlb_create": (0x8000_0000, 512, {}),
    "hugetlb_create private": (0x9000_0000, 512, {"shared": 0}),
    "memfd_create": (0xA000_0000, 1024, {}),
    "file_create": (0xB000_0000, 64, {}),
    "file_create private": (0xB100_0000, 64, {"private": 1}),
    "pfnmap_create": (0xC000_0000, 64, {}),
}
# These use frames up for good, so that a small host has none left in the end.
WASTING = ("pin", "soft_offline")
RANGES = sorted(
    name for name, op in OPERATIONS.items()
    if op.takes_a_range and not name.endswith("_create") and name not in WASTING
)
WORDS = (
    "host_read", "host_write", "child_read", "dune_read", "dune_write", "sva_read", "sva_write",
    "mirror_read", "dma_write", "kvm_map_write", "device_read", "device_write", "device_add", "file_write",
    "peer_write", "hugetlb_peer_read", "hugetlb_peer_write", "uffd_read",
)
PAGES = ("fsync", "truncate", "hugetlb_unshare", "hugetlb_sharers", "memory_failure", "soft_offline")
PLAIN = (
    "fork", "child_exit", "compact", "khugepaged", "reclaim", "clear_refs", "memcg_limit", "memcg_reclaim",
    "lru_gen_enable", "lru_gen_age", "lru_gen_evict", "zswap_enable", "zswap_writeback",
    "oom_kill", "uffd_end",
)
POLICIES = (
    {},
    {"mm.lru_gen": "Y", "zswap.enabled": "Y"},
    {"thp.enabled": "always", "thp.shmem_enabled": "always"},
    {"swap.device": "zram", "thp.enabled": "always", "sched.strategy": "random"},
)


def calls(rng: random.Random, nr: int) -> Iterator[tuple[str, dict[str, int]]]:
    """So many calls, on pages of all kinds of memory."""
    kinds = [(0x200000, 1536), *((gpa, pages) for gpa, pages, _ in ELSEWHERE.values())]
    for _ in range(nr):
        base, size = rng.choice(kinds)
        first = rng.choice((0, rng.randrange(size)))
        pages = min(rng.choice((1, 2, 16, 512)), size - first)
        gpa = base + first * 4096
        match rng.choices(("range", "word", "page", "plain"), (10, 5, 1, 3))[0]:
            case "range":
                yield rng.choice(RANGES), {"gpa": gpa, "pages": pages}
            case "word":
                name = rng.choice(WORDS)
                value = {"value": rng.randrange(1 << 64)} if "write" in name else {}
                yield name, {"gpa": gpa + 8 * rng.randrange(512), **value}
            case "page":
                yield rng.choice(PAGES), {"gpa": gpa}
            case "plain":
                yield rng.choice(PLAIN), {}


@pytest.mark.parametrize("policy", range(len(POLICIES)))
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_what_is_done_to_memory_of_any_kind_breaks_no_truth(seed: int, policy: int) -> None:
    done = 0
    with refault.VM(MEMORY, vcpus=2, seed=seed, check=True, params=POLICIES[policy]) as vm:
        checker = vm.board.host.checker
        assert checker is not None
        vm.load("swap-storm", "mib=4", "weather=0")
        vm.run(max_insns=2_000_000)
        # A vCPU may have stopped inside a fault, with a page locked: at rest means that it is through.
        vm.board.quiesce()
        vm.host.nr_hugepages(4)
        for name, (gpa, pages, options) in ELSEWHERE.items():
            getattr(vm.host, name.split()[0])(gpa=gpa, pages=pages, **options)
        for name, arguments in calls(random.Random(seed), 200):
            try:
                getattr(vm.host, name)(**arguments)
                done += 1
            except refault.KernelError:
                pass
            if name in PLAIN:
                checker.audit()
    assert done > 60

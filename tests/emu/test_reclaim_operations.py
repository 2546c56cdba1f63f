"""Reclaim behind a running guest: what it uses stays, what it reads is right; bad requests are refused."""

from __future__ import annotations

import pytest

import refault
from host_mm.kernel.errors import OutOfMemory
from refault.scenarios.api import DATA_GPA, DATA_SIZE, PAGE
from refault.scenarios.emulator import EmulatorBackend


def backend(**options: object) -> EmulatorBackend:
    """A guest whose every access is one KVM_RUN, with SPTEs that have accessed bits."""
    params = {"kvm_intel.eptad": "1", **options.pop("params", {})}  # type: ignore[dict-item]
    return EmulatorBackend(check=True, params=params, **options)


def present(b: EmulatorBackend, page: int) -> bool:
    return b.board.vmm.present_pfn(b.data_hva + page * PAGE) >= 0


def host(b: EmulatorBackend, name: str, *args: int) -> int:
    return int(getattr(b.vm.host, name)(*args))


def errno_of(call: object, *args: int) -> str:
    with pytest.raises(refault.KernelError) as refused:
        call(*args)  # type: ignore[operator]
    return str(refused.value.name)


@pytest.mark.parametrize("ad", ["0", "1"])
def test_pages_that_only_the_guest_uses_survive_generations_that_the_others_do_not(ad: str) -> None:
    b = backend(params={"kvm_intel.eptad": ad, "mm.lru_gen": "Y", "swap.device": "zram"})
    for page in range(128):
        b.store(page * PAGE, page + 1)
    b.board.host.mm.lru.lru_add_drain_all()
    hot = range(0, 128, 8)
    for _ in range(4):
        host(b, "lru_gen_age")
        for page in hot:
            assert b.load(page * PAGE) == page + 1
    host(b, "lru_gen_age")
    host(b, "lru_gen_evict", 80)
    gone = [page for page in range(128) if not present(b, page)]
    assert len(gone) >= 64
    assert not set(gone) & set(hot)
    assert [b.load(page * PAGE) for page in range(128)] == list(range(1, 129))
    b.close()


def test_aging_clears_the_guests_accessed_bits_by_clear_young_of_single_pages() -> None:
    b = backend(params={"mm.lru_gen": "Y"})
    for page in range(8):
        b.store(page * PAGE, 1)
    b.board.host.mm.lru.lru_add_drain_all()
    b.begin()
    host(b, "lru_gen_age")
    assert b.lines[:8] == [f"kvm_age_hva [D{n * PAGE:+#x}..D{(n + 1) * PAGE:+#x}]" for n in range(8)]
    b.close()


def test_damon_sees_the_half_that_the_guest_uses() -> None:
    vm = refault.VM("8M", vcpus=2, seed=1, check=True)
    vm.load("swap-storm", "mib=4", "weather=0")
    vm.run(max_insns=3_000_000)
    used = vm.host.damon(gpa=0x200000, pages=256, ns=4_000_000, sample_ns=100_000)
    assert 0 <= used <= 256
    vm.finish()
    vm.close()


def test_idle_tracking_sees_guest_loads_through_the_spte() -> None:
    b = backend()
    for page in range(16):
        b.store(page * PAGE, 7)
    b.board.host.mm.lru.lru_add_drain_all()
    assert host(b, "page_idle_set", DATA_GPA, 16) == 16
    for page in (2, 9):
        b.load(page * PAGE)
    assert host(b, "page_idle_get", DATA_GPA, 16) == 14
    b.close()


@pytest.mark.parametrize("gen", ["N", "Y"])
def test_a_guest_bigger_than_its_group_may_be_runs_right(gen: str) -> None:
    b = backend(params={"mm.lru_gen": gen})
    host(b, "memcg_limit", 0)
    assert host(b, "memcg_limit", 100) <= 100
    for page in range(400):
        b.store(page * PAGE, page + 1)
    assert sum(present(b, page) for page in range(400)) <= 100
    assert [b.load(page * PAGE) for page in range(400)] == list(range(1, 401))
    assert b.board.vmm.memcg().usage <= 100
    b.close()
    assert not b.board.host.mm.memcg.groups


def test_a_group_without_anything_to_reclaim_ends_the_run() -> None:
    b = backend(swap=None)
    host(b, "memcg_limit", 50)

    def use() -> None:
        for page in range(400):
            b.store(page * PAGE, 1)

    with pytest.raises(OutOfMemory, match="Memory cgroup out of memory"):
        use()
    b.vm.abandon()


def test_zswap_and_its_writeback_are_transparent_to_the_guest() -> None:
    b = backend()
    assert host(b, "zswap_enable", 1) == 0
    for page in range(64):
        b.store(page * PAGE, page + 1)
    assert host(b, "swap_out", DATA_GPA, 64) == 64
    pool = b.board.host.mm.zswap.pool
    assert 0 < pool.frames < 32
    assert host(b, "zswap_writeback", 20) == 20
    assert host(b, "zswap_enable", 0) == 1
    assert [b.load(page * PAGE) for page in range(64)] == list(range(1, 65))
    assert pool.frames == 0
    b.close()


def test_switching_the_lru_back_and_forth_keeps_every_folio_on_one_list() -> None:
    b = backend()
    for page in range(100):
        b.store(page * PAGE, page)
    for on in (1, 0, 1, 1, 0):
        host(b, "lru_gen_enable", on)
        host(b, "reclaim", 40)
        assert [b.load(page * PAGE) for page in range(100)] == list(range(100))
    b.close()


def test_a_bystander_is_reaped_and_the_guest_does_not_notice() -> None:
    b = backend()
    b.store(0, 5)
    free = b.board.host.mm.allocator.nr_free_pages()
    assert host(b, "oom_kill", 200) == 200
    b._host(b.board.host.mm.quiesce)
    assert b.board.host.mm.allocator.nr_free_pages() == free
    assert b.load(0) == 5
    b.close()


def test_bad_requests_are_refused_with_the_errno() -> None:
    b = backend()
    h = b.vm.host
    assert errno_of(h.memcg_limit, -1) == "EINVAL"
    assert errno_of(h.memcg_reclaim, 10) == "ENOENT"
    assert errno_of(h.lru_gen_enable, 2) == "EINVAL"
    assert errno_of(h.lru_gen_age) == "ENOSYS"
    assert errno_of(h.lru_gen_evict, 0) == "EINVAL"
    assert errno_of(h.zswap_writeback, 0) == "EINVAL"
    assert errno_of(h.oom_kill, 0) == "EINVAL"
    assert errno_of(h.page_idle_set, 1, 1) == "EINVAL"
    assert errno_of(h.page_idle_get, DATA_GPA + DATA_SIZE, 1) == "EFAULT"
    assert errno_of(h.damon, DATA_GPA, 1, 5, 10) == "EINVAL"
    b.close()
    noswap = backend(swap=None)
    assert errno_of(noswap.vm.host.zswap_enable, 1) == "ENOSYS"
    noswap.close()

"""Objects of any size up to a page, packed into frames that are accounted for to the last."""

from __future__ import annotations

import random

import pytest

from host_mm.host import HostMm
from host_mm.kernel.errors import BrokenTruth
from host_mm.page_alloc import GFP_KERNEL, GFP_NOWAIT
from host_mm.truths import audit
from host_mm.zsmalloc import ZS_MAX_ALLOC_SIZE, ZsPool, chain_size, size_class
from tests.host_mm.machine import PAGE, make_host


def pool(host: HostMm | None = None) -> ZsPool:
    return ZsPool(host or make_host(), "test")


def test_a_class_is_the_next_multiple_of_sixteen() -> None:
    assert [size_class(n) for n in (1, 32, 33, 48, 49, 4081, 4096)] == [32, 32, 48, 48, 64, 4096, 4096]


@pytest.mark.parametrize("size", range(32, PAGE + 1, 16))
def test_a_chain_wastes_least_of_all_that_are_allowed(size: int) -> None:
    wastes = [n * PAGE % size for n in range(1, 9)]
    assert chain_size(size) * PAGE % size == min(wastes)


def test_what_was_put_in_comes_out_also_across_two_frames() -> None:
    zs = pool()
    rng = random.Random(1)
    kept = {zs.malloc(data, GFP_KERNEL): data for data in (rng.randbytes(n) for n in range(1, PAGE + 1, 37))}
    for handle, data in kept.items():
        assert zs.read(handle) == data
        assert zs.size(handle) == len(data)
    assert zs.stored_bytes == sum(map(len, kept.values()))


def test_objects_of_one_class_share_frames() -> None:
    zs = pool()
    for _ in range(64):
        zs.malloc(bytes(64), GFP_KERNEL)
    assert zs.frames == 1
    zs.malloc(bytes(64), GFP_KERNEL)
    assert zs.frames == 2


@pytest.mark.parametrize("seed", range(4))
def test_random_use_holds_only_frames_with_objects_and_leaks_none(seed: int) -> None:
    host = make_host()
    free = host.allocator.nr_free_pages()
    zs = pool(host)
    rng = random.Random(seed)
    kept: dict[int, bytes] = {}
    for _ in range(600):
        if kept and rng.random() < 0.45:
            handle = rng.choice(list(kept))
            assert zs.read(handle) == kept.pop(handle)
            zs.free(handle)
        else:
            data = rng.randbytes(rng.randint(1, PAGE))
            kept[zs.malloc(data, GFP_KERNEL)] = data
    audit(host)
    assert host.allocator.nr_free_pages() == free - zs.frames
    for handle in list(kept):
        zs.free(handle)
    assert (zs.frames, zs.stored_bytes) == (0, 0)
    assert host.allocator.nr_free_pages() == free
    audit(host)


def test_without_memory_there_is_no_handle_and_nothing_is_kept() -> None:
    host = make_host(ram=64 * PAGE)
    zs = pool(host)
    handles = []
    while handle := zs.malloc(random.Random(0).randbytes(3000), GFP_NOWAIT):
        handles.append(handle)
    assert handles
    audit(host)


def test_an_object_has_one_byte_to_one_page() -> None:
    zs = pool()
    for size in (0, ZS_MAX_ALLOC_SIZE + 1):
        with pytest.raises(BrokenTruth):
            zs.malloc(bytes(size), GFP_KERNEL)

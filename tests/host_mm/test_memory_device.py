"""Entries for pages that a device has, told apart and counted (host_mm/memory_device.py).

Faults, forks and zaps of them are at work in tests/emu/test_hmm_device.py.
"""

from __future__ import annotations

import pytest

from host_mm.arch.x86.swapops import (
    SWP_DEVICE_EXCLUSIVE,
    SWP_MIGRATION_WRITE,
    decode_pte,
    is_device_exclusive_entry,
    is_device_private_entry,
    is_swap_pte,
    is_writable_device_private_entry,
    non_swap_entry,
    pte_to_swp_entry,
    swp_entry,
    swp_entry_to_pte,
)
from host_mm.filemap import folio_trylock, folio_unlock
from host_mm.fork import fork_process
from host_mm.kernel.errors import KernelError
from host_mm.memory_device import device_entry_pfn, make_device_private_pte
from host_mm.page import put_page
from host_mm.rmap_device import make_device_exclusive
from tests.host_mm.machine import Vmm, run


def test_the_kinds_of_entries_are_told_apart() -> None:
    for writable in (False, True):
        pte = make_device_private_pte(0x123, writable=writable)
        entry = pte_to_swp_entry(pte)
        assert is_swap_pte(pte)
        assert non_swap_entry(entry)
        assert is_device_private_entry(entry)
        assert is_writable_device_private_entry(entry) is writable
        assert not is_device_exclusive_entry(entry)
        assert device_entry_pfn(pte) == 0x123
        assert decode_pte(pte) == f"device-{'write' if writable else 'read'} pfn 0x123"
    alone = swp_entry_to_pte(swp_entry(SWP_DEVICE_EXCLUSIVE, 0x77))
    assert is_device_exclusive_entry(pte_to_swp_entry(alone))
    assert device_entry_pfn(alone) == 0x77
    assert device_entry_pfn(swp_entry_to_pte(swp_entry(SWP_MIGRATION_WRITE, 0x77))) == -1


def test_a_cpu_waits_for_the_device_to_let_go_of_the_folio_lock() -> None:
    vmm = Vmm()
    host, log = vmm.host, []

    def device() -> None:
        vmm.mm.mmap_lock.read_lock()
        pfn = make_device_exclusive(vmm.mm, vmm.base, None)
        vmm.mm.mmap_lock.read_unlock()
        host.sched.sleep(5000)
        log.append("device is done")
        folio_unlock(host, pfn)
        put_page(host, pfn)

    def cpu() -> None:
        host.sched.sleep(2000)
        vmm.host_write(0, 1)
        log.append("cpu wrote")

    run(host, device, cpu)
    assert log == ["device is done", "cpu wrote"]


def test_a_fork_that_finds_the_folio_locked_fails_as_linux_does() -> None:
    vmm = Vmm()

    def body() -> None:
        vmm.mm.mmap_lock.read_lock()
        pfn = make_device_exclusive(vmm.mm, vmm.base, None)
        vmm.mm.mmap_lock.read_unlock()
        with pytest.raises(KernelError, match="ENOMEM"):
            fork_process(vmm.process)
        folio_unlock(vmm.host, pfn)
        assert folio_trylock(vmm.host, pfn)
        folio_unlock(vmm.host, pfn)
        put_page(vmm.host, pfn)
        fork_process(vmm.process)

    run(vmm.host, body)

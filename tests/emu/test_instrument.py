"""An armed EPT entry gives way when KVM changes or drops it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from refault.scenarios.api import DATA_GPA
from refault.scenarios.emulator import EmulatorBackend


@pytest.fixture
def guest() -> Iterator[EmulatorBackend]:
    backend = EmulatorBackend(check=True, params={"kvm_intel.eptad": "1"}, mmu="ept")
    backend.store(0, 1)
    yield backend
    backend.close()


@pytest.mark.parametrize("rwx", range(8))
def test_an_armed_entry_that_was_zapped_stays_away(guest: EmulatorBackend, rwx: int) -> None:
    guest.vm.host.ept_set(DATA_GPA, rwx)
    guest.vm.host.swap_out(DATA_GPA)
    guest.host_write(0, 2)
    assert guest.read_modify_write(0) == "ok"
    assert guest.host_read(0) == guest.load(0) == 3


@pytest.mark.parametrize("rwx", range(8))
def test_an_armed_entry_does_not_escape_the_dirty_log(guest: EmulatorBackend, rwx: int) -> None:
    guest.vm.host.ept_set(DATA_GPA, rwx)
    guest.vm.host.dirty_log(DATA_GPA, 1)
    guest.vm.host.get_dirty(DATA_GPA)
    guest.load(0)
    guest.vm.host.get_dirty(DATA_GPA)
    guest.store(0, 9)
    assert guest.vm.host.get_dirty(DATA_GPA) == 1
    guest.vm.host.dirty_log(DATA_GPA, 0)


def test_an_armed_entry_that_aging_tracks_is_whole_again() -> None:
    backend = EmulatorBackend(check=True, mmu="ept")
    backend.store(0, 1)
    for rwx in range(8):
        backend.vm.host.ept_set(DATA_GPA, rwx)
        backend.vm.host.age(DATA_GPA)
        backend.vm.host.ept_restore()
        assert backend.read_modify_write(0) == "ok"
    assert backend.load(0) == 9
    backend.close()

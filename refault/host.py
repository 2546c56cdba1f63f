"""`refault.Host`: one host with any number of VMs on it."""

from __future__ import annotations

from typing import Any

from emu.host import Host as _Machine
from refault.numbers import size
from refault.vm import VM

__all__ = ["Host"]


def _bytes(value: int | str | None) -> int | None:
    return size(value) if isinstance(value, str) else value


class Host:
    """A host with `ram` and `swap` (bytes, or text such as "24M"; swap None: none).

    `seed` decides all chance; `params` are module parameters under the kernel's names; `breaks`
    names protocol steps to leave out; `check` turns the truths on.
    """

    def __init__(
        self,
        ram: int | str = "256M",
        swap: int | str | None = "256M",
        *,
        seed: int = 1,
        params: dict[str, str] | None = None,
        breaks: frozenset[str] | set[str] = frozenset(),
        check: bool = False,
    ) -> None:
        ram_bytes = _bytes(ram)
        assert ram_bytes is not None
        self.ram = ram_bytes
        self.swap = _bytes(swap)
        self.check = check
        self.machine = _Machine(
            ram=ram_bytes, swap=self.swap, seed=seed, params=params, breaks=frozenset(breaks), checks=check
        )

    def vm(self, **options: Any) -> VM:
        """A VM on this host; the options are those of `refault.VM` that are not the host's."""
        return VM(on=self, **options)

    def close(self) -> None:
        """Destroy the VMs and the host."""
        self.machine.close()

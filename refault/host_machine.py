"""The host as a Python object, but for making VMs: what a VM needs of it."""

from __future__ import annotations

from argparse import ArgumentTypeError

from emu.host import Host
from refault.errors import UsageError
from refault.numbers import size
from refault.params import check_params
from refault.registry import profiles, switches

__all__ = ["HostMachine", "as_bytes"]


MIN_RAM = 256 << 10
"""Less does not hold the reserves of two nodes."""
MIN_SWAP = 8 << 10
"""The header and one page."""


def as_bytes(value: int | str | None) -> int | None:
    """A size given as bytes or as text such as "24M"; None stays None."""
    try:
        return size(value) if isinstance(value, str) else value
    except ArgumentTypeError as exc:
        raise UsageError(str(exc)) from None


class HostMachine:
    """A host with `ram` and `swap` (bytes, or text such as "24M"; swap None: none).

    `seed` decides all chance; `profile` names the kernel, see `refault list profiles`; `params` are
    module parameters under the kernel's names; `breaks` names protocol steps to leave out; `check` turns
    the truths on.
    """

    def __init__(
        self,
        ram: int | str = "256M",
        swap: int | str | None = "256M",
        *,
        seed: int = 1,
        profile: str = "linux-6.18",
        params: dict[str, str] | None = None,
        breaks: frozenset[str] | set[str] = frozenset(),
        check: bool = False,
    ) -> None:
        if profile not in profiles():
            raise UsageError(f"no kernel {profile!r}; there is {', '.join(profiles())}")
        unknown = sorted(set(breaks) - set(switches()))
        if unknown:
            raise UsageError(f"no protocol switch {unknown[0]!r}; see refault list switches")
        ram_bytes = as_bytes(ram)
        assert ram_bytes is not None
        check_params(params or {}, ram_bytes)
        self.ram = ram_bytes
        self.swap = as_bytes(swap)
        self.check = check
        if ram_bytes < MIN_RAM:
            raise UsageError(f"a host needs {MIN_RAM >> 10}K of RAM at least, not {ram_bytes >> 10}K")
        if self.swap is not None and self.swap < MIN_SWAP:
            raise UsageError(f"a swap file needs {MIN_SWAP >> 10}K at least, not {self.swap >> 10}K")
        try:
            self.machine = Host(
                ram=ram_bytes, swap=self.swap, seed=seed, profile=profile, params=params,
                breaks=frozenset(breaks), checks=check,
            )
        except (OSError, OverflowError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "too large"
            sizes = f"{ram_bytes >> 20}M of RAM and {(self.swap or 0) >> 20}M of swap"
            raise UsageError(f"cannot make a host with {sizes}: {why}") from None

    def close(self) -> None:
        """Destroy the VMs and the host."""
        self.machine.close()

    def abandon(self) -> None:
        """Drop everything as it stands, after an error in the model."""
        self.machine.abandon()

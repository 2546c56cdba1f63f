"""`refault.Host`: one host with any number of VMs on it."""

from __future__ import annotations

from typing import Any

from refault.host_machine import HostMachine
from refault.vm import VM

__all__ = ["Host"]


class Host(HostMachine):
    """A host that VMs can be put on; see HostMachine for its options."""

    def vm(self, **options: Any) -> VM:
        """A VM on this host; the options are those of `refault.VM` that are not the host's."""
        return VM(on=self, **options)

"""memfd_create: an anonymous file of shared memory.

Source of truth: mm/memfd.c: memfd_create; Linux 6.18.

Not modelled: seals, MFD_HUGETLB, execute permission.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from host_mm.kernel.errors import KernelError
from host_mm.shmem_file import shmem_file_setup

if TYPE_CHECKING:
    from host_mm.address_space import AddressSpace
    from host_mm.host import HostMm

__all__ = ["memfd_create"]

MFD_NAME_MAX_LEN = 249


def memfd_create(host: HostMm, name: str, size: int = 0, nid: int = 0) -> AddressSpace:
    """memfd_create(2), and ftruncate(2) to `size`; to be closed with fput. KernelError(EINVAL)."""
    if size < 0 or len(name) > MFD_NAME_MAX_LEN:
        raise KernelError(EINVAL, f"memfd {name!r} of {size} bytes")
    return shmem_file_setup(host, f"memfd:{name}", size, nid)

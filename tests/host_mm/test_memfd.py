"""memfd_create (host_mm/memfd.py)."""

from __future__ import annotations

from errno import EINVAL

import pytest

from host_mm.address_space import fput
from host_mm.kernel.errors import KernelError
from host_mm.memfd import memfd_create
from tests.host_mm.machine import PAGE, make_host


def test_a_memfd_is_a_hole_of_its_size() -> None:
    host = make_host()
    file = memfd_create(host, "guest", 4 * PAGE)
    assert (file.name, file.i_size, file.nrpages, file.f_count) == ("memfd:guest", 4 * PAGE, 0, 1)
    fput(file)
    assert not host.mappings


@pytest.mark.parametrize(("name", "size"), [("x" * 250, 0), ("x", -1)])
def test_names_that_are_too_long_and_negative_sizes_are_refused(name: str, size: int) -> None:
    with pytest.raises(KernelError) as refused:
        memfd_create(make_host(), name, size)
    assert refused.value.errno == EINVAL

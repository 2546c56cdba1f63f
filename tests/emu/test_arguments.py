"""What arguments mean, and which are refused."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from emu.operations.arguments import check_pages, check_range, check_scalar, flag, scalar_bytes
from host_mm.kernel.errors import KernelError


@pytest.mark.parametrize("refused", [
    lambda: check_pages(0),
    lambda: check_pages(3, least=4),
    lambda: check_range(0x1001, 1),
    lambda: check_range(-4096, 1),
    lambda: check_range(0x1000, 0),
    lambda: check_scalar(0x1000, 3),
    lambda: check_scalar(0x1004, 8),
    lambda: flag("on", 2),
    lambda: flag("on", -1),
])
def test_what_no_operation_can_mean_is_einval(refused: Callable[[], object]) -> None:
    with pytest.raises(KernelError) as caught:
        refused()
    assert caught.value.errno == errno.EINVAL


def test_a_scalar_is_its_low_bytes_and_a_flag_a_bool() -> None:
    check_pages(0, least=0)
    check_range(0, 1)
    check_scalar(0x1004, 4)
    assert scalar_bytes(0x1_2233, 2) == b"\x33\x22"
    assert scalar_bytes(-1, 8) == b"\xff" * 8
    assert (flag("on", 0), flag("on", 1)) == (False, True)

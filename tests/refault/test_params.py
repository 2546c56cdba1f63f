"""Module parameters are refused where no model could read them, in one line that says what would do."""

from __future__ import annotations

import pytest

from refault.errors import UsageError
from refault.params import PARAMS, check_params

RAM = 64 << 20


@pytest.mark.parametrize(("name", "value", "said"), [
    ("thp.enable", "always", "did you mean 'thp.enabled'?"),
    ("foo", "1", "see refault list params"),
    ("thp.enabled", "maybe", "it takes always|madvise|never"),
    ("mm.lru_gen", "maybe", "it takes Y or N"),
    ("vm.page_cluster", "6", "it takes 0|1|2|3|4|5"),
    ("mm.movablecore", "1T", "it takes bytes, or 64M and the like"),
    ("zswap.max_pool_percent", "0", "it takes a number from 1"),
    ("khugepaged.max_ptes_none", "-1", "it takes a number"),
    ("khugepaged.max_ptes_none", "512", "it takes at most 511"),
    ("khugepaged.pages_to_scan", "4294967296", "it takes at most 4294967295"),
    ("zswap.max_pool_percent", "200", "it takes at most 100"),
    ("zswap.accept_threshold_percent", "101", "it takes at most 100"),
    ("mm.fault_around_bytes", str(513 << 12), "it takes at most"),
    ("mm.movablecore", "900G", "the host has 65536K of RAM in all"),
    ("mm.movablecore", "64M", "the host has 65536K of RAM in all"),
    ("kvm.tdp_mmu", "force", "it takes Y or N"),
    ("kvm.nx_huge_pages", "bool", "it takes Y|N|force|never"),
])
def test_what_no_model_could_read_is_refused_in_one_line(name: str, value: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_params({name: value}, RAM)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_default_is_a_value_that_may_be_given() -> None:
    check_params({name: param.default for name, param in PARAMS.items()}, RAM)


@pytest.mark.parametrize(("name", "value"), [
    ("kvm.nx_huge_pages", "force"), ("kvm.nx_huge_pages", "on"), ("mm.movablecore", "63M"),
    ("mm.fault_around_bytes", "5000"), ("mm.fault_around_bytes", str(2 << 20)),
])
def test_what_the_kernel_takes_is_taken(name: str, value: str) -> None:
    check_params({name: value}, RAM)

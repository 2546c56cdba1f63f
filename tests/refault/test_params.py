"""Module parameters are refused where no model could read them, in one line that says what would do."""

from __future__ import annotations

import pytest

from refault.errors import UsageError
from refault.params import PARAMS, check_params


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
])
def test_what_no_model_could_read_is_refused_in_one_line(name: str, value: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_params({name: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_default_is_a_value_that_may_be_given() -> None:
    check_params({name: param.default for name, param in PARAMS.items()})

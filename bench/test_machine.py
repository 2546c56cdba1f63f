"""What the machine costs: a first touch, a refault, a compiled loop, a start."""

from __future__ import annotations

from typing import Any

import pytest

import refault


def _run(payload: str, *words: str, **options: Any) -> refault.VM:
    vm = refault.VM(**options)
    vm.load(payload, *words)
    stop = vm.run()
    assert (stop.kind, stop.status) == ("exit", 0), vm.serial
    return vm


def test_machine_made_and_closed(benchmark: Any) -> None:
    benchmark.pedantic(lambda: refault.VM(memory="64M").close(), rounds=5, warmup_rounds=1)


def test_first_touch(benchmark: Any) -> None:
    benchmark.pedantic(lambda: _run("first-touch").close(), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("check", [False, True], ids=["unchecked", "checked"])
def test_swap_storm(benchmark: Any, check: bool) -> None:
    options = {"memory": "16M", "host_ram": "8M", "check": check}
    benchmark.pedantic(lambda: _run("swap-storm", "mib=10", **options).close(), rounds=3, warmup_rounds=1)

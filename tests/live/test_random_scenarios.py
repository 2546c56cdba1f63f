"""A few seeds of the random scenarios do the same on this machine's KVM as here. `make live`, as root."""

from __future__ import annotations

import pytest

from refault.errors import UsageError
from refault.scenarios.live.tracefs import TRACEFS
from tests.live.random_scenarios import Case, run
from tests.live.random_steps import GROUPS, plan
from tests.live.test_live import REASON

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.mark.parametrize("group", GROUPS)
def test_a_random_scenario_is_the_same_on_this_machine(group: str) -> None:
    try:
        result = run(Case(group, plan(group, 20)))
    except UsageError as exc:
        pytest.skip(str(exc))
    assert result.good, "\n".join(result.why)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_breaks_leaves_no_trace_instance(error: type[BaseException]) -> None:
    from refault.scenarios.api import Scenario
    from refault.scenarios.live.backend import run_on_kvm

    def breaks(s: Scenario) -> None:
        s.fork()
        s.fork()
        raise error

    before = set((TRACEFS / "instances").iterdir())
    with pytest.raises(error):
        run_on_kvm(breaks, swap=None)
    assert set((TRACEFS / "instances").iterdir()) <= before


def test_a_result_that_is_longer_than_a_line_of_the_trace_is_whole() -> None:
    from refault.scenarios.api import Scenario
    from refault.scenarios.live.backend import run_on_kvm

    def everything(s: Scenario) -> None:
        s.manual_protect(3)
        s.log_dirty(True)
        s.get_dirty_log()

    assert run_on_kvm(everything, swap=None).lines[-1] == f"<< GET_DIRTY_LOG: {list(range(2048))}"

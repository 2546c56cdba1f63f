"""Settings of the property tests.

REFAULT_STEPS    steps of the guest memory machine over all its variants (5,000; `make soak` sets more)
REFAULT_SEEDS    the seeds it is run with ("1")
REFAULT_PROGRESS set by `make soak`: say on stderr how far it is
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, Verbosity, settings

settings.register_profile(
    "machine",
    database=None,
    deadline=None,
    derandomize=False,  # the seed is in the test's name
    phases=(Phase.generate, Phase.shrink),
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.normal,
)

"""Regions and kdamond: sample, aggregate, merge what is alike, split what may not be.

Source of truth: mm/damon/core.c (kdamond_fn, kdamond_merge_regions, damon_merge_two_regions,
kdamond_split_regions, kdamond_reset_aggregated, damon_start, damon_stop); Linux 6.18.

In each sampling interval one address of each region is made old at the beginning and asked at the end;
`nr_accesses` counts the intervals of an aggregation in which it was young. Regions that differ by no
more than a tenth of the highest count are merged, and then every region is split at random, so that
their number stays between the bounds while their borders move to where use differs.

Times are nanoseconds. Randomness comes from the host's seed.

Not modelled: schemes (DAMOS), several targets, interval tuning, the moving sum nr_accesses_bp,
regions that follow the VMAs of the target (they are given and stay).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from errno import EBUSY, EINVAL, EPERM
from typing import TYPE_CHECKING, Protocol

from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import WaitQueue

if TYPE_CHECKING:
    from host_mm.host import HostMm
    from host_mm.kernel.sched import Task

__all__ = ["DAMON_MIN_REGION", "DamonCtx", "DamonOperations", "DamonRegion", "damon_start", "damon_stop"]

DAMON_MIN_REGION = 4096


class DamonRegion:
    """struct damon_region: [start, end) and how often it was seen used in this and the last aggregation."""

    __slots__ = ("age", "end", "last_nr_accesses", "nr_accesses", "sampling_addr", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.sampling_addr = 0
        self.nr_accesses = self.last_nr_accesses = self.age = 0

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.end - self.start

    def __repr__(self) -> str:
        return f"<DamonRegion {self.start:#x}-{self.end:#x} accesses {self.nr_accesses} age {self.age}>"


class DamonOperations(Protocol):
    """struct damon_operations: what the regions' addresses mean."""

    def mkold(self, region: DamonRegion) -> None:
        """Make the page at the region's sampling address old."""
        ...

    def check_access(self, region: DamonRegion, first: bool) -> bool:
        """Whether that page was used since; `first`: it is the first region of this pass."""
        ...


class DamonCtx:
    """struct damon_ctx: one set of regions and what watches it. `regions` is sorted by address.

    `on_aggregation` is called with the regions at the end of each aggregation, before they are reset.
    KernelError(EINVAL) for intervals or bounds that make no sense.
    """

    __slots__ = (
        "aggr_interval", "host", "kdamond", "last_nr_regions", "max_nr_regions", "min_nr_regions",
        "on_aggregation", "ops", "regions", "rng", "sample_interval", "stopping", "wait",
    )

    def __init__(
        self, host: HostMm, ops: DamonOperations, regions: list[tuple[int, int]], *,
        sample_interval: int = 5_000_000, aggr_interval: int = 100_000_000,
        min_nr_regions: int = 10, max_nr_regions: int = 1000,
    ) -> None:
        if min_nr_regions < 3 or min_nr_regions > max_nr_regions:
            raise KernelError(EINVAL, f"{min_nr_regions} to {max_nr_regions} regions: want 3 or more")
        if sample_interval <= 0 or sample_interval > aggr_interval:
            raise KernelError(EINVAL, f"{sample_interval} ns a sample, {aggr_interval} ns an aggregation")
        if not regions or any(start >= end or (start | end) % DAMON_MIN_REGION for start, end in regions):
            raise KernelError(EINVAL, "a region is a non-empty range of whole pages")
        self.host = host
        self.ops = ops
        self.regions = [DamonRegion(start, end) for start, end in sorted(regions)]
        self.sample_interval = sample_interval
        self.aggr_interval = aggr_interval
        self.min_nr_regions = min_nr_regions
        self.max_nr_regions = max_nr_regions
        self.last_nr_regions = 0
        self.on_aggregation: Callable[[list[DamonRegion]], None] | None = None
        self.rng = random.Random(f"damon {host.seed}")
        self.kdamond: Task | None = None
        self.stopping = False
        self.wait = WaitQueue(host.sched, "kdamond_stop")

    # -- one interval -------------------------------------------------------------------------

    def prepare_access_checks(self) -> None:
        """Choose an address in each region and make it old."""
        for region in self.regions:
            region.sampling_addr = self.rng.randrange(region.start, region.end)
            self.ops.mkold(region)

    def check_accesses(self) -> int:
        """Count the regions that were used; the highest count."""
        highest = 0
        for number, region in enumerate(self.regions):
            if self.ops.check_access(region, number == 0):
                region.nr_accesses += 1
            highest = max(highest, region.nr_accesses)
        return highest

    # -- one aggregation ----------------------------------------------------------------------

    def _sz_limit(self) -> int:
        total = sum(region.size for region in self.regions)
        return max(total // self.min_nr_regions, DAMON_MIN_REGION)

    def merge_regions(self, threshold: int, sz_limit: int) -> None:
        """Merge neighbours that differ by no more than `threshold`, harder while there are too many."""
        most = self.aggr_interval // self.sample_interval
        while True:
            self._merge_once(threshold, sz_limit)
            threshold = max(1, threshold * 2)
            if len(self.regions) <= self.max_nr_regions or threshold // 2 >= most:
                return

    def _merge_once(self, threshold: int, sz_limit: int) -> None:
        kept: list[DamonRegion] = []
        for region in self.regions:
            changed = abs(region.nr_accesses - region.last_nr_accesses) > threshold
            if changed or (region.nr_accesses == 0) != (region.last_nr_accesses == 0):
                region.age = 0
            else:
                region.age += 1
            left = kept[-1] if kept else None
            if (
                left is not None and left.end == region.start
                and abs(left.nr_accesses - region.nr_accesses) <= threshold
                and left.size + region.size <= sz_limit
            ):
                _merge_two(left, region)
            else:
                kept.append(region)
        self.regions = kept

    def reset_aggregated(self) -> None:
        """A new aggregation begins."""
        for region in self.regions:
            region.last_nr_accesses, region.nr_accesses = region.nr_accesses, 0

    def split_regions(self) -> None:
        """Split every region at random unless there are too many already."""
        nr = len(self.regions)
        if nr > self.max_nr_regions // 2:
            return
        pieces = 3 if self.last_nr_regions == nr and nr < self.max_nr_regions // 3 else 2
        split: list[DamonRegion] = []
        for region in self.regions:
            split += self._split(region, pieces)
        self.regions = split
        self.last_nr_regions = nr

    def _split(self, region: DamonRegion, pieces: int) -> list[DamonRegion]:
        parts: list[DamonRegion] = []
        for _ in range(pieces - 1):
            size = region.size
            if size <= 2 * DAMON_MIN_REGION:
                break
            left = self.rng.randrange(1, 10) * size // 10 // DAMON_MIN_REGION * DAMON_MIN_REGION
            if not left:
                continue
            new = DamonRegion(region.start + left, region.end)
            new.age, new.last_nr_accesses = region.age, region.last_nr_accesses
            new.nr_accesses = region.nr_accesses
            region.end = new.start
            parts.insert(0, new)
        return [region, *parts]

    # -- the task -----------------------------------------------------------------------------

    def kdamond_fn(self) -> None:
        """The body of the task; ends at the first interval that begins after damon_stop."""
        sched = self.host.sched
        sz_limit = self._sz_limit()
        per_aggregation = max(self.aggr_interval // self.sample_interval, 1)
        passed, following = 0, per_aggregation
        while not self.stopping:
            self.prepare_access_checks()
            sched.sleep(self.sample_interval)
            passed += 1
            highest = self.check_accesses()
            if passed >= following:
                following += per_aggregation
                self.merge_regions(highest // 10, sz_limit)
                if self.on_aggregation is not None:
                    self.on_aggregation(self.regions)
                self.reset_aggregated()
                self.split_regions()
        self.kdamond = None
        self.wait.wake_all()


def _merge_two(left: DamonRegion, right: DamonRegion) -> None:
    both = left.size + right.size
    left.nr_accesses = (left.nr_accesses * left.size + right.nr_accesses * right.size) // both
    left.age = (left.age * left.size + right.age * right.size) // both
    left.end = right.end


def damon_start(ctx: DamonCtx) -> None:
    """Start kdamond. KernelError(EBUSY) if it runs."""
    if ctx.kdamond is not None:
        raise KernelError(EBUSY, "this context is being monitored")
    ctx.stopping = False
    ctx.kdamond = ctx.host.sched.spawn("kdamond.0", ctx.kdamond_fn)


def damon_stop(ctx: DamonCtx) -> None:
    """Ask kdamond to end and wait until it has. KernelError(EPERM) if it does not run."""
    if ctx.kdamond is None:
        raise KernelError(EPERM, "this context is not being monitored")
    ctx.stopping = True
    ctx.wait.wait_event(lambda: ctx.kdamond is None)

"""Random sequences of mm operations keep the bytes that an oracle of plain dicts expects.

After each sequence: every reference is accounted for (truths.audit), and when all processes have
exited every frame is free again.
"""

from __future__ import annotations

import random
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import pytest

from host_mm.fork import exit_process, fork_process
from host_mm.host import HostMm
from host_mm.kernel.errors import KernelError
from host_mm.kernel.sched import RandomStrategy
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.mlock import do_mlock, do_munlockall
from host_mm.mmap import MAP_FIXED, PROT_READ, do_mmap, do_munmap
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.mprotect import do_mprotect
from host_mm.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, do_mremap
from host_mm.process import Process
from host_mm.profile import LINUX_5_10, LINUX_6_18, MmProfile
from host_mm.task_mmu import clear_refs_write
from host_mm.truths import audit
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, Recorder, make_host

BASE = 0x7F0000000000
WINDOW = 1100
"""Pages: a little more than two level-1 tables."""


@dataclass
class Model:
    """What one process should see: rights by page (absent: unmapped) and the first 8 bytes."""

    process: Process
    prot: dict[int, int] = field(default_factory=dict)
    data: dict[int, int] = field(default_factory=dict)


class Machine:
    """The host under test beside its oracle."""

    def __init__(self, host: HostMm, seed: int) -> None:
        self.host = host
        self.rng = random.Random(seed)
        self.models = [Model(host.create_process("first"))]
        self.notifier = Recorder()
        mmu_notifier_register(self.notifier, self.models[0].process.mm)
        self.stamp = 0

    def span(self) -> tuple[int, int]:
        """A page range in the window."""
        first = self.rng.randrange(WINDOW)
        return first, min(WINDOW, first + self.rng.choice((1, 1, 2, 5, 40, 600)))

    def mmap(self, model: Model) -> None:
        first, last = self.span()
        do_mmap(model.process.mm, BASE + first * PAGE, (last - first) * PAGE, RW, ANON | MAP_FIXED)
        for page in range(first, last):
            model.prot[page] = RW
            model.data.pop(page, None)

    def munmap(self, model: Model) -> None:
        first, last = self.span()
        do_munmap(model.process.mm, BASE + first * PAGE, (last - first) * PAGE)
        for page in range(first, last):
            model.prot.pop(page, None)
            model.data.pop(page, None)

    def mprotect(self, model: Model) -> None:
        first, last = self.span()
        prot = self.rng.choice((RW, RW, PROT_READ, 0))
        hole = next((page for page in range(first, last) if page not in model.prot), last)
        with pytest.raises(KernelError, match="ENOMEM") if hole < last else nullcontext():
            do_mprotect(model.process.mm, BASE + first * PAGE, (last - first) * PAGE, prot)
        for page in range(first, hole):
            model.prot[page] = prot

    def dontneed(self, model: Model) -> None:
        first, last = self.span()
        self._advise(model, first, last, MADV_DONTNEED)
        for page in range(first, last):
            model.data.pop(page, None)

    def pageout(self, model: Model) -> None:
        first, last = self.span()
        self._advise(model, first, last, MADV_PAGEOUT)

    def _advise(self, model: Model, first: int, last: int, advice: int) -> None:
        holes = any(page not in model.prot for page in range(first, last))
        with pytest.raises(KernelError, match="ENOMEM") if holes else nullcontext():
            do_madvise(model.process.mm, BASE + first * PAGE, (last - first) * PAGE, advice)

    def mlock(self, model: Model) -> None:
        first, last = self.span()
        last = min(last, first + 64)
        with suppress(KernelError):
            do_mlock(model.process.mm, BASE + first * PAGE, (last - first) * PAGE, self.rng.randrange(2))
        for page in range(first, last):
            if self.rng.random() < 0.1:
                self._read_page(model, page)
        do_munlockall(model.process.mm)

    def mremap(self, model: Model) -> None:
        """Move a range within the window, perhaps leaving it mapped; it may hold several VMAs and holes."""
        (first, last), target = self.span(), self.rng.randrange(WINDOW)
        if self.rng.random() < 0.5:
            # From one table's 2 MiB to the other's: where both places allow, the table itself moves.
            last = self.rng.choice((512, 1024))
            first = last - 512 + self.rng.choice((0, 0, 100))
            target = (first + 512) % 1024
        target = min(target, WINDOW - (last - first))
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | self.rng.choice((0, 0, MREMAP_DONTUNMAP))
        size = (last - first) * PAGE
        overlap = first < target + last - first and target < last
        bad = overlap or first not in model.prot
        with pytest.raises(KernelError) if bad else nullcontext():
            do_mremap(model.process.mm, BASE + first * PAGE, size, size, flags, BASE + target * PAGE)
        if bad:
            return
        for page in range(first, last):
            to = page + target - first
            if page not in model.prot:
                # The holes between the mappings that move keep what is there.
                continue
            model.prot[to] = model.prot[page]
            model.data.pop(to, None)
            if page in model.data:
                model.data[to] = model.data.pop(page)
            if not flags & MREMAP_DONTUNMAP:
                del model.prot[page]

    def resize(self, model: Model) -> None:
        """Shrink, or grow in place, a range of the window."""
        first, last = self.span()
        new = max(1, last - first + self.rng.choice((-5, -1, 1, 5, 40)))
        new = min(new, WINDOW - first)
        with suppress(KernelError):
            at = do_mremap(model.process.mm, BASE + first * PAGE, (last - first) * PAGE, new * PAGE)
            assert at == BASE + first * PAGE
            for page in range(first + new, last):
                model.prot.pop(page, None)
                model.data.pop(page, None)
            for page in range(last, first + new):
                assert page not in model.prot
                model.prot[page] = model.prot[first]

    def write(self, model: Model) -> None:
        for _ in range(self.rng.choice((1, 8))):
            page = self._page(model)
            self.stamp += 1
            try:
                copy_to_user(model.process, BASE + page * PAGE + 64, self.stamp.to_bytes(8, "little"))
                assert model.prot.get(page, 0) == RW
                model.data[page] = self.stamp
            except KernelError:
                assert model.prot.get(page, 0) != RW

    def read(self, model: Model) -> None:
        self._read_page(model, self._page(model))

    def _page(self, model: Model) -> int:
        if model.prot and self.rng.random() < 0.9:
            return self.rng.choice(list(model.prot))
        return self.rng.randrange(WINDOW)

    def _read_page(self, model: Model, page: int) -> None:
        try:
            seen = copy_from_user(model.process, BASE + page * PAGE + 64, 8)
            assert model.prot.get(page, 0)
            assert int.from_bytes(seen, "little") == model.data.get(page, 0), f"page {page}"
        except KernelError:
            assert not model.prot.get(page, 0)

    def fork(self, model: Model) -> None:
        if len(self.models) < 4:
            self.models.append(Model(fork_process(model.process), dict(model.prot), dict(model.data)))

    def exit(self, model: Model) -> None:
        if len(self.models) > 1 and model is not self.models[0]:
            self.models.remove(model)
            exit_process(model.process)

    def soft_dirty(self, model: Model) -> None:
        clear_refs_write(model.process.mm, 4)

    def step(self) -> None:
        """One random operation of one random process."""
        model = self.rng.choice(self.models)
        ops = (
            self.mmap, self.munmap, self.mprotect, self.dontneed, self.pageout, self.fork, self.exit,
            self.soft_dirty, self.mlock, self.mremap, self.mremap, self.resize,
            *[self.write] * 8, *[self.read] * 6,
        )
        self.rng.choice(ops)(model)

    def finish(self) -> None:
        """Compare everything, then end all processes and look for leaks."""
        for model in self.models:
            for page in range(WINDOW):
                self._read_page(model, page)
        audit(self.host)
        assert self.notifier.depth == 0
        for model in self.models:
            exit_process(model.process)
        self.host.lru.lru_add_drain_all()


@pytest.mark.parametrize("profile", [LINUX_6_18, LINUX_5_10], ids=lambda profile: profile.name)
@pytest.mark.parametrize("seed", range(6))
def test_bytes_follow_the_oracle_and_no_frame_leaks(seed: int, profile: MmProfile) -> None:
    host = make_host(ram=12 << 20, swap=8 << 20, profile=profile)
    machine = Machine(host, seed)
    held = machine.models[0].process.mm

    def body() -> None:
        for count in range(220):
            machine.step()
            if count % 20 == 0:
                audit(host)
        machine.finish()

    host.sched.run_task("test", body)
    # The notifier still holds the struct and with it the page directory.
    assert held.mm_count == 1
    held.mmdrop()
    host.sched.run_until(lambda: not host.swap_device.inflight)
    audit(host)
    # Folios that lost their last entry under writeback stay in the swap cache until reclaim meets them.
    for nid in range(len(host.nodes)):
        host.sched.run_task("reclaim", lambda nid=nid: host.reclaim(0, nid))
    assert host.allocator.nr_free_pages() == sum(zone.managed for zone in host.zones)
    assert host.swap is not None
    assert host.swap.inuse_pages == 0


@pytest.mark.parametrize("seed", range(4))
def test_processes_that_interleave_at_random_keep_their_bytes(seed: int) -> None:
    host = make_host(ram=12 << 20, swap=8 << 20)
    host.sched.lockdep = {}
    machine = Machine(host, seed)
    for _ in range(2):
        machine.mmap(machine.models[0])
        machine.write(machine.models[0])
        machine.fork(machine.models[0])
    host.sched.set_strategy(RandomStrategy(seed))
    left = len(machine.models)

    def body(model: Model) -> None:
        nonlocal left
        own = Machine.__new__(Machine)
        own.__dict__.update(machine.__dict__, rng=random.Random(seed * 10 + model.process.pid))
        ops = (
            own.mmap, own.mprotect, own.dontneed, own.pageout, own.mremap, own.mlock,
            *[own.write] * 6, *[own.read] * 6,
        )
        for _ in range(120):
            own.rng.choice(ops)(model)
        left -= 1

    for model in machine.models:
        host.sched.spawn(f"task{model.process.pid}", lambda model=model: body(model))
    host.sched.run_until(lambda: left == 0)
    host.sched.run_task("finish", machine.finish)

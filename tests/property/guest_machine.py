"""A guest, its host, and the oracle beside them, as a hypothesis state machine.

Each rule does one thing to the machine and to the oracle: a guest access (load, store,
read-modify-write, fetch; 8 bytes, also across a page boundary) or a host operation. Rules whose
name ends in `_beside` run a host operation in a task of its own while the guest runs.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import emu.operations  # noqa: F401  (fills the registry)
from emu.hostops import LEAVES_EITHER, LEAVES_GIVEN, LEAVES_SAME, LEAVES_ZEROS, OPERATIONS, perform
from host_mm.kernel.errors import KernelError
from refault.scenarios.api import DATA_GPA
from refault.scenarios.emulator import EmulatorBackend
from tests.property.oracle import HOLE, PAGE, Memory

__all__ = ["PAGES", "GuestMachine"]

PAGES = 160
U64 = (1 << 64) - 1
SLOT_GPAS = [0x2000_0000 + n * 0x10_0000 for n in range(4)]
SLOT_PAGES = 4
OWN_RULES = {"clear_dirty", "get_dirty", "mlock", "munlock", "protect", "slot_create"}
"""Operations on a range that have a rule of their own below, as more than bytes depends on them."""
SHARED_ONLY = {"fadvise_dontneed", "gmem_punch", "punch_hole", "remove", "uffd_minor"}
"""Operations that only memory of a file can have."""
WANT_ANOTHER = {
    "contig_alloc", "file_create", "gmem_create", "hugetlb_create", "memfd_create", "pfnmap_create",
    "soft_offline", "unpin",
}
"""Operations that make memory of their own, take frames away or undo another one."""
RANGES = sorted(
    name for name, op in OPERATIONS.items()
    if op.takes_a_range and op.leaves != LEAVES_GIVEN and name not in OWN_RULES | SHARED_ONLY | WANT_ANOTHER
)
TRANSPARENT = tuple(name for name in RANGES if OPERATIONS[name].leaves == LEAVES_SAME)
BESIDE = (*TRANSPARENT, "reclaim", "clear_refs")
REFUSALS = (errno.EBUSY, errno.ENOMEM, errno.EAGAIN, errno.ENOSYS, errno.ENOTTY)
TOO_SMALL = {"collapse": (errno.EINVAL,)}
"""What a piece may be refused with that no huge page fits into, or that is in pieces itself."""
ACCESSES = ("load", "store", "read_modify_write")

page_numbers = st.one_of(st.integers(0, 7), st.integers(0, PAGES - 2))
places = st.builds(
    lambda page, at: page * PAGE + at,
    page_numbers, st.sampled_from([0, 8, 0x7F8, 0xFF0, 0xFF8, *range(0xFF9, 0x1000)]),
)
values = st.one_of(st.integers(1, 255), st.integers(0, U64))
lengths = st.sampled_from([1, 1, 2, 3, 8, 16, 64])
spans = st.builds(lambda first, count: (first, min(count, PAGES - first)), page_numbers, lengths)
u64 = struct.Struct("<Q")


class Slot:
    """A slot of slot_create: where it shows its memory, and the bytes."""

    def __init__(self, number: int, gpa: int, memory: Memory) -> None:
        self.number = number
        self.gpa = gpa
        self.deleted = False
        self.memory = memory


class GuestMachine(RuleBasedStateMachine):
    """The variants set these; `seen` adds up what happened over all examples."""

    PARAMS: dict[str, str] = {}
    HOST_RAM = "64M"
    MMU = "ept"
    PROFILE = "linux-6.18"
    seen: Counter[str] = Counter()

    slots = Bundle("slots")
    code = Bundle("code")

    @initialize(seed=st.integers(0, 999), manual=st.booleans())
    def start(self, seed: int, manual: bool) -> None:
        self.backend = EmulatorBackend(
            seed=seed, check=True, params=dict(self.PARAMS), host_ram=self.HOST_RAM, swap="16M",
            profile=self.PROFILE, mmu=self.MMU,
        )
        self.board = self.backend.board
        self.memory = Memory(PAGES, self.read_page)
        self.manual = manual
        if manual:
            self.board.kvm.enable_manual_dirty_log()
        self.child: list[bytearray | None] | None = None
        self.logging = False
        self.written: set[int] = set()
        self.gpas = list(SLOT_GPAS)

    def teardown(self) -> None:
        if not hasattr(self, "backend"):
            return
        if sys.exc_info()[0] is not None:
            self.backend.vm.abandon()
            return
        self.unprotect()
        for number, page in enumerate(self.memory.pages):
            if page.prot != HOLE:
                self.memory.check(number * PAGE, self.read_page(number))
        vmstat = self.board.host.mm.vmstat
        for name in ("pswpin", "pswpout", "pgmigrate_success", "pgsteal_kswapd", "pgsteal_direct"):
            self.seen[name] += vmstat[name]
        self.seen["retries"] += sum(e.name == "fault_retry" for e in self.backend.events)
        self.backend.close()

    # -- the machine ----------------------------------------------------------------------------

    def host(self, call: Callable[[], Any]) -> Any:
        return self.board.host.sched.run_task("vmm", call)

    def op(self, name: str, *args: int) -> int:
        result: int = self.host(lambda: perform(self.board, name, *args))
        return result

    def read_page(self, number: int) -> bytes:
        vmm, hva = self.board.vmm, self.backend.data_hva + number * PAGE
        data: bytes = self.host(lambda: vmm.read(hva, PAGE))
        return data

    def ready(self, span: tuple[int, int]) -> bool:
        """Whether the span is all mapped; madvise over a hole is another test's matter."""
        first, count = span
        return all(page.prot != HOLE for page in self.memory.pages[first : first + count])

    def unprotected(self, span: tuple[int, int]) -> bool:
        return all(page.prot == 3 for page in self.memory.pages[span[0] : sum(span)])

    def wrote(self, offset: int) -> None:
        self.written.update((offset // PAGE, (offset + 7) // PAGE))

    # -- the guest ------------------------------------------------------------------------------

    @rule(at=places)
    def load(self, at: int) -> None:
        allowed = self.memory.guest_allows(at, 8, 1)
        got = self.backend.load(at)
        if not allowed:
            assert got == "EFAULT"
        else:
            self.memory.check(at, u64.pack(got))

    @rule(at=places, value=values)
    def store(self, at: int, value: int) -> None:
        allowed = self.memory.guest_allows(at, 8, 2)
        assert self.backend.store(at, value) == ("ok" if allowed else "EFAULT")
        if allowed:
            self.memory.write(at, 8, lambda old: u64.pack(value))
            self.wrote(at)

    @rule(at=places)
    def read_modify_write(self, at: int) -> None:
        allowed = self.memory.guest_allows(at, 8, 2)
        assert self.backend.read_modify_write(at) == ("ok" if allowed else "EFAULT")
        if allowed:
            self.memory.write(at, 8, lambda old: u64.pack((u64.unpack(old)[0] + 1) & U64))
            self.wrote(at)

    @rule(span=spans, value=st.integers(1, U64))
    def store_to_many_pages(self, span: tuple[int, int], value: int) -> None:
        for page in range(span[0], sum(span)):
            self.store(page * PAGE + 0x100, value)

    @rule(target=code, at=places, value=st.integers(0, 0xFFFF_FFFF), guest=st.booleans())
    def write_code(self, at: int, value: int, guest: bool) -> int:
        word = u64.unpack(b"\xb8" + struct.pack("<I", value) + b"\xe6\xf4\x90")[0]  # mov eax,; out 0xf4,al
        if guest:
            self.store(at, word)
        else:
            self.host_write(at, word)
        return at

    @rule(at=code)
    def fetch(self, at: int) -> None:
        parts = list(self.memory.parts(at, 8))
        word = b"".join(page.data[a:b] for page, a, b in parts)
        if any(page.maybe_zero for page, _, _ in parts) or word[0] != 0xB8 or word[5:] != b"\xe6\xf4\x90":
            return
        allowed = self.memory.guest_allows(at, 8, 1)
        result = self.backend.fetch(at)
        assert result == ("ok" if allowed else "EFAULT")
        if allowed:
            assert self.board.cpu.get_reg(self.board.vcpus[0], "rax") == struct.unpack("<I", word[1:5])[0]

    # -- the VMM --------------------------------------------------------------------------------

    @rule(at=places)
    def host_read(self, at: int) -> None:
        got = self.backend.host_read(at)
        if not self.memory.allows(at, 8, 1):
            assert got == "errno EFAULT"
        else:
            self.memory.check(at, u64.pack(got))

    @rule(at=places, value=values)
    def host_write(self, at: int, value: int) -> None:
        at = min(at, at // PAGE * PAGE + PAGE - 8)
        if not self.memory.allows(at, 8, 2):
            assert self.backend.host_write(at, value) == "errno EFAULT"
            return
        assert self.backend.host_write(at, value) is None
        self.memory.write(at, 8, lambda old: u64.pack(value))

    @rule(name=st.sampled_from(RANGES), span=spans)
    def operation_on_a_range(self, name: str, span: tuple[int, int]) -> None:
        if not self.ready(span):
            return
        try:
            self.op(name, DATA_GPA + span[0] * PAGE, span[1])
        except KernelError as exc:
            # A page of the range without the rights that the operation wants is no fault of either.
            rights = () if self.unprotected(span) else (errno.EFAULT, errno.EACCES, errno.EINVAL)
            allowed = (*REFUSALS, *rights, *TOO_SMALL.get(name, ()))
            if exc.errno not in allowed:
                raise
        self.seen[name] += 1
        leaves = OPERATIONS[name].leaves
        for page in self.memory.pages[span[0] : sum(span)]:
            if leaves == LEAVES_ZEROS:
                page.clear()
            elif leaves == LEAVES_EITHER:
                page.maybe_zero = True

    @rule(page=page_numbers, name=st.sampled_from(["migrate", "age", "mremap"]))
    def mlock(self, page: int, name: str) -> None:
        """Two locked pages in the middle of things."""
        if not all(p.prot == 3 and not p.maybe_zero for p in self.memory.pages[page : page + 2]):
            return
        gpa = DATA_GPA + page * PAGE
        self.op("mlock", gpa, 2)
        self.op("reclaim", 8)
        self.op(name, gpa, 2)
        self.op("munlock", gpa, 2)

    @rule(pages=st.sampled_from([1, 8, 64]))
    def reclaim(self, pages: int) -> None:
        self.op("reclaim", pages)

    @rule(kind=st.sampled_from([1, 4]))
    def clear_refs(self, kind: int) -> None:
        self.op("clear_refs", kind)

    # -- beside the guest -----------------------------------------------------------------------

    @rule(
        ops=st.lists(st.tuples(st.sampled_from(BESIDE), spans), min_size=1, max_size=3),
        accesses=st.lists(st.tuples(st.sampled_from(ACCESSES), places), max_size=6),
        value=values,
    )
    def operations_beside(
        self, ops: list[tuple[str, tuple[int, int]]], accesses: list[tuple[str, int]], value: int
    ) -> None:
        sched = self.board.host.sched
        tasks = []
        for name, span in ops:
            args: tuple[int, ...] = (DATA_GPA + span[0] * PAGE, span[1])
            if name in ("reclaim", "clear_refs"):
                args = (4,)
            elif not self.ready(span):
                continue
            tasks.append(sched.spawn(name, lambda name=name, args=args: self.ask_beside(name, args)))
        for kind, at in accesses:
            getattr(self, kind)(at, value) if kind == "store" else getattr(self, kind)(at)
        sched.run_until(lambda: all(task.done for task in tasks))
        for task in tasks:
            if task.error is not None:
                raise task.error

    def ask_beside(self, name: str, args: tuple[int, ...]) -> None:
        """An operation that may find the range as another one has it for the moment."""
        try:
            perform(self.board, name, *args)
        except KernelError as exc:
            if exc.errno not in (*REFUSALS, errno.EFAULT, errno.EACCES, errno.EINVAL):
                raise

    @rule(at=places, value=values)
    def dontneed_beside(self, at: int, value: int) -> None:
        """A load sees the old bytes or zeros."""
        if not self.ready((at // PAGE, 2)):
            return
        board, sched = self.board, self.board.host.sched
        self.host_write(at, value)
        gpa = DATA_GPA + at // PAGE * PAGE
        task = sched.spawn("dontneed", lambda: perform(board, "dontneed", gpa, 2))
        pages = self.memory.pages[at // PAGE : at // PAGE + 2]
        for page in pages:
            page.maybe_zero = True
        self.load(at)
        sched.run_until(lambda: task.done)
        for page in pages:
            page.clear()

    # -- protection and holes -------------------------------------------------------------------

    @rule(span=spans, prot=st.sampled_from([0, 1]))
    def mprotect(self, span: tuple[int, int], prot: int) -> None:
        if self.ready(span):
            assert self.backend.mprotect(span[0] * PAGE, span[1] * PAGE, prot) == 0
            for page in self.memory.pages[span[0] : sum(span)]:
                page.prot = prot

    @rule(span=spans, prot=st.sampled_from([0, 1]))
    def protect(self, span: tuple[int, int], prot: int) -> None:
        if self.ready(span):
            self.op("protect", DATA_GPA + span[0] * PAGE, span[1], prot)
            for number in range(span[0], sum(span)):
                self.memory.pages[number].prot = prot
                self.memory.lifting.append(number)

    @rule()
    def unprotect(self) -> None:
        for number, page in enumerate(self.memory.pages):
            if page.prot not in (3, HOLE):
                assert self.backend.mprotect(number * PAGE, PAGE, 3) == 0
                page.prot = 3

    @precondition(lambda self: not self.memory.lifting)
    @rule(span=spans)
    def munmap(self, span: tuple[int, int]) -> None:
        assert self.backend.munmap(span[0] * PAGE, span[1] * PAGE) == 0
        for page in self.memory.pages[span[0] : sum(span)]:
            page.clear()
            page.prot = HOLE

    @precondition(lambda self: any(page.prot == HOLE for page in self.memory.pages))
    @rule()
    def fill_holes(self) -> None:
        for number, page in enumerate(self.memory.pages):
            if page.prot == HOLE:
                self.backend.mmap_fixed(number * PAGE, PAGE)
                page.prot = 3

    @rule(span=spans)
    def mmap_fixed(self, span: tuple[int, int]) -> None:
        self.backend.mmap_fixed(span[0] * PAGE, span[1] * PAGE)
        for page in self.memory.pages[span[0] : sum(span)]:
            page.clear()
            page.prot = 3

    # -- the child ------------------------------------------------------------------------------

    @precondition(lambda self: self.child is None)
    @rule()
    def fork(self) -> None:
        self.op("fork")
        self.child = [
            None if page.maybe_zero or page.prot in (0, HOLE) else bytearray(page.data)
            for page in self.memory.pages
        ]
        self.child_may_write = {number for number, page in enumerate(self.memory.pages) if page.prot == 3}

    @precondition(lambda self: self.child is not None)
    @rule(page=page_numbers, at=st.sampled_from([0, 8, 0x100, 0x7F8, 0xFF8]))
    def child_read(self, page: int, at: int) -> None:
        assert self.child is not None
        known = self.child[page]
        if known is not None:
            got = self.op("child_read", DATA_GPA + page * PAGE + at, 8)
            assert u64.pack(got) == known[at : at + 8], "what the child reads"

    @precondition(lambda self: self.child is not None)
    @rule(page=page_numbers, value=values)
    def child_write(self, page: int, value: int) -> None:
        assert self.child is not None
        known, child = self.child[page], self.board.child
        assert child is not None
        hva = self.backend.data_hva + page * PAGE
        if known is not None and page in self.child_may_write:
            self.host(lambda: child.write(hva, u64.pack(value)))
            known[:8] = u64.pack(value)

    @precondition(lambda self: self.child is not None)
    @rule()
    def child_exit(self) -> None:
        self.op("child_exit")
        self.child = None

    # -- slots and the dirty log ----------------------------------------------------------------

    @precondition(lambda self: bool(self.gpas))
    @rule(target=slots)
    def slot_create(self) -> Slot:
        gpa = self.gpas.pop()
        number = self.op("slot_create", gpa, SLOT_PAGES)

        def read(page: int) -> bytes:
            hva = self.board.memory.regions[number].hva + page * PAGE
            data: bytes = self.host(lambda: self.board.vmm.read(hva, PAGE))
            return data

        return Slot(number, gpa, Memory(SLOT_PAGES, read))

    @rule(slot=slots)
    def slot_delete_or_restore(self, slot: Slot) -> None:
        self.op("slot_restore" if slot.deleted else "slot_delete", slot.number)
        slot.deleted = not slot.deleted

    @precondition(lambda self: bool(self.gpas))
    @rule(slot=slots)
    def slot_move(self, slot: Slot) -> None:
        if not slot.deleted:
            gpa = self.gpas.pop(0)
            self.op("slot_move", slot.number, gpa)
            self.gpas.append(slot.gpa)
            slot.gpa = gpa

    @rule(slot=slots, page=st.integers(0, SLOT_PAGES - 1), value=values)
    def slot_access(self, slot: Slot, page: int, value: int) -> None:
        """The memory where there is some; where there is none, an exit to the VMM."""
        at = page * PAGE + 0x10
        offset = slot.gpa + at - DATA_GPA
        got = self.backend.load(offset)
        if slot.deleted:
            assert got.startswith("MMIO read of 8 bytes at ")
            self.backend.complete(U64)
            assert self.backend.store(offset, value).startswith("MMIO write of 8 bytes at ")
            self.backend.complete(0)
            return
        slot.memory.check(at, u64.pack(got))
        assert self.backend.store(offset, value) == "ok"
        slot.memory.write(at, 8, lambda old: u64.pack(value))

    @rule(slot=slots, name=st.sampled_from(TRANSPARENT))
    def slot_transparent(self, slot: Slot, name: str) -> None:
        if slot.deleted:
            return
        try:
            self.op(name, slot.gpa, SLOT_PAGES)
        except KernelError as exc:
            if exc.errno not in (*REFUSALS, *TOO_SMALL.get(name, ())):
                raise

    @rule()
    def dirty_log(self) -> None:
        self.logging = not self.logging
        self.op("dirty_log", DATA_GPA, int(self.logging))
        self.written.clear()

    @precondition(lambda self: self.logging)
    @rule(clear=st.integers(0, PAGES // 64))
    def get_dirty(self, clear: int) -> None:
        kvm, rings = self.board.kvm, self.board.dirty_rings
        found = bytearray()
        if rings.entries:
            bits: int = self.host(lambda: rings.take(1))
        else:
            found = self.host(lambda: kvm.get_dirty_log(1))
            bits = int.from_bytes(found, "little")
        missing = [page for page in self.written if not bits >> page & 1]
        assert not missing, f"the guest wrote pages {missing}, the dirty log does not have them"
        if rings.entries or not self.manual:
            self.written.clear()
            return
        self.host(lambda: kvm.clear_dirty_log(1, clear * 64, found[clear * 8 : clear * 8 + 8]))
        self.written -= set(range(clear * 64, clear * 64 + 64))

    # -- instruments ----------------------------------------------------------------------------

    @rule(page=page_numbers, rwx=st.integers(0, 7))
    def ept_set(self, page: int, rwx: int) -> None:
        if self.memory.pages[page].prot == 3:
            self.op("ept_set", DATA_GPA + page * PAGE, rwx)
            # It maps the page as a write fault does.
            self.memory.write(page * PAGE, 1, lambda old: old)

    @rule(on=st.integers(0, 1))
    def ept_ad(self, on: int) -> None:
        # In 5.10 only the D bit says that a page was written since it was aged, and this takes it away.
        if self.PARAMS.get("kvm_intel.eptad") == "0" or self.PROFILE == "linux-5.10":
            return
        # Nor may a CPU be without it that logs by it.
        self.op("ept_ad", on or int("kvm_intel.pml" in self.PARAMS))

    @rule()
    def ept_restore(self) -> None:
        self.op("ept_restore")

    # -- what holds after every step ------------------------------------------------------------

    @invariant()
    def every_truth_holds(self) -> None:
        if hasattr(self, "board"):
            checker = self.board.host.checker
            assert checker is not None
            checker.sweep()

    @rule()
    def audit(self) -> None:
        """The machine at rest: counts are what is there."""
        checker = self.board.host.checker
        assert checker is not None
        assert self.board.kvm.truths is not None
        checker.audit()
        self.board.kvm.truths.quiescent()

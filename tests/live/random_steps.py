"""Random scenarios: what they are made of. Which seed gives which steps is all that is here.

A step is the name of a method of Scenario with its arguments, so that a failing case can be read and
repeated, and any step may be left out of it (see perform).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import msgspec

from refault.scenarios.api import KVM_MEM_READONLY, PAGE, Scenario, pte
from refault.scenarios.guest import INSTRUCTIONS, PDPT, PML4
from refault.scenarios.layout import SLOT0_OFFSET

__all__ = ["GROUPS", "Chance", "Group", "Step", "perform", "plan"]

Step = tuple[str, tuple[Any, ...]]
HUGE = 0x20_0000
SECOND_ROOT, EMPTY_ROOT = 0x9000, 0xA000
"""In slot 0, where nothing else is: a root like the first one, and one that maps nothing."""
HOLE, EXTRA, GMEM = 0x200_0000, 0x300_0000, 0x100_0000
"""Offsets from D: of no slot, of a slot that comes and goes, of the guest_memfd."""
_GUEST = ("ld", "st", "rmw", "insn", "fetch", "st_pte", "complete")
BITS = (0x67, 0x67, 0x65, 0x27, 0x07, 0x05, 0x25, 0x45, 0x63, 0x61)


class Chance:
    """What a word of the vocabulary may ask."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        near = [rng.randrange(40) for _ in range(8)]
        self.pages = near + [512 + rng.randrange(16) for _ in range(4)]
        self.count = 0

    def page(self) -> int:
        """The offset of one of a few pages."""
        return self.rng.choice(self.pages) * PAGE

    def at(self) -> int:
        """The offset of a word in one of them."""
        return self.page() + 8 * self.rng.randrange(500)

    def span(self) -> int:
        """A length in bytes, of whole pages."""
        return self.rng.choice((1, 1, 2, 4, 16)) * PAGE

    def number(self) -> int:
        """A number that was not used yet."""
        self.count += 1
        return self.count

    def one(self, *choices: Any) -> Any:
        """One of them."""
        return self.rng.choice(choices)


Word = Callable[[Chance], list[Step]]


def step(name: str, *args: Any) -> Step:
    return name, args


# -- the guest ----------------------------------------------------------------------------------


def access(c: Chance) -> list[Step]:
    kind = c.one("ld", "st", "ld", "st", "rmw")
    return [step(kind, c.at(), *([c.number()] if kind == "st" else []))]


def instruction(c: Chance) -> list[Step]:
    # Unicorn translates CLFLUSH to nothing, see explained.py.
    name = c.one(*(name for name in INSTRUCTIONS if name != "clflush"))
    return [step("insn", name, c.page())]


def fetch(c: Chance) -> list[Step]:
    at = c.page()
    return [step("poke", at, bytes.fromhex("e6f4")), step("fetch", at)]


def vmm_sets_entry(c: Chance) -> list[Step]:
    steps = [step("gpte", c.page(), c.one(*BITS, 0), c.page())]
    return [*steps, step("load_cr3")] if c.rng.random() < 0.8 else steps


def guest_sets_entry(c: Chance) -> list[Step]:
    bits = c.one(*BITS, 0)
    steps = [step("st_pte", c.page(), pte(c.page(), bits) if bits else 0, f"guest st PTE {c.number()}")]
    return [*steps, step("load_cr3")] if c.rng.random() < 0.6 else steps


def another_root(c: Chance) -> list[Step]:
    there = [*access(c), *guest_sets_entry(c), *access(c)]
    return [step("load_cr3", SECOND_ROOT), *there, step("load_cr3", PML4)]


def root_of_nothing(c: Chance) -> list[Step]:
    return [step("load_cr3", EMPTY_ROOT), *access(c), step("load_cr3", PML4), *access(c)]


def other_vcpu(c: Chance) -> list[Step]:
    return [step("use_vcpu", c.one(0, 1)), *access(c)]


# -- memory of the VMM --------------------------------------------------------------------------


def host(c: Chance) -> list[Step]:
    return c.one([step("hw", c.at(), c.number())], [step("hr", c.at())], [step("fill", c.page(), c.number())])


def advise(c: Chance) -> list[Step]:
    advice = c.one(
        "DONTNEED", "PAGEOUT", "COLD", "FREE", "WILLNEED", "POPULATE_READ", "POPULATE_WRITE", "DONTFORK",
        "DOFORK",
    )
    return [step("madv", c.page(), c.span(), advice)]


def protect(c: Chance) -> list[Step]:
    at, size = c.page(), c.span()
    return [step("mprotect", at, size, c.one(0, 1, 1)), *access(c), step("mprotect", at, size, 3)]


def fork(c: Chance) -> list[Step]:
    return [step(c.one("fork", "child_exit"))]


def remap(c: Chance) -> list[Step]:
    at, size = c.page(), c.span()
    return c.one(
        [step("munmap", at, size, "munmap"), *access(c), step("mmap_fixed", at, size, "mmap")],
        [step("mremap", at, PAGE, (600 + c.number()) * PAGE)],
    )


def lock(c: Chance) -> list[Step]:
    return [step(c.one("mlock", "munlock"), c.page(), c.span())]


def forget(c: Chance) -> list[Step]:
    return [step("clear_refs", c.one(1, 2, 3, 4, 5))]


def pin(c: Chance) -> list[Step]:
    return c.one([step("pin", c.page(), "pin")], [step("unpin", "unpin")])


def move(c: Chance) -> list[Step]:
    at = c.page()
    return c.one([step("move_pages", at, 0, "move_pages")], [step("mbind", at, c.span(), 0, "mbind")])


def huge(c: Chance) -> list[Step]:
    at = c.one(0, HUGE)
    return [step("madv", at, HUGE, c.one("HUGEPAGE", "NOHUGEPAGE", "COLLAPSE"))]


def huge_host(c: Chance) -> list[Step]:
    at = c.one(0, HUGE)
    return c.one(
        [step("madv", at, HUGE, c.one("DONTNEED", "POPULATE_READ", "POPULATE_WRITE"))],
        [step("mprotect", at, HUGE, 1), *access(c), step("mprotect", at, HUGE, 3)],
    )


def merge(c: Chance) -> list[Step]:
    one, two, byte = c.page(), c.page(), c.one(0, 7)
    return [
        step("mergeable", 0, 0x40_0000), step("fill", one, byte), step("fill", two, byte),
        step("ksmd", "ksmd runs"),
    ]


# -- files, userfaultfd, guest_memfd ------------------------------------------------------------


def file(c: Chance) -> list[Step]:
    at, size = c.page(), c.span()
    return c.one(
        [step("punch_hole", at, size, "punch")], [step("fsync")],
        [step("pwrite", at, struct.pack("<Q", c.number()), "pwrite")],
    )


def truncate(c: Chance) -> list[Step]:
    return [step("ftruncate", c.page(), "truncate"), *access(c), step("ftruncate", 0x80_0000, "extend")]


def answer(c: Chance) -> list[Step]:
    at = (700 + c.number()) * PAGE
    copied = [step("uffd_copy", at, "copy"), step("ld", at)]
    return c.one([step("uffd_answer", c.one("copy", "zero"))], copied)


def gmem(c: Chance) -> list[Step]:
    at = c.rng.randrange(16) * PAGE
    return c.one(
        [step("ld", GMEM + at)], [step("st", GMEM + at, c.number())], [step("rmw", GMEM + at)],
        [step("read_guest_memfd", at, "read")], [step("punch_guest_memfd", at, c.span(), "punch")],
    )


# -- KVM's ioctls -------------------------------------------------------------------------------


def log(c: Chance) -> list[Step]:
    return [c.one(step("log_dirty", True), step("log_dirty", True), step("log_dirty", False))]


def get_log(c: Chance) -> list[Step]:
    return [step("get_dirty_log")]


def clear_log(c: Chance) -> list[Step]:
    first = c.one(0, 64, 512)
    pages = tuple(page for page in c.pages if first <= page < first + 64)
    return [step("manual_protect", c.one(1, 1, 3)), step("clear_dirty_log", first, 64, pages)]


def ring(c: Chance) -> list[Step]:
    return c.one([step("dirty_ring", "ring")], [step("reset_dirty_rings")])


def slot(c: Chance) -> list[Step]:
    change = c.one(
        step("delete_slot", "delete"), step("set_slot", "move", 1, 0x80_0000),
        step("set_slot", "read-only", 1, 0, 0x80_0000, 0, KVM_MEM_READONLY),
    )
    asked = [*access(c), *([step("complete")] if c.rng.random() < 0.5 else []), *access(c)]
    return [change, *asked, step("delete_slot", "delete"), step("set_slot", "set")]


def read_only(c: Chance) -> list[Step]:
    anew = step("set_slot", "read-only", 1, 0, 0x80_0000, 0, KVM_MEM_READONLY)
    return [step("delete_slot", "delete"), anew, *access(c), *access(c)]


def extra_slot(c: Chance) -> list[Step]:
    at = EXTRA + c.rng.randrange(16) * PAGE
    there = [step("st", at, c.number()), step("ld", at)]
    return [step("extra_slot", EXTRA), *there, step("delete_slot", "delete slot 2", 2, EXTRA), *there]


def mmio(c: Chance) -> list[Step]:
    at = HOLE + 8 * c.rng.randrange(64)
    asked = c.one(step("ld", at), step("st", at, c.number()), step("rmw", at))
    return [asked, step("complete")] if c.rng.random() < 0.7 else [asked]


# -- groups -------------------------------------------------------------------------------------


class Group(msgspec.Struct, frozen=True):
    """Machines of one kind: `words` of what they do, besides accesses; `first` is never left out."""

    words: tuple[Word, ...]
    machine: dict[str, Any] = {}
    first: tuple[Step, ...] = ()


_ROOTS = (
    step("poke", SLOT0_OFFSET + SECOND_ROOT, struct.pack("<Q", PDPT | 7)),
    step("poke", SLOT0_OFFSET + EMPTY_ROOT, bytes(8)),
)
_MEMORY = (host, advise, advise, protect, fork, fork, remap, lock, forget)
_TABLES = (
    vmm_sets_entry, guest_sets_entry, guest_sets_entry, another_root, root_of_nothing, instruction, fetch,
)
_LOG = (log, log, get_log, get_log, clear_log)
_SLOTS = (slot, extra_slot, mmio)
_POOL = {"hugetlb.nr_hugepages": "10"}

GROUPS: dict[str, Group] = {
    "memory": Group(_MEMORY),
    "tables": Group((*_TABLES, host, advise, fork), first=_ROOTS),
    "log": Group((*_LOG, *_LOG, advise, fork, protect, guest_sets_entry, instruction, slot)),
    "slots": Group((*_SLOTS, *_SLOTS, advise, guest_sets_entry, fork)),
    "read-only": Group((read_only, mmio, host, advise, guest_sets_entry, instruction)),
    "ring": Group((ring, ring, ring, advise, fork, guest_sets_entry), {"dirty_ring": 1024}),
    "vcpus": Group((other_vcpu, other_vcpu, *_TABLES, advise, fork, *_LOG), {"vcpus": 2}, _ROOTS),
    "pins": Group((pin, pin, fork, fork, advise, host)),
    "migrate": Group((move, move, fork, advise, host)),
    "memfd": Group((file, file, truncate, host, advise, protect, fork), {"file": "memfd"}),
    "shared": Group((file, file, host, advise, protect, fork), {"file": "shared", "file_bytes": 0x10000}),
    "private": Group((file, file, host, advise, protect, fork), {"file": "private", "file_bytes": 0x10000}),
    "hugetlb": Group(
        (huge_host, host, fork), {"hugetlb": "private", "guest_pages": "2M", "params": _POOL}
    ),
    "hugetlb-shared": Group(
        (huge_host, host, fork), {"hugetlb": "shared", "guest_pages": "2M", "params": _POOL}
    ),
    "thp": Group(
        (huge, huge_host, advise, protect, fork, host, *_LOG), {"thp": True, "guest_pages": "2M"},
        (step("madv", 0, 0x80_0000, "HUGEPAGE"),),
    ),
    "ksm": Group((merge, fork, host, advise)),
    "uffd": Group((answer, answer, fork), first=(step("uffd", 1), step("uffd_answer", "copy"))),
    "guest-memfd": Group((gmem, gmem, gmem, advise, slot), first=(
        step("guest_memfd", HUGE, 3, "KVM_CREATE_GUEST_MEMFD"), step("mmap_guest_memfd", "mmap"),
        step("set_guest_memfd_slot", 4, GMEM, "slot 4"),
    )),
    "all": Group((*_MEMORY, *_TABLES, *_LOG, *_SLOTS, pin, move), first=_ROOTS),
}


def plan(group: str, seed: int) -> list[Step]:
    """The steps of a seed, without the group's first ones."""
    c = Chance(random.Random(f"{group} {seed}"))
    steps: list[Step] = []
    for _ in range(c.rng.randrange(10, 30)):
        word = access if c.rng.random() < 0.4 else c.rng.choice(GROUPS[group].words)
        steps += word(c)
    return steps


def perform(s: Scenario, steps: list[Step]) -> None:
    """Do them. What has lost the step that it needs is left out, on every machine."""
    children = 0
    extra: int | None = None
    said: Any = None
    for name, args in steps:
        s.settle()
        if name == "extra_slot":
            extra = s.memory_for_slot(HUGE) if extra is None else extra
            s.set_slot("slot 2", 2, args[0], HUGE, extra)
            continue
        children += (name == "fork") - (name == "child_exit")
        if children < 0 or children > 2:
            children = max(0, min(children, 2))
            continue
        # Without an exit to complete, KVM_RUN would go on behind the last instruction, where there is none.
        if name == "complete" and not str(said).startswith("MMIO"):
            continue
        result = getattr(s, name)(*args)
        said = result if name in _GUEST else said

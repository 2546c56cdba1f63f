"""Scenarios of the neighbours that a fault maps, too, as they were run on a real Linux 6.18.

After a 4K leaf KVM goes through its aligned group of eight. Under a guest page table it goes up from the
first entry and stops at the first that cannot be mapped writable without waiting; a guest page of 2 MiB over
small host pages is taken in runs, of which each maps its populated beginning.
"""

from __future__ import annotations

from collections.abc import Iterable

from refault.scenarios import scenario
from refault.scenarios.api import KVM_MEM_LOG_DIRTY_PAGES, PAGE, Scenario

__all__: list[str] = []

_ALL = range(8)
_NX = 1 << 63


def _populate(s: Scenario, at: int, pages: Iterable[int]) -> None:
    for i in pages:
        s.backend.host_write(at + i * PAGE, i + 1)


@scenario(repeats="but for frames")
def prefetch_rule(s: Scenario) -> None:
    """Guest 4K entries: which neighbours are mapped, and with which rights."""
    _populate(s, 0x010000, _ALL)
    s.ld(0x013000, "A all 8 populated, gPTE A+D, load of 3")
    _populate(s, 0x018000, _ALL)
    s.st(0x01B000, 9, "B the same, store to 3")
    _populate(s, 0x020000, _ALL)
    s.ld(0x027000, "C load of 7")
    _populate(s, 0x028000, [0, 1, 3, 4, 5, 6, 7])
    s.ld(0x02C000, "D host hole at 2, load of 4")
    _populate(s, 0x030000, range(1, 8))
    s.ld(0x034000, "E host hole at 0, load of 4")
    for at, bits, note in (
        (0x038000, 0x47, "F gPTE 2 A=0, load of 4"), (0x040000, 0, "G gPTE 2 not present, load of 4"),
        (0x048000, 0x27, "H gPTE 2 A=1 D=0, load of 4"), (0x050000, 0x65, "I gPTE 2 read-only, load of 4"),
        (0x058000, 0x63, "J gPTE 2 supervisor, load of 4"),
    ):
        _populate(s, at, _ALL)
        s.gpte(at + 2 * PAGE, bits)
        s.ld(at + 4 * PAGE, note)
    _prefetch_host_side(s)
    _prefetch_odd_entries(s)


def _prefetch_host_side(s: Scenario) -> None:
    _populate(s, 0x060000, [0, 1, 4])
    s.hr(0x062000)
    s.ld(0x064000, "K host page 2 is the zero page, load of 4")
    _populate(s, 0x068000, _ALL)
    s.ld(0x069000, "L0 all populated")
    s.madv(0x06A000, PAGE, "DONTNEED")
    s.madv(0x06D000, PAGE, "DONTNEED")
    _populate(s, 0x068000, [2])
    s.ld(
        0x06D000,
        "L 0,1,3.. present from before; 2 zapped and repopulated, 5 zapped and empty; load of 5",
    )


def _prefetch_odd_entries(s: Scenario) -> None:
    _populate(s, 0x070000, _ALL)
    s.gpte(0x072000, 0x67, 0x10000)
    s.ld(0x074000, "M gPTE 2 points at gfn of D+0x10000, load of 4")
    _populate(s, 0x078000, _ALL)
    s.gpte(0x07C000, 0x7)
    s.ld(0x07C000, "N only the accessed gPTE has A=0, load of 4")
    _populate(s, 0x080000, [1, 2, 3])
    s.gpte(0x080000, 0x67, 0x8000_0000)
    s.ld(0x082000, "O gPTE 0 points outside every slot, load of 2")
    _populate(s, 0x088000, [0, 2, 3])
    s.ld(0x089000, "P accessed page itself unpopulated, load: zero page")
    _populate(s, 0x090000, [0, 2, 3])
    s.st(0x091000, 9, "Q accessed page itself unpopulated, store")
    _populate(s, 0x098000, _ALL)
    s.gpte(0x09A000, 0x67 | _NX)
    s.ld(0x09C000, "R gPTE 2 has NX (EFER.NXE=0: reserved), load of 4")


@scenario(guest_pages="2M")
def prefetch_rule_2m(s: Scenario) -> None:
    """A guest page of 2 MiB over host pages of 4 KiB: which neighbours are mapped."""
    _populate(s, 0x010000, _ALL)
    s.ld(0x013000, "A all populated, load of 3")
    _populate(s, 0x018000, _ALL)
    s.st(0x01B000, 9, "B store to 3")
    for at, pages, note in (
        (0x028000, [0, 1, 3, 4, 5, 6, 7], "D host hole at 2, load of 4"),
        (0x030000, [1, 2, 3, 4, 5, 6, 7], "E host hole at 0, load of 4"),
        (0x038000, [0, 1, 3, 4, 6, 7], "F host holes at 2 and 5, load of 4"),
    ):
        _populate(s, at, pages)
        s.ld(at + 4 * PAGE, note)
    _populate(s, 0x060000, [0, 1, 4, 5])
    s.hr(0x062000)
    s.ld(0x064000, "K host page 2 zero page, 3 empty, load of 4")
    _populate(s, 0x088000, [0, 2, 3])
    s.ld(0x089000, "P accessed page unpopulated, load")


@scenario(file="shared", file_bytes=0x20000)
def prefetch_file(s: Scenario) -> None:
    """Neighbours that the host may only read are not mapped; after writeback those are all of a file."""
    for i in range(8):
        s.backend.host_read(0x8000 + i * PAGE)
    s.ld(0xB000, "shared file, host-read neighbours")
    for i in range(8):
        s.poke(0x10000 + i * PAGE, b"\1")
    s.ld(0x13000, "shared file, host-written neighbours")
    s.fsync("fsync")
    s.ld(0x13000, "after writeback")
    s.ld(0x14000)


@scenario(slot_flags=KVM_MEM_LOG_DIRTY_PAGES)
def dirty_log_prefetch(s: Scenario) -> None:
    """In a slot that is logged only what the guest cannot write is mapped beside a fault."""
    _populate(s, 0x10000, _ALL)
    s.ld(0x13000, "logged slot, all populated, guest RW gPTEs")
    s.ld(0x14000)
    s.st(0x14000, 1)
    for at, bits, pages, note in (
        (0x18000, 0x65, (0, 1, 5), "gPTEs 0,1,5 read-only"), (0x20000, 0x65, _ALL, "all gPTEs read-only"),
        (0x28000, 0x27, _ALL, "all gPTEs clean (D=0)"),
    ):
        _populate(s, at, _ALL)
        for i in pages:
            s.gpte(at + i * PAGE, bits)
        s.ld(at + 3 * PAGE, note)
    s.st(0x2C000, 1)
    s.log_dirty(False)
    _populate(s, 0x30000, _ALL)
    s.ld(0x33000, "not logged")


@scenario(slot_flags=KVM_MEM_LOG_DIRTY_PAGES, guest_pages="2M")
def dirty_log_prefetch_2m(s: Scenario) -> None:
    """The same under a guest page of 2 MiB: nothing is mapped beside a fault."""
    for i in range(8):
        s.poke(0x10000 + i * PAGE, b"\1")
    s.ld(0x13000, "logged slot, guest 2M")
    s.st(0x14000, 1)

"""The form in which a scenario's event sequences are compared.

Steps with their results, and every `kvm` and `kvmmmu` event in the kernel's words, but for what says where
and when rather than what: times, durations, table addresses and page-frame numbers.

    >> guest st D+0x3000=0x1 COW of zero page             a step begins
    walk addr 10003000 pferr 7 P|W|U                      kvm_mmu_pagetable_walk, of D and above
    kvm_unmap_hva_range [D+0x3000..D+0x4000]              ranges are offsets from D, never clamped
    kvm_mmu_spte_requested: gfn 10003 pfn P1 level 1      frames are numbered in order of appearance
    kvm_mmu_set_spte: gfn 10003 spte P1|e67 (rwxu) level 1    of an SPTE its frame and its low 12 bits
    << guest st D+0x3000=0x1 COW of zero page: ok         the step's result

Left out are ranges that touch no slot (of the VMM's other memory), walks for instruction bytes, which only
an emulator of `out` makes, and events that no KVM with shadow paging fires or that repeat another.
A line `# stats delta: {...}` at the end has what KVM's statistics counted meanwhile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence

import msgspec

from refault.scenarios.layout import DATA_GPA, DATA_SIZE, SLOT0_OFFSET, SLOT0_SIZE

__all__ = [
    "HOST_EVENTS", "IGNORED", "Normalizer", "Recording", "host_side", "parse_recording",
]

HOST_EVENTS = ("kvm_unmap_hva_range", "kvm_age_hva", "kvm_test_age_hva")
IGNORED = frozenset((
    "kvm_entry", "kvm_exit", "kvm_page_fault", "fast_page_fault", "kvm_tdp_mmu_spte_changed",
    "mark_mmio_spte", "kvm_fpu", "kvm_emulate_insn", "kvm_pio", "kvm_update_master_clock",
    "kvm_mmu_paging_element", "kvm_cr", "kvm_msr", "kvm_cpuid", "kvm_eoi", "kvm_set_irq",
    "kvm_vcpu_wakeup", "kvm_halt_poll_ns",
    "kvm_hypercall", "kvm_write_tsc_offset", "kvm_track_tsc", "kvm_apic", "kvm_apicv_inhibit_changed",
    "handle_mmio_page_fault", "check_mmio_spte",
))
"""Events that say nothing about memory, or the same again, or that only another kind of KVM fires."""
_WHOLE = (0, (1 << 64) - 1)

_TIMED = re.compile(r"\s*\d+us (.*)$")
_HEX = re.compile(r"0x([0-9a-f]+)")
_OFFSET = re.compile(r"\[D\+?(-?0x[0-9a-f]+)")
_STATS = "# stats delta: "
_USER_ADDRESS = range(0x7000_0000_0000, 0x8000_0000_0000)


class Recording(msgspec.Struct, frozen=True):
    """One run of a scenario: normalised lines, and what KVM's statistics counted.

    `freed`, where the machine tells it and not in files: how many lines there were when a frame was freed.
    """

    lines: list[str]
    stats: dict[str, int]
    freed: dict[str, int] = {}

    def text(self) -> str:
        """As it is kept in a file."""
        return "\n".join([*self.lines, _STATS + json.dumps(self.stats)]) + "\n"


class Normalizer:
    """Collects `lines` from marks and from events in the kernel's words.

    `data` is the address of D in the process that the ranges are about; `slots` (first, last) are offsets
    from D: ranges that touch none of them are left out. `generation(pfn)` tells a frame from the one that it
    was before it was freed, where the machine knows; `given_up(pfn)`: nobody but a batch of the LRU's has it.
    """

    def __init__(self, data: int, slots: Sequence[tuple[int, int]] | None = None) -> None:
        self.data = data
        self.slots = list(slots or ((0, DATA_SIZE), (SLOT0_OFFSET, SLOT0_OFFSET + SLOT0_SIZE)))
        self.lines: list[str] = []
        self.freed: dict[str, int] = {}
        self.generation: Callable[[int], int] = lambda pfn: 0
        self.given_up: Callable[[int], bool] = lambda pfn: False
        self._frames: dict[tuple[int, int], int] = {}

    def clear(self) -> None:
        """What was so far is no part of the sequence."""
        self.lines.clear()
        self._frames.clear()
        self.freed.clear()

    def mark(self, text: str) -> None:
        """A step's beginning or end."""
        text = text.rstrip()
        self.lines.append(_result(text) if text.startswith("<< ") else text)

    def event(self, name: str, text: str) -> None:
        """An event of `kvm` or `kvmmmu`; `text` is what the kernel's print format gives."""
        # KVM_MMU_PAGE_PRINTK ends with a NUL, at which the kernel's own text ends, too.
        text = text.replace("\0", "")
        if name in IGNORED or (name == "kvm_userspace_exit" and not text.startswith("reason error")):
            return
        if name in HOST_EVENTS:
            self._range(name, text)
        elif name == "kvm_mmu_pagetable_walk":
            if int(text.split()[1], 16) >= DATA_GPA:
                self.lines.append(f"walk {text}".rstrip())
        else:
            self.lines.append(f"{name}: {self._without_frames(text)}".rstrip())

    def frame_freed(self, pfn: int) -> None:
        """A frame that may have been named went back to the allocator, which has another generation now."""
        name = self._frames.get((pfn, self.generation(pfn) - 1))
        if name is not None:
            self.freed[f"P{name}"] = len(self.lines)

    def _range(self, name: str, text: str) -> None:
        words = [int(word, 16) for word in _HEX.findall(text)]
        start, end = words[0], words[1] if len(words) > 1 else words[0] + 1
        if (start, end) == _WHOLE:
            self.lines.append(f"{name} [whole mm]")
            return
        start, end = start - self.data, end - self.data
        if any(start < last and end > first for first, last in self.slots):
            if len(words) == 1:
                end = start
            self.lines.append(f"{name} [D{start:+#x}..D{end:+#x}]")

    def _without_frames(self, text: str) -> str:
        text = re.sub(r"\bpfn ([0-9a-f]+)", lambda m: f"pfn {self._frame(int(m[1], 16))}", text)
        text = re.sub(r"\bspte ([0-9a-f]+)", self._spte, text)
        return re.sub(r" at [0-9a-f]+$", "", text)

    def _spte(self, found: re.Match[str]) -> str:
        spte = int(found[1], 16)
        return f"spte {self._frame(spte >> 12 & 0xFF_FFFF_FFFF)}|{spte & 0xFFF:x}"

    def _frame(self, pfn: int) -> str:
        key = (pfn, self.generation(pfn))
        if key not in self._frames:
            self._note_given_up()
            self._frames[key] = len(self._frames)
        return f"P{self._frames[key]}"

    def _note_given_up(self) -> None:
        for (pfn, generation), number in self._frames.items():
            if f"P{number}" not in self.freed and generation == self.generation(pfn) and self.given_up(pfn):
                self.freed[f"P{number}"] = len(self.lines)


# -- results ------------------------------------------------------------------------------------


def _mmio(found: re.Match[str]) -> str:
    # What a read's buffer holds before it is answered is whatever the union held.
    data = "" if found[4] == "r" else f" of {int.from_bytes(bytes.fromhex(found[2]), 'little'):#x}"
    return f"MMIO {'read' if found[4] == 'r' else 'write'} of {found[3]} bytes at {found[1]}{data}"


_RESULTS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    # "OSError 14 EFAULT; exit=('UNKNOWN',)": what the exit record held is the ioctl's, not mm's.
    (re.compile(r"OSError \d+ (E\w+);.*"), r"\1"),
    # What errno an earlier call left is no part of an answer of 0.
    (re.compile(r": rc 0 errno \d+"), ": rc 0"),
    # pages_sharing counts the pages of every process of the recording machine.
    (re.compile(r": pages_sharing \d+$"), ": pages_sharing"),
    (re.compile(r"\('MMIO', '(0x[0-9a-f]+)', '([0-9a-f]*)', (\d+), '([rw])'\)"), _mmio),
    # Every snippet ends in `out 0xf4, al`.
    (re.compile(r": (?:IO|\('IO', 'out', 1, 244, b'.*'\))$"), ": ok"),
    (re.compile(r"(<< KVM_CREATE_GUEST_MEMFD.*): \d+$"), r"\1: fd"),
    (re.compile(r": (\d{15})$"), lambda m: ": address" if int(m[1]) in _USER_ADDRESS else m[0]),
)


def _result(line: str) -> str:
    for pattern, form in _RESULTS:
        line = pattern.sub(form, line)
    return line.rstrip()


# -- recordings ---------------------------------------------------------------------------------


def parse_recording(text: str) -> Recording:
    """A recording, be it normalised already or as tracefs gave it: "  124us kvm_mmu_set_spte: ...".

    ValueError if it is neither.
    """
    lines: list[str] = []
    stats: dict[str, int] = {}
    # What touches no slot was left out when it was recorded.
    raw = Normalizer(0, [(-(1 << 64), 1 << 64)])
    for line in text.splitlines():
        timed = _TIMED.match(line)
        if line.startswith(_STATS):
            stats = json.loads(line.removeprefix(_STATS))
        elif timed:
            _raw_line(raw, timed[1].rstrip())
        elif line.startswith((">> ", "<< ", "walk ", "kvm_", "vcpu_")):
            lines.append(line.rstrip())
        elif line and not line.startswith("#"):
            raise ValueError(f"not a line of a recording: {line[:60]!r}")
    return Recording(raw.lines or lines, stats)


def _raw_line(normalizer: Normalizer, line: str) -> None:
    # A line of another thread than the VMM's first one ends with its name.
    line = re.sub(r" \(\S+-\d+\)$", "", line)
    if line.startswith((">> ", "<< ")):
        normalizer.mark(re.sub(r" \d+us$", "", line))
        return
    name, colon, text = line.partition(": ")
    if not colon or not name.startswith(("kvm_", "vcpu_")):
        return
    offset = _OFFSET.search(text)
    if name in HOST_EVENTS and offset is not None:
        start = _HEX.search(text)
        assert start is not None
        normalizer.data = int(start[1], 16) - int(offset[1], 16)
        text = text.partition("[")[0]
    normalizer.event(name, text)


def host_side(lines: Iterable[str]) -> list[str]:
    """What the host's memory management says: steps and notifier events, without KVM's own tables."""
    return [line for line in lines if line.startswith((">> ", "<< ", *HOST_EVENTS))]

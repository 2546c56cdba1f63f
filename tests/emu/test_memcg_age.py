"""What a recording of a real kernel shows of reclaim in the memory cgroup of a running VMM.

The recording's page counts vary from run to run, so that its rules are checked and not its lines: each
page that is reclaimed was asked for its age first, page by page in the order of the list; what was young
is asked again before it goes; what was asked and is young stays.
"""

from __future__ import annotations

import re

from refault.scenarios.api import PAGE
from refault.scenarios.emulator import EmulatorBackend

PAGES = 0x400


def events(lines: list[str]) -> list[tuple[str, int]]:
    found = [re.match(r"kvm_(age|unmap)_hva\w* \[D\+0x([0-9a-f]+)\.\.", line) for line in lines]
    return [(m[1], int(m[2], 16) // PAGE) for m in found if m is not None]


def test_classic_reclaim_of_ones_own_group_ages_page_by_page_then_ages_and_unmaps() -> None:
    b = EmulatorBackend(check=True, params={"swap.device": "zram"})
    b.memcg_enter()
    for page in range(PAGES):
        b.host_write(page * PAGE, page + 1)
    for page in range(16):
        b.load(page * PAGE)
    b.begin()
    b.memcg_limit(128)
    seen = events(b.lines)
    aged = [page for what, page in seen if what == "age"]
    assert aged[:64] == list(range(16, 80)), "the tail of the list, without what was used twice"
    unmapped = [page for what, page in seen if what == "unmap"]
    assert unmapped
    for at, (what, page) in enumerate(seen):
        if what == "unmap":
            assert seen[at - 1] == ("age", page), "asked once more, then taken"
            assert aged.count(page) >= 2, "it was young from its first fault"
    assert not set(unmapped) & set(range(16)), "what was used twice stays"
    assert [b.host_read(page * PAGE) for page in range(PAGES)] == list(range(1, PAGES + 1))
    b.close()


def test_a_process_outside_the_group_is_unmapped_without_being_aged() -> None:
    b = EmulatorBackend(check=True, params={"swap.device": "zram"})
    b.memcg_enter()
    for page in range(PAGES):
        b.host_write(page * PAGE, page + 1)
    b.memcg_leave()
    b.begin()
    b.memcg_limit(128)
    assert {what for what, _ in events(b.lines)} == {"unmap"}
    b.close()

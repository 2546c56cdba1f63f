"""The set of executable pages answers as a set of pairs does."""

from __future__ import annotations

import random

from emu.cpu.code_pages import CodePages, code_page_known


def test_it_answers_as_a_set_does_while_pairs_come_and_go() -> None:
    rng = random.Random(5)
    pages = CodePages(slots=16)
    model: set[tuple[int, int]] = set()
    moved = 0
    for _ in range(5000):
        vpn, pfn = rng.choice((rng.randrange(40), 0xF_FFFF_FFF0 + rng.randrange(15))), rng.randrange(40)
        gva = vpn << 12 | (0xFFFF << 48 if vpn >> 35 else 0)
        if rng.random() < 0.9:
            moved += pages.add(gva, pfn)
            model.add((gva, pfn))
        else:
            gone = sorted(g for g, p in model if p == pfn)
            assert sorted(pages.forget(pfn)) == gone
            model -= {(g, pfn) for g in gone}
        probe = (rng.choice(list(model)) if model and rng.random() < 0.5 else (gva, rng.randrange(40)))
        assert code_page_known(pages.table, pages.mask, *probe) == (probe in model)
        assert pages.known(*probe) == (probe in model)
    assert moved


def test_signed_and_unsigned_addresses_are_the_same_page() -> None:
    pages = CodePages()
    pages.add(0xFFFF_FFFF_8000_0000, 3)
    assert code_page_known(pages.table, pages.mask, -0x8000_0000, 3)
    assert pages.forget(3) == [0xFFFF_FFFF_8000_0000]


def test_frame_0_page_0_is_a_pair_like_any_other() -> None:
    pages = CodePages()
    assert not code_page_known(pages.table, pages.mask, 0, 0)
    pages.add(0, 0)
    assert code_page_known(pages.table, pages.mask, 0, 0)

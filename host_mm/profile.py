"""What differs between kernel generations in mm, as data named by behaviour.

Source of truth: mm/mprotect.c, mm/memory.c and mm/mmu_notifier.c of Linux 6.18 and 5.10.

Not modelled: generations other than these two.
"""

from __future__ import annotations

import msgspec

__all__ = ["LINUX_5_10", "LINUX_6_18", "MmProfile"]


class MmProfile(msgspec.Struct, frozen=True):
    """One kernel's mm.

    `mprotect_bracket_level`: the table level whose walker opens change_protection's bracket, 3 (PUD) or
    2 (PMD). `change_pte`: set_pte_at_notify tells notifiers the new entry. `invalidate_range`: the
    *_clear_flush_notify calls invalidate_range under the page-table lock and the bracket ends with the
    end that skips it. `anon_exclusive`: COW reuse goes by PG_anon_exclusive, else by the map count.
    `hugetlb_unmap_brackets`: unmapping huge pages opens a bracket of its own, an UNMAP, inside the caller's.
    """

    name: str
    mprotect_bracket_level: int
    change_pte: bool
    invalidate_range: bool
    anon_exclusive: bool
    hugetlb_unmap_brackets: bool = False


LINUX_6_18 = MmProfile("linux-6.18", 3, False, False, True)
LINUX_5_10 = MmProfile("linux-5.10", 2, True, True, False, True)

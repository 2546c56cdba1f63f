"""What devices translate by is seen by the truths (host_mm/secondary_tables.py)."""

from __future__ import annotations

import pytest

from host_mm.kernel.errors import BrokenTruth
from host_mm.madvise import MADV_DONTNEED, MADV_PAGEOUT, do_madvise
from host_mm.mmap import do_mmap
from host_mm.tlb import HostTlb
from host_mm.truths import audit
from host_mm.uaccess import copy_to_user
from tests.host_mm.machine import ANON, PAGE, RW, make_host


def test_a_translation_that_nobody_drops_breaks_a_truth() -> None:
    for advice, truth in ((MADV_DONTNEED, "freed-frame-translated"), (MADV_PAGEOUT, "io-while-writable")):
        host = make_host()
        process = host.create_process("p")
        base = do_mmap(process.mm, 0, PAGE, RW, ANON)
        copy_to_user(process, base, b"x")
        host.lru.lru_add_drain_all()
        table = HostTlb()
        host.secondary_tables.add("a device", process.mm, table)
        pfn = process.tlb.lookup(base, True)
        table.fill(base, pfn, True)
        assert host.secondary_tables.reaching(pfn) == [("a device", base, True)]
        audit(host)
        with pytest.raises(BrokenTruth, match=f"{truth}.*a device"):
            host.sched.run_task("t", lambda: do_madvise(process.mm, base, PAGE, advice))  # noqa: B023


def test_the_audit_compares_with_the_tables_and_forgets_who_left() -> None:
    host = make_host()
    process = host.create_process("p")
    base = do_mmap(process.mm, 0, PAGE, RW, ANON)
    table = HostTlb()
    host.secondary_tables.add("a device", process.mm, table)
    table.fill(base, 99, False)
    with pytest.raises(BrokenTruth, match=r"tlb-stale.*a device"):
        audit(host)
    host.secondary_tables.remove(table)
    audit(host)

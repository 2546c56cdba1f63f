"""read(2), write(2) and posix_fadvise(2) on files (host_mm/filemap_rw.py)."""

from __future__ import annotations

import random
from errno import EFBIG, EINVAL

import pytest

from host_mm.filemap_rw import (
    POSIX_FADV_DONTNEED,
    POSIX_FADV_WILLNEED,
    file_read,
    file_write,
    generic_fadvise,
)
from host_mm.kernel.errors import KernelError
from host_mm.madvise import MADV_DONTNEED, do_madvise
from host_mm.mmu_notifier_register import mmu_notifier_register
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.files import Shared
from tests.host_mm.machine import PAGE, Recorder


@pytest.mark.parametrize("disk", [None, b""])
def test_a_write_is_seen_by_who_has_the_page_mapped_and_tells_nobody(disk: bytes | None) -> None:
    s = Shared(disk=disk)

    def use() -> None:
        assert copy_from_user(s.a, s.at + 3 * PAGE, 1) == b"\0"
        notifier = Recorder(s.at)
        mmu_notifier_register(notifier, s.a.mm)
        assert file_write(s.file, 3 * PAGE + 5, b"hello") == 5
        assert copy_from_user(s.a, s.at + 3 * PAGE + 4, 7) == b"\0hello\0"
        assert file_read(s.file, 3 * PAGE + 4, 3) == b"\0he"
        assert notifier.take() == []

    s.do(use)
    s.end()


@pytest.mark.parametrize("disk", [None, b"old" * 10000])
def test_reads_and_writes_agree_with_an_array_of_bytes(disk: bytes | None) -> None:
    s = Shared(disk=disk, pages=16)
    model = bytearray(16 * PAGE)
    if disk is not None:
        model[: len(disk)] = disk
    rng = random.Random(7)

    def use() -> None:
        for _ in range(150):
            pos = rng.randrange(17 * PAGE)
            data = rng.randbytes(rng.randrange(1, 3 * PAGE))
            kind = rng.randrange(4)
            if kind == 0:
                assert file_write(s.file, pos, data) == len(data)
                model.extend(bytes(max(0, pos + len(data) - len(model))))
                model[pos : pos + len(data)] = data
            elif kind == 1:
                assert file_read(s.file, pos, len(data)) == bytes(model[pos : pos + len(data)])
            elif kind == 2 and pos + 8 < 16 * PAGE:
                copy_to_user(s.a, s.at + pos, data[:8])
                model[pos : pos + len(data[:8])] = data[:8]
            else:
                s.file.a_ops.fsync(s.file)
                do_madvise(s.a.mm, s.at, 16 * PAGE, MADV_DONTNEED)
                generic_fadvise(s.file, 0, 0, POSIX_FADV_DONTNEED)
        s.file.a_ops.fsync(s.file)
        assert s.file.i_size == len(model)
        assert file_read(s.file, 0, len(model) + 1) == bytes(model)

    s.do(use)
    if disk is not None:
        assert s.on_disk(0, len(model)) == bytes(model)
    s.end()


def test_a_large_write_makes_a_large_folio() -> None:
    s = Shared(disk=b"", pages=32)
    s.do(lambda: file_write(s.file, 0, b"x" * 16 * PAGE))
    assert {s.file.i_pages[index] for index in range(16)} == {s.file.i_pages[0]}
    assert s.host.pages.order[s.file.i_pages[0]] == 4
    s.do(lambda: file_write(s.file, 17 * PAGE, b"y" * PAGE))
    assert s.host.pages.order[s.file.i_pages[17]] == 0
    s.do(lambda: s.file.a_ops.fsync(s.file))
    assert s.on_disk(0, 18 * PAGE) == b"x" * 16 * PAGE + bytes(PAGE) + b"y" * PAGE
    s.end()


def test_advice_reads_ahead_and_drops_what_is_clean() -> None:
    s = Shared(disk=b"x" * 16 * PAGE)
    s.do(lambda: generic_fadvise(s.file, 4 * PAGE, 3 * PAGE, POSIX_FADV_WILLNEED))
    s.quiet()
    assert sorted(s.file.i_pages) == [4, 5, 6]
    s.do(lambda: file_write(s.file, 5 * PAGE, b"dirty"))
    s.do(lambda: generic_fadvise(s.file, 0, 0, POSIX_FADV_DONTNEED))
    assert sorted(s.file.i_pages) == [5], "it is being written"
    s.quiet()
    s.do(lambda: generic_fadvise(s.file, 0, 0, POSIX_FADV_DONTNEED))
    assert not s.file.i_pages
    assert s.on_disk(5 * PAGE, 5) == b"dirty"
    s.end()


def test_bad_positions_and_advice_are_refused() -> None:
    s = Shared(disk=b"")
    for call, errno in (
        (lambda: file_write(s.file, -1, b"x"), EINVAL),
        (lambda: file_write(s.file, (1 << 63) - 1, b"x"), EFBIG),
        (lambda: file_read(s.file, -1, 1), EINVAL), (lambda: generic_fadvise(s.file, 0, 1, 6), EINVAL),
        (lambda: generic_fadvise(s.file, 0, -1, 4), EINVAL),
    ):
        with pytest.raises(KernelError) as refused:
            call()
        assert refused.value.errno == errno
    s.end()

"""Files of huge pages: holes, truncation, preallocation, and their end."""

from __future__ import annotations

from errno import EINVAL, ENOMEM, ENOSPC, EOPNOTSUPP

import pytest

from host_mm.address_space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fput
from host_mm.fork import exit_process
from host_mm.gup import FOLL_WRITE
from host_mm.gup_pin import pin_user_page, unpin_user_page
from host_mm.hugetlbfs import hugetlb_file_setup
from host_mm.kernel.errors import KernelError
from host_mm.mmap import MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, do_mmap, do_munmap
from host_mm.process import Process
from host_mm.profile import LINUX_5_10
from host_mm.uaccess import copy_from_user, copy_to_user
from tests.host_mm.hugetlb_machine import BASE, HUGE, PUNCH_HOLE, Machine, Witness, fallocate, truncate
from tests.host_mm.machine import RW, run


def test_a_hole_unmaps_everybody_in_a_bracket_each_and_frees_the_page_when_it_leaves_the_file() -> None:
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(2)
    m.shared(p, file, 2)
    m.shared(q, file, 2, BASE + 8 * HUGE)
    m.write(p, BASE + HUGE, b"x")
    m.read(q, BASE + 9 * HUGE)
    mine, theirs = Witness(m.host, p.mm), Witness(m.host, q.mm)
    m.do(lambda: fallocate(file, PUNCH_HOLE, HUGE, HUGE))
    log, ranges = mine.take()
    assert log[:4] == ["start", "clear", "end", "flush"]
    assert log[-1] == "free"
    assert [r[:3] for r in ranges] == [("clear", BASE + HUGE, BASE + 2 * HUGE)]
    assert [r[:3] for r in theirs.take()[1]] == [("clear", BASE + 9 * HUGE, BASE + 10 * HUGE)]
    assert m.pool == (8, 0, 0)
    assert m.read(p, BASE + HUGE) == b"\0"
    m.close()


def test_a_hole_smaller_than_a_page_zeroes_it_and_tells_nobody() -> None:
    m = Machine()
    p = m.process()
    file = m.file(2)
    m.shared(p, file, 2)
    m.write(p, BASE + 0x2FFF, b"abc")
    witness = Witness(m.host, p.mm)
    m.do(lambda: fallocate(file, PUNCH_HOLE, 0x3000, 0x1000))
    assert witness.take() == ([], [])
    assert m.read(p, BASE + 0x2FFF, 3) == b"a\0\0"
    m.close()


def test_a_hole_across_pages_zeroes_its_ends_and_frees_what_lies_between() -> None:
    m = Machine()
    p = m.process()
    file = m.file(3)
    m.shared(p, file, 3)
    for page in range(3):
        m.write(p, BASE + page * HUGE, b"a")
        m.write(p, BASE + page * HUGE + HUGE - 1, b"z")
    witness = Witness(m.host, p.mm)
    m.do(lambda: fallocate(file, PUNCH_HOLE, HUGE // 2, 2 * HUGE))
    assert [r[:3] for r in witness.take()[1]] == [("clear", BASE + HUGE, BASE + 2 * HUGE)]
    assert m.pool == (6, 0, 0)
    assert m.read(p, BASE) + m.read(p, BASE + HUGE - 1) == b"a\0"
    assert m.read(p, BASE + 2 * HUGE) + m.read(p, BASE + 3 * HUGE - 1) == b"\0z"
    m.close()


def test_a_bracket_of_a_hole_is_an_unmap_in_linux_5_10() -> None:
    m = Machine(profile=LINUX_5_10)
    p = m.process()
    file = m.file(1)
    m.shared(p, file, 1)
    m.write(p, BASE, b"x")
    witness = Witness(m.host, p.mm)
    m.do(lambda: fallocate(file, PUNCH_HOLE, 0, HUGE))
    assert [r[:3] for r in witness.take()[1]] == [("unmap", BASE, BASE + HUGE)]
    m.close()


def test_truncation_unmaps_to_the_end_of_each_mapping_and_what_is_there_is_gone() -> None:
    m = Machine()
    p = m.process()
    file = m.file(4)
    m.shared(p, file, 4, flags=0)
    m.write(p, BASE + 3 * HUGE, b"x")
    assert m.pool == (7, 3, 0)
    witness = Witness(m.host, p.mm)
    m.do(lambda: truncate(file, HUGE))
    assert [r[:3] for r in witness.take()[1]] == [("clear", BASE + HUGE, BASE + 4 * HUGE)]
    assert m.pool == (8, 1, 0)
    with pytest.raises(KernelError):
        copy_from_user(p, BASE + 3 * HUGE, 1)
    m.do(lambda: truncate(file, 4 * HUGE))
    assert m.read(p, BASE + 3 * HUGE) == b"\0"
    m.close()


def test_truncation_takes_private_copies_too() -> None:
    m = Machine()
    p = m.process()
    file = m.file(2)
    m.shared(p, file, 2, kind=MAP_PRIVATE, flags=0)
    m.write(p, BASE + HUGE, b"mine")
    m.do(lambda: truncate(file, HUGE))
    with pytest.raises(KernelError):
        copy_from_user(p, BASE + HUGE, 1)
    m.close()


def test_a_pinned_page_leaves_the_file_but_is_not_free_before_it_is_unpinned() -> None:
    m = Machine()
    p = m.process()
    file = m.file(1)
    m.shared(p, file, 1)
    m.write(p, BASE, b"x")
    pfn = m.host.sched.run_task("pin", lambda: pin_user_page(p.mm, BASE + 0x3000, FOLL_WRITE))
    m.do(lambda: fallocate(file, PUNCH_HOLE, 0, HUGE))
    assert m.host.ram.read((pfn - 3) << 12, 1) == b"x"
    assert m.pool == (7, 0, 0)
    unpin_user_page(m.host, pfn, dirty=True)
    assert m.pool == (8, 0, 0)
    m.close()


def test_preallocation_uses_the_files_promises_and_grows_the_file() -> None:
    m = Machine()
    p = m.process()
    file = m.file(2)
    m.shared(p, file, 2, flags=0)
    assert m.pool == (8, 2, 0)
    m.do(lambda: fallocate(file, 0, 0, 3 * HUGE))
    assert m.pool == (5, 0, 0)
    assert file.i_size == 3 * HUGE
    m.do(lambda: fallocate(file, 0, HUGE, 1))
    assert m.pool == (5, 0, 0)
    with pytest.raises(KernelError) as caught:
        m.do(lambda: fallocate(file, FALLOC_FL_KEEP_SIZE, 0, 20 * HUGE))
    assert caught.value.errno == ENOSPC
    assert file.i_size == 3 * HUGE
    m.close()


def test_the_file_keeps_its_pages_until_its_last_user_is_gone() -> None:
    m = Machine()
    p = m.process()
    file = m.file(1)
    m.shared(p, file, 1)
    m.write(p, BASE, b"x")
    m.do(lambda: do_munmap(p.mm, BASE, HUGE))
    assert m.pool == (7, 0, 0)
    m.shared(p, file, 1)
    assert m.read(p, BASE) == b"x"
    m.files.clear()
    m.do(lambda: fput(file))
    assert m.read(p, BASE) == b"x"
    m.do(lambda: exit_process(p))
    assert m.pool == (8, 0, 0)
    m.close()


@pytest.mark.parametrize(("call", "errno"), [
    (lambda m, p, f: truncate(f, 0x1000), EINVAL),
    (lambda m, p, f: fallocate(f, PUNCH_HOLE, -1, HUGE), EINVAL),
    (lambda m, p, f: fallocate(f, PUNCH_HOLE, 0, 0), EINVAL),
    (lambda m, p, f: fallocate(f, FALLOC_FL_PUNCH_HOLE, 0, HUGE), EOPNOTSUPP),
    (lambda m, p, f: fallocate(f, 0x10, 0, HUGE), EOPNOTSUPP),
    (lambda m, p, f: hugetlb_file_setup(m.host, "g", 0x1000), EINVAL),
    (lambda m, p, f: hugetlb_file_setup(m.host, "g", 9 * HUGE, noreserve=False), ENOMEM),
    (lambda m, p, f: do_mmap(p.mm, BASE, HUGE, RW, MAP_SHARED | MAP_FIXED, file=f, pgoff=1), EINVAL),
    (lambda m, p, f: do_mmap(p.mm, BASE + 0x1000, HUGE, RW, MAP_SHARED | MAP_FIXED, file=f, pgoff=0), EINVAL),
    (lambda m, p, f: do_mmap(p.mm, BASE, 9 * HUGE, RW, MAP_SHARED | MAP_FIXED, file=f, pgoff=0), ENOMEM),
])
def test_bad_arguments_are_refused_and_change_nothing(call: object, errno: int) -> None:
    m = Machine()
    p = m.process()
    file = m.file(2)
    with pytest.raises(KernelError) as caught:
        m.do(lambda: call(m, p, file))  # type: ignore[operator]
    assert caught.value.errno == errno
    assert m.pool == (8, 0, 0)
    assert len(m.host.mappings) == 1
    m.close()


def test_two_mappings_reserve_the_files_pages_once() -> None:
    m = Machine()
    p, q = m.process(), m.process()
    file = m.file(3)
    m.shared(p, file, 3, flags=0)
    m.shared(q, file, 3, flags=0)
    assert m.pool == (8, 3, 0)
    m.write(q, BASE, b"x")
    m.do(lambda: exit_process(p))
    assert m.pool == (7, 2, 0)
    m.close()


@pytest.mark.parametrize("seed", range(16))
def test_faults_beside_a_hole_see_the_old_byte_or_zero_and_no_page_is_lost(seed: int) -> None:
    m = Machine(4, seed=seed)
    p, q = m.process(), m.process()
    file = m.file(2)
    m.shared(p, file, 2)
    m.shared(q, file, 2, BASE + 8 * HUGE, flags=MAP_NORESERVE)
    m.write(p, BASE, b"x")

    def punch() -> None:
        for _ in range(3):
            fallocate(file, PUNCH_HOLE, 0, HUGE)

    def touch(who: object, at: int) -> None:
        for n in range(4):
            copy_to_user(who, at + 16 + n, b"w")  # type: ignore[arg-type]
            assert copy_from_user(who, at, 1) in (b"x", b"\0")  # type: ignore[arg-type]

    run(m.host, punch, lambda: touch(p, BASE), lambda: touch(q, BASE + 8 * HUGE))
    assert m.read(p, BASE, 32) == m.read(q, BASE + 8 * HUGE, 32)
    m.close()


def test_a_fault_beside_a_truncation_may_leave_its_page_beyond_the_end_until_the_file_goes() -> None:
    left = 0
    for seed in range(8):
        m = Machine(4, seed=seed)
        p = m.process()
        file = m.file(2)
        m.shared(p, file, 2)
        m.write(p, BASE, b"x")

        def touch(p: Process = p) -> None:
            for n in range(5):
                try:
                    copy_to_user(p, BASE + HUGE + n, b"w")
                except KernelError:
                    return

        run(m.host, touch, lambda file=file: truncate(file, HUGE), touch)
        try:
            m.read(p, BASE + HUGE)
            left += 1
        except KernelError:
            assert m.pool == (3, 0, 0)
        assert m.read(p, BASE) == b"x"
        m.close()
    assert left

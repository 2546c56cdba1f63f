"""What a guest with page tables of its own may see, by the architecture alone.

The oracle keeps the guest's tables as the guest wrote them, and for each vCPU, root and page all
translations that a walk could have found since that vCPU last flushed the page: any of them may still be
used. What the walk finds now is always among them; where it finds nothing, or refuses, a page fault may
come, and only then.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.kvm_model.shadow_machine import CR0_WP, CR4_SMAP, CR4_SMEP, NX, PAGE, PS, RW, P, U

__all__ = ["Oracle", "Translation"]

_ADDR = 0x000F_FFFF_FFFF_F000


class Translation(NamedTuple):
    """The frame, and the rights of all entries on the way together."""

    gfn: int
    rw: bool
    user: bool
    nx: bool

    def allows(self, kind: str, user: bool, cr0: int, cr4: int) -> bool:
        """Whether an access may be made by it."""
        if user and not self.user:
            return False
        if kind == "x":
            return not self.nx and not (not user and self.user and cr4 & CR4_SMEP)
        if not user and self.user and cr4 & CR4_SMAP:
            return False
        return kind == "r" or self.rw or not (user or cr0 & CR0_WP)


class Oracle:
    """`tables[gpa]`: the entries. `pages`: the linear pages that are looked at."""

    def __init__(self, pages: list[int], roots: list[int], vcpus: int) -> None:
        self.pages = pages
        self.roots = roots
        self.tables: dict[int, int] = {}
        self.may: dict[tuple[int, int], dict[int, set[Translation]]] = {
            (vcpu, root): {page: set() for page in pages} for vcpu in range(vcpus) for root in roots
        }

    def walk(self, root: int, page: int) -> Translation | None:
        """What the tables say now; None where an entry is not present."""
        table, rw, user, nx = root, True, True, False
        for level in (4, 3, 2, 1):
            shift = 12 + 9 * (level - 1)
            entry = self.tables.get(table + 8 * (page >> shift & 511), 0)
            if not entry & P:
                return None
            rw &= bool(entry & RW)
            user &= bool(entry & U)
            nx |= bool(entry & NX)
            table = entry & _ADDR
            if level == 1 or entry & PS:
                below = (1 << shift) - PAGE
                return Translation(((table & ~below) | (page & below)) >> 12, rw, user, nx)
        raise AssertionError("a walk ends at level 1")

    def edit(self, gpa: int, value: int) -> None:
        """A vCPU wrote an entry: what the tables say now may be used from now on."""
        self.tables[gpa] = value
        for root in self.roots:
            for page in self.pages:
                found = self.walk(root, page)
                if found is None:
                    continue
                for (_, of), may in self.may.items():
                    if of == root:
                        may[page].add(found)

    def flush(self, vcpu: int, root: int, page: int | None = None) -> None:
        """The vCPU flushes a page, or all of them, of one address space."""
        may = self.may[vcpu, root]
        for each in self.pages if page is None else [page]:
            found = self.walk(root, each)
            may[each] = set() if found is None else {found}

    def fault(self, root: int, page: int, kind: str, user: bool, cr0: int, cr4: int) -> int | None:
        """The error code of the page fault that the tables ask for now, if they do."""
        found = self.walk(root, page)
        if found is not None and found.allows(kind, user, cr0, cr4):
            return None
        return (found is not None) | 2 * (kind == "w") | 4 * user | 16 * (kind == "x")

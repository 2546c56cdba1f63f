"""What happens on a miss of Unicorn's TLB: walk, judge the permissions, note the fill.

One source, like the walk: run interpreted on memoryviews, or compiled as Unicorn's native hook.
Unicorn's TLB is the guest's TLB, so what a fill grants must never exceed what hardware would do
without another walk, and must keep Unicorn's translated code coherent with the bytes:

    READ   R, and W where guest and EPT permit it with D already set; never W on a frame with code
    WRITE  R W; on a frame with code CODE_WRITE instead
    FETCH  R X where the pair (page, frame) is known as code, else NEW_CODE

X comes from fetch fills only: an entry with X keeps Unicorn's stores on a slow path, and one
without X lets stores pass translated code unseen. So a frame is either data (stores are fast) or
code (stores leave the CPU and somebody decides). FRAME_MIXED is for frames that hold both and are
written often: a write through a known executable page gets R W X, slow and coherent.

P_ROOT is the root that KVM loaded into CR3 where it shadows the guest's tables; 0: the guest's CR3 is the
CPU's, and P_EPTP the second stage. P_PDPTE are the CPU's four PDPTE registers, used in PAE paging.

An access to the frame P_APIC (-1: none) is one to the APIC's registers: APIC_ACCESS, never an entry.

A page fault of a user access to a page of the descriptor tables may really be the CPU's own read
of them (loading a segment register at CPL 3), which Unicorn does not tell apart. P_DESCRIPTOR is
set then; with P_IMPLICIT_PAGE the next run makes accesses to that page as implicit supervisor ones.

Source: Intel SDM vol. 3A 4.10.2 (what a TLB entry may cache), 4.6.1 (implicit supervisor accesses);
unicorn.h: uc_cb_tlbevent_t; qemu/softmmu/unicorn_vtlb.c.

Not modelled: implicit supervisor accesses at CPL < 3 with EFLAGS.AC set (SMAP exempts them here);
A and D updates of guest tables that lie in frames with code do not invalidate that code.
"""

from __future__ import annotations

from emu.cpu.code_pages import code_page_known
from emu.cpu.env import CR, EFER, EFLAGS, GDT, HF_CPL, HFLAGS, IDT, LDT, TR
from emu.cpu.paging import EFLAGS_AC
from emu.cpu.shadow_walk import walk_shadow
from emu.cpu.walk import (
    ACCESS_AC,
    ACCESS_FETCH,
    ACCESS_IMPLICIT,
    ACCESS_READ,
    ACCESS_USER,
    ACCESS_WRITE,
    OK,
    PAGE_FAULT,
    RIGHT_R,
    RIGHT_W,
    RIGHT_X,
    walk,
)
from emu.cpu.words import Words

__all__ = [
    "APIC_ACCESS", "CODE_WRITE", "FRAME_CODE", "FRAME_DATA", "FRAME_MIXED", "NEW_CODE", "NO_PAGE", "P_A",
    "P_ACCESS", "P_APIC",
    "P_B", "P_C", "P_CODE", "P_CODE_MASK", "P_COUNT", "P_DESCRIPTOR", "P_ENV", "P_EPOCH", "P_EPTP",
    "P_FETCHED", "P_FILLS", "P_FILL_EPOCH", "P_GVA", "P_HPA", "P_IMPLICIT_PAGE", "P_NR_FRAMES", "P_PDPTE",
    "P_PML", "P_RAM", "P_REFUSED", "P_RIGHTS", "P_ROOT", "P_STATUS", "P_WRITE_EPOCH", "in_descriptor_tables",
    "tlb_fill",
]

# Parameter block, inputs.
P_ENV = 0
P_RAM = 1
P_NR_FRAMES = 2
P_EPTP = 3
P_EPOCH = 4
P_FILL_EPOCH = 5
P_WRITE_EPOCH = 6
P_FETCHED = 7
P_CODE = 8
P_CODE_MASK = 9
P_IMPLICIT_PAGE = 10
P_PML = 11
P_ROOT = 12
P_APIC = 13
P_PDPTE = 28
# Outputs of the last fill: the walk's result, after P_ACCESS in its order.
P_STATUS = 16
P_GVA = 17
P_ACCESS = 18
P_HPA = 19
P_RIGHTS = 20
P_A = 21
P_B = 22
P_C = 23
P_DESCRIPTOR = 24
P_FILLS = 25
P_REFUSED = 26
P_COUNT = 32

NO_PAGE = 1
"""No page address: those have 12 zeros."""

NEW_CODE = 16
CODE_WRITE = 17
APIC_ACCESS = 18

FRAME_DATA = 0
FRAME_CODE = 1
FRAME_MIXED = 2

_UC_MEM_WRITE = 17
_UC_MEM_FETCH = 18


def in_descriptor_tables(env: Words, page: int) -> bool:
    """Whether `page` holds part of the GDT, LDT, IDT or TSS."""
    for table in (GDT, LDT, TR, IDT):
        base = env[(table + 8) // 8]
        limit = env[(table + 16) // 8] & 0xFFFFFFFF
        if page <= base + limit and page + 0xFFF >= base:
            return True
    return False


def tlb_fill(
    params: Words, env: Words, mem: Words, fetched: Words, fill_epoch: Words, write_epoch: Words,
    code: Words, gva: int, kind: int,
) -> int:
    """Answer one miss at page `gva` of uc_mem_type `kind`: permissions to cache, or 0 to refuse."""
    access = ACCESS_READ
    if kind == _UC_MEM_WRITE:
        access = ACCESS_WRITE
    elif kind == _UC_MEM_FETCH:
        access = ACCESS_FETCH
    if gva == params[P_IMPLICIT_PAGE] and kind != _UC_MEM_FETCH:
        access |= ACCESS_IMPLICIT
    elif env[HFLAGS // 8] & HF_CPL == 3:
        access |= ACCESS_USER
    elif env[EFLAGS // 8] & EFLAGS_AC:
        access |= ACCESS_AC
    if params[P_ROOT]:
        status, hpa, rights, a, b, c = walk_shadow(
            mem, params[P_NR_FRAMES], env[CR // 8], env[CR // 8 + 4], env[EFER // 8],
            params[P_ROOT], params[P_PDPTE + (gva >> 30 & 3)], gva, access,
        )
    else:
        status, hpa, rights, a, b, c = walk(
            mem, params[P_NR_FRAMES], env[CR // 8], env[CR // 8 + 3], env[CR // 8 + 4], env[EFER // 8],
            params[P_EPTP], params[P_PML], params[P_PDPTE + (gva >> 30 & 3)], gva, access,
        )
    granted = 0
    if status == OK:
        pfn = hpa >> 12
        if pfn == params[P_APIC]:
            status = APIC_ACCESS
        elif kind == _UC_MEM_FETCH:
            if code_page_known(code, params[P_CODE_MASK], gva, pfn):
                granted = rights & (RIGHT_R | RIGHT_X)
            else:
                status = NEW_CODE
        elif fetched[pfn] == FRAME_DATA:
            granted = rights & (RIGHT_R | RIGHT_W)
        elif kind != _UC_MEM_WRITE:
            granted = RIGHT_R
        elif (
            fetched[pfn] == FRAME_MIXED
            and rights & RIGHT_X
            and code_page_known(code, params[P_CODE_MASK], gva, pfn)
        ):
            granted = RIGHT_R | RIGHT_W | RIGHT_X
        else:
            status = CODE_WRITE
        if granted:
            fill_epoch[pfn] = params[P_EPOCH]
            if granted & RIGHT_W:
                write_epoch[pfn] = params[P_EPOCH]
    descriptor = 0
    if status == PAGE_FAULT and access & ACCESS_USER and kind != _UC_MEM_FETCH:
        descriptor = int(in_descriptor_tables(env, gva))
    params[P_STATUS] = status
    params[P_GVA] = gva
    params[P_ACCESS] = access
    params[P_HPA] = hpa
    params[P_RIGHTS] = rights
    params[P_A] = a
    params[P_B] = b
    params[P_C] = c
    params[P_DESCRIPTOR] = descriptor
    params[P_FILLS] += 1
    if not granted:
        params[P_REFUSED] += 1
    return granted

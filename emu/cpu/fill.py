"""The TLB-fill hook of one vCPU: its columns, its parameters, what the last miss came to.

Unicorn calls the hook on every miss of its TLB; the body is fill_body.tlb_fill, run as native code
or interpreted with the same results. A refused fill ends emu_start with UC_ERR_EXCEPTION and RIP at
the instruction (but at the block's start for a fetch ahead); `last()` says why and
`Env.invalid_addr` the full address.

Frames that hold code are Ram.fetched's, shared by all vCPUs; which pages this vCPU may execute is
its own. The protocol for whoever runs vCPUs:

    NEW_CODE     every vCPU whose may_write(pfn) is true: empty its TLB; then mark_code()
    CODE_WRITE   on every vCPU: forget_code(pfn), drop the translated blocks of the addresses it
                 returns, empty the TLB if there were any; then Ram.fetched[pfn] = FRAME_DATA. Where
                 the storing instruction lies in that very frame this would go on for ever: then
                 FRAME_MIXED, keeping the mark, if this vCPU alone executes the frame

An address given to ctl_set_exits is fetched from at the end of every emu_start, and so is one given
to ctl_remove_cache: those fills overwrite `last()`.

Under shadow paging (`root` not 0) the tables are KVM's, whose faults all leave the guest: memory.py.

Source: Intel SDM vol. 3A 4.10 (TLBs), vol. 3C 29.4 (caching and EPT); unicorn.h: UC_HOOK_TLB_FILL.

Not modelled: VPIDs and PCIDs (a flush empties everything); global pages.
"""

from __future__ import annotations

import ctypes
from typing import Any

import msgspec
from unicorn import UC_HOOK_TLB_FILL, unicorn_const
from unicorn.unicorn_py3.unicorn import uclib

from emu.cpu import fill_body as body
from emu.cpu.code_pages import CodePages
from emu.cpu.env import CR, EFER, EFLAGS, ENV_SIZE, HF_CPL, HFLAGS, Env
from emu.cpu.paging import EFLAGS_AC
from emu.cpu.shadow_walk import walk_shadow
from emu.cpu.walk import ACCESS_AC, ACCESS_IMPLICIT, ACCESS_USER, Walk, walk
from host_mm.ram import Ram, column

__all__ = ["Fill", "FillResult", "add_hook", "signed"]

_INTERPRETED = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p,
)


def signed(value: int) -> int:
    """An unsigned 64-bit number as a signed one."""
    return value - (1 << 64) if value >> 63 == 1 else value


def add_hook(uc: Any, kind: int, function: int, user_data: int) -> int:
    """uc_hook_add by C address for all of memory; the hook's handle."""
    handle = ctypes.c_size_t()
    error = uclib.uc_hook_add(
        uc._uch, ctypes.byref(handle), kind, ctypes.c_void_p(function), ctypes.c_void_p(user_data),
        ctypes.c_uint64(1), ctypes.c_uint64(0),
    )
    if error:
        raise RuntimeError(f"uc_hook_add failed: error {error}")
    return int(handle.value)


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view.obj))


class FillResult(msgspec.Struct, frozen=True):
    """The last fill: `status` of walk.py or NEW_CODE, CODE_WRITE; `page` is its page address, signed.

    hpa, rights, a, b and c are the walk's; see walk.py. `descriptor`: the fault may be the CPU's own
    read of a descriptor table.
    """

    status: int
    page: int
    access: int
    hpa: int
    rights: int
    a: int
    b: int
    c: int
    descriptor: bool


class Fill:
    """Fills of one vCPU's Unicorn TLB from `ram`.

    `fill_epoch[pfn]` is the epoch of the last fill that reached the frame, `write_epoch[pfn]` of the
    last that granted W; `epoch` counts this vCPU's flushes from 1 on.
    """

    def __init__(self, ram: Ram, env: Env, *, interpreted: bool = False) -> None:
        self.ram = ram
        self.env = env
        self.interpreted = interpreted
        self._pae = False
        self._walk_shadow: Any = walk_shadow if interpreted else None
        self.error: BaseException | None = None
        self.fill_epoch = column("q", ram.nr_frames)
        self.write_epoch = column("q", ram.nr_frames)
        self.code = CodePages()
        self.params = column("q", body.P_COUNT)
        self._env = memoryview((ctypes.c_uint8 * ENV_SIZE).from_address(env.addr)).cast("B").cast("q")
        if interpreted:
            self._walk, self._mem = walk, ram.i64
            self._callback = _INTERPRETED(self._interpreted_hook)
            self._function = int(ctypes.cast(self._callback, ctypes.c_void_p).value or 0)
        else:
            from emu.cpu.compile import native

            code = native()
            self._walk, self._mem = code.walk, code.memory(ram.i64)
            self._function = code.fill_hook
        p = self.params
        p[body.P_ENV] = env.addr
        p[body.P_RAM] = ram.ptr
        p[body.P_NR_FRAMES] = ram.nr_frames
        p[body.P_EPOCH] = 1
        p[body.P_FILL_EPOCH] = _address(self.fill_epoch)
        p[body.P_WRITE_EPOCH] = _address(self.write_epoch)
        p[body.P_FETCHED] = _address(ram.fetched)
        p[body.P_IMPLICIT_PAGE] = body.NO_PAGE
        p[body.P_APIC] = -1
        self._publish_code()

    def install(self) -> None:
        """Register the hook with the vCPU's Uc, which must be in UC_TLB_VIRTUAL mode."""
        add_hook(self.env.uc, UC_HOOK_TLB_FILL, self._function, _address(self.params))

    def _interpreted_hook(self, uc: int, gva: int, kind: int, result: Any, user_data: int) -> bool:
        try:
            granted = body.tlb_fill(
                self.params, self._env, self.ram.i64, self.ram.fetched, self.fill_epoch, self.write_epoch,
                self.code.table, gva, kind,
            )
        except BaseException as error:
            # A Python exception cannot pass through C: emu_start's caller looks at `error`.
            self.error = error
            return False
        if granted == 0:
            return False
        result[0] = self.params[body.P_HPA]
        result[1] = granted
        return True

    def _publish_code(self) -> None:
        self.params[body.P_CODE] = self.code.address
        self.params[body.P_CODE_MASK] = self.code.mask

    @property
    def eptp(self) -> int:
        """The EPT pointer; 0: guest-physical addresses are host-physical."""
        return self.params[body.P_EPTP]

    @eptp.setter
    def eptp(self, value: int) -> None:
        self.params[body.P_EPTP] = value

    @property
    def root(self) -> int:
        """The root of KVM's tables that CR3 holds instead of the guest's; 0: it holds the guest's."""
        return self.params[body.P_ROOT]

    def set_root(self, root: int, pae: bool) -> bool:
        """Walk from `root`; whether it is another than before."""
        p = self.params
        changed = p[body.P_ROOT] != root
        p[body.P_ROOT] = root
        self._pae = pae
        if self._walk_shadow is None:
            self._walk_shadow = self._native_walk_shadow()
        return changed

    @staticmethod
    def _native_walk_shadow() -> Any:
        from emu.cpu.compile import native

        return native().walk_shadow

    def load_pdptes(self) -> None:
        """VM entry: read the PDPTEs, if the root is one of PAE paging."""
        if self._pae:
            at = self.params[body.P_ROOT] >> 3
            self.pdptes = [self.ram.i64[at + n] for n in range(4)]

    @property
    def pdptes(self) -> list[int]:
        """The CPU's four PDPTE registers, signed."""
        return list(self.params[body.P_PDPTE : body.P_PDPTE + 4])

    @pdptes.setter
    def pdptes(self, entries: list[int]) -> None:
        for n, entry in enumerate(entries):
            self.params[body.P_PDPTE + n] = entry

    @property
    def pml(self) -> int:
        """Where the VMCS's words for page-modification logging begin, as an index of RAM's; 0: off."""
        return self.params[body.P_PML]

    def set_vmcs(self, vmcs: int) -> None:
        """Log modified pages as the VMCS at physical address `vmcs` says; 0: do not."""
        self.params[body.P_PML] = vmcs >> 3

    def set_apic_access_page(self, address: int) -> None:
        """The frame at `address` stands for the APIC's registers from the next fill on."""
        self.params[body.P_APIC] = address >> 12

    @property
    def epoch(self) -> int:
        """How often this vCPU's translations were emptied, plus 1."""
        return self.params[body.P_EPOCH]

    @property
    def fills(self) -> int:
        """Misses so far. Unicorn resizes its TLB by wall clock: the number is not deterministic."""
        return self.params[body.P_FILLS]

    @property
    def implicit_page(self) -> int | None:
        """The page whose accesses are implicit supervisor ones."""
        page = self.params[body.P_IMPLICIT_PAGE]
        return None if page == body.NO_PAGE else page

    @implicit_page.setter
    def implicit_page(self, gva: int | None) -> None:
        self.params[body.P_IMPLICIT_PAGE] = body.NO_PAGE if gva is None else signed(gva) & ~0xFFF

    def flush(self) -> None:
        """Empty the vCPU's TLB. Not from a memory hook."""
        self.env.uc.ctl(unicorn_const.UC_CTL_TLB_FLUSH, unicorn_const.UC_CTL_IO_WRITE)
        self.params[body.P_EPOCH] += 1

    def last(self) -> FillResult:
        """What the last miss came to."""
        p = self.params
        return FillResult(
            p[body.P_STATUS], p[body.P_GVA], p[body.P_ACCESS], p[body.P_HPA], p[body.P_RIGHTS],
            p[body.P_A], p[body.P_B], p[body.P_C], p[body.P_DESCRIPTOR] != 0,
        )

    def access(self, kind: int, *, implicit: bool = False) -> int:
        """ACCESS_* bits of an access of `kind` (ACCESS_READ, _WRITE, _FETCH) in the vCPU's present state."""
        if implicit:
            return kind | ACCESS_IMPLICIT
        if self._env[HFLAGS // 8] & HF_CPL == HF_CPL:
            return kind | ACCESS_USER
        if self._env[EFLAGS // 8] & EFLAGS_AC:
            return kind | ACCESS_AC
        return kind

    def walk(self, gva: int, access: int) -> Walk:
        """Walk as the vCPU's registers stand, without touching its TLB. Sets A and D flags."""
        env, p = self._env, self.params
        result: Walk
        if p[body.P_ROOT]:
            gva = signed(gva)
            result = self._walk_shadow(
                self._mem, self.ram.nr_frames, env[CR // 8], env[CR // 8 + 4], env[EFER // 8],
                p[body.P_ROOT], p[body.P_PDPTE + (gva >> 30 & 3)], gva, access,
            )
            return result
        result = self._walk(
            self._mem, self.ram.nr_frames, env[CR // 8], env[CR // 8 + 3], env[CR // 8 + 4], env[EFER // 8],
            p[body.P_EPTP], p[body.P_PML], p[body.P_PDPTE + (gva >> 30 & 3)], signed(gva), access,
        )
        return result

    def mark_code(self, gva: int, pfn: int) -> None:
        """No store can reach the frame unseen: fetches from the page may be filled, writes to it not."""
        if self.code.add(gva, pfn):
            self._publish_code()
        if self.ram.fetched[pfn] == body.FRAME_DATA:
            self.ram.fetched[pfn] = body.FRAME_CODE

    def forget_code(self, pfn: int) -> list[int]:
        """Fetches from the frame are NEW_CODE again; the page addresses that were known.

        Entries with X may still be in the TLB until flush().
        """
        return self.code.forget(pfn)

    def may_write(self, pfn: int) -> bool:
        """Whether the TLB may hold an entry that lets a store reach the frame unseen."""
        return self.write_epoch[pfn] == self.params[body.P_EPOCH]

    def may_reach(self, pfn: int) -> bool:
        """Whether the TLB may hold any entry for the frame."""
        return self.fill_epoch[pfn] == self.params[body.P_EPOCH]

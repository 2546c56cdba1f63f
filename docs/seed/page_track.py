"""Two users of page tracking on one head, and a page that the host swaps out meanwhile.

    python docs/seed/page_track.py [KERNEL]
"""

import sys
from pathlib import Path

import refault
from kvm_model.mmu.page_track import (
    KvmPageTrackNotifierNode,
    kvm_page_track_register_notifier,
    kvm_write_track_add_gfn,
)

TRACKED = 0x200


class User(KvmPageTrackNotifierNode):
    """Says what it hears of the tracked page."""

    def __init__(self, name):
        self.name = name

    def track_write(self, vcpu, gpa, new):
        if gpa >> 12 == TRACKED:
            print(f"{self.name}: the guest wrote {new.hex()} at {gpa:#x}")

    def track_remove_region(self, gfn, npages):
        print(f"{self.name}: gfns {gfn:#x}+{npages:#x} have no slot any more")

    def track_flush_slot(self, kvm, slot):
        print(f"{self.name}: slot {slot.id} is about to go")


def main(profile):
    payload = str(Path(__file__).with_name("stores.s"))
    with refault.VM("8M", profile=profile, check=True) as vm:
        kvm = vm.board.kvm

        def begin():
            for name in ("user A", "user B"):
                kvm_page_track_register_notifier(kvm, User(name), kvm.mm)
            kvm_write_track_add_gfn(kvm, TRACKED)

        vm.board.host.sched.run_task("begin", begin)
        vm.load(payload)
        with vm.trace("refault:spte_install", "refault:spte_zap", "refault:host_op") as trace:
            vm.run()
        for event in trace:
            if event.args.get("gfn") == TRACKED or event.args.get("op") == "swap_out":
                print(event.event, {k: hex(v) if isinstance(v, int) else v for k, v in event.args.items()})
        print("still tracked by", kvm.slots().gfn_to_memslot(TRACKED).gfn_write_track[TRACKED])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "linux-6.18")

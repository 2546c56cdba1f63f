"""How the models say no.

`KernelError` is what a system call or an ioctl would return: an errno with its reason.
`BrokenTruth` says that the model broke one of its own rules; it names the truth and the event.
`OutOfMemory` is the OOM killer finding nothing to kill.
"""

from __future__ import annotations

import errno as _errno

__all__ = ["EHWPOISON", "BrokenTruth", "KernelError", "OutOfMemory"]

EHWPOISON = 133
"""Python's errno module does not have it everywhere."""


class KernelError(OSError):
    """A system call's refusal. `errno` is the positive number; `name` its symbol."""

    def __init__(self, errno: int, why: str) -> None:
        super().__init__(errno, why)
        self.why = why

    @property
    def name(self) -> str:
        """`EINVAL` and the like."""
        return _errno.errorcode.get(self.errno or 0, str(self.errno))

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


class OutOfMemory(Exception):
    """No frame can be had and nothing is left to reclaim."""


class BrokenTruth(Exception):
    """A rule of the model does not hold.

    `truth` is the rule's stable kebab-case name, `what` one sentence with the numbers, `seq` the
    sequence number of the event that broke it where one is known, `event` that event in words.
    """

    event = ""

    def __init__(self, truth: str, what: str, seq: int | None = None) -> None:
        super().__init__(truth, what, seq)
        self.truth = truth
        self.what = what
        self.seq = seq

    def __str__(self) -> str:
        if self.seq is None:
            return f"{self.truth}: {self.what}"
        return f"{self.truth}: {self.what} (event {self.seq}{': ' * bool(self.event)}{self.event})"

    def first(self) -> BrokenTruth:
        """The truth that broke first: what is found while its task unwinds follows from it."""
        found = self
        while isinstance(found.__context__, BrokenTruth):
            found = found.__context__
        return found

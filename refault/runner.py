"""`refault run`: one guest from load to verdict.

Data (the guest's serial output) goes to stdout, talk to stderr. The exit code tells how it ended:
see `refault.errors`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from host_mm.kernel.errors import BrokenTruth
from refault.errors import EXIT_DIED, EXIT_FAILED, EXIT_OK, EXIT_SKIPPED, UsageError
from refault.host_script import start_host_script
from refault.vm import VM
from trace_events.ndjson import TraceWriter
from trace_events.stream import Listener, TraceStream

if TYPE_CHECKING:
    from emu.board import Stop
    from refault.observer import Observer
    from refault.options import RunOptions

__all__ = ["run", "verdict"]

STATUS_SKIPPED = 77


def verdict(stop: Stop, serial: str) -> tuple[int, str]:
    """(exit code, one sentence) for how a guest ended."""
    if stop.kind == "exit":
        failed = any(line.startswith(("FAIL", "ABORT")) for line in serial.splitlines())
        if stop.status == 0 and not failed:
            return EXIT_OK, "the guest passed"
        if stop.status == STATUS_SKIPPED and not failed:
            return EXIT_SKIPPED, "the guest skipped all its tests"
        return EXIT_FAILED, f"the guest failed: it wrote {stop.status:#x} to its exit port"
    return EXIT_DIED, f"the guest did not finish: {stop.why}"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C as a question asked between slices: an exception could strike inside a callback."""
    pressed: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        pressed.append(number)

    try:
        before = signal.signal(signal.SIGINT, on_signal)
    except ValueError:
        # Not the main thread: the caller's own handling stands.
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _naming_the_event() -> Iterator[list[TraceStream]]:
    """A broken truth that leaves here says which event of the yielded streams broke it."""
    streams: list[TraceStream] = []
    try:
        yield streams
    except BrokenTruth as exc:
        for stream in streams:
            exc.seq = stream.here() if exc.seq is None else exc.seq
            exc.event = stream.told(exc.seq)
        raise


def _build(options: RunOptions) -> VM:
    out = sys.stderr if options.json or options.kvm_stat is not None else sys.stdout

    def output(data: bytes) -> None:
        out.write(data.decode("latin-1"))
        out.flush()

    return VM(
        options.memory, memory_backend=options.memory_backend, host_ram=options.host_ram, swap=options.swap,
        vcpus=options.vcpus, mmu=options.mmu, profile=options.profile, params=options.params,
        seed=options.seed, breaks=options.breaks, check=options.check,
        interpreted=options.interpreted, output=output,
    )


def _script_text(options: RunOptions) -> str | None:
    if options.host_script is None:
        return None
    try:
        return Path(options.host_script).read_text()
    except OSError as exc:
        raise UsageError(f"--host {options.host_script}: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--host {options.host_script}: not a text file") from None


def run(options: RunOptions) -> int:
    """Run one guest; returns the exit code. UsageError for bad input."""
    from refault.kvmstat import collect_kvm
    from refault.observer import Observer
    from refault.output import print_json
    from refault.registry import check_globs
    from refault.summary import print_summary

    script = _script_text(options)
    if options.trace is not None:
        check_globs(options.events)
    with ExitStack() as stack:
        streams = stack.enter_context(_naming_the_event())
        vm = stack.enter_context(_build(options))
        stream = vm.board.host.stream
        streams.append(stream)
        extra = {"host_script": script, "max_insns": options.max_insns}
        vm.extra = {name: value for name, value in extra.items() if value is not None}
        image = vm.prepare(options.payload, *options.words)
        observer = Observer(vm)
        stream.listen(Listener(observer.globs, observer, ancestors=False))
        writer = None
        if options.trace is not None:
            writer = TraceWriter(options.trace, vm.header(options.events)["machine"], options.events)
            recorder = Listener(options.events, writer.write)
            stack.callback(writer.close, "interrupted")
            # The machine is torn down after this, and that is not part of the run.
            stack.callback(stream.unlisten, recorder)
            stream.listen(recorder)
        interrupted = stack.enter_context(_interruptible())
        vm.board.load(image)
        if script is not None:
            start_host_script(vm, script)
        stop = _run_until_end(vm, options, interrupted, observer)
        vm.finish()
        if writer is not None:
            stream.unlisten(recorder)
            # Where real time cut it off, a rerun would not stop by itself.
            writer.close("interrupted" if stop.kind == "timeout" else "complete")
        code, sentence = verdict(stop, vm.serial)
        if not options.quiet:
            count = writer.count if writer is not None else 0
            summary = observer.summary(sentence, code, trace=options.trace, trace_events=count)
            (print_json if options.json else print_summary)(summary)
        if options.kvm_stat is not None:
            options.kvm_stat.append(collect_kvm(vm.board.kvm))
        return code


def _run_until_end(
    vm: VM, options: RunOptions, interrupted: Callable[[], bool], observer: Observer
) -> Stop:
    def poll() -> bool:
        if interrupted():
            raise KeyboardInterrupt
        observer.tick()
        return False

    try:
        return vm.run(poll, max_insns=options.max_insns, timeout=options.timeout)
    finally:
        observer.done()

import json
import os

import pytest

from trace_events.event import Event
from trace_events.ndjson import Trace, TraceError, TraceWriter, read_trace, write_trace

MACHINE = {"seed": 1, "memory": 64 << 20, "host": {"swap": 1, "ram": 2}}
EVENTS = [
    Event(0, 10, "kvm:kvm_entry", "CPU 0/KVM", vcpu=0, args={"vcpu_id": 0, "guest_rip": (1 << 64) - 1}),
    Event(1, 20, "refault:host_op", "vmm", args={"op": "swap_out"}),
    Event(
        2, 30, "kvm:kvm_page_fault", "CPU 0/KVM", vcpu=0, cause=0, killed_by=1, args={"x": None, "y": True}
    ),
]


def write(path, events=EVENTS, end="complete", globs=("*",)):
    write_trace(path, Trace({"machine": MACHINE, "events": list(globs)}, list(events), end))
    return path


def test_what_is_written_is_read_back(tmp_path):
    trace = read_trace(write(tmp_path / "t.ndjson", end="interrupted", globs=("kvm:*",)))
    assert trace.events == EVENTS
    assert trace.machine == MACHINE
    assert trace.end == "interrupted"
    assert trace.globs == ("kvm:*",)


def test_the_same_trace_is_the_same_bytes_whatever_the_order_of_its_configuration(tmp_path):
    one = write(tmp_path / "a").read_bytes()
    shuffled = {"host": {"ram": 2, "swap": 1}, "memory": 64 << 20, "seed": 1}
    write_trace(tmp_path / "b", Trace({"machine": shuffled, "events": ["*"]}, EVENTS))
    assert one == (tmp_path / "b").read_bytes()


def test_a_line_is_plain_json(tmp_path):
    lines = [json.loads(line) for line in write(tmp_path / "t").read_text().splitlines()]
    assert lines[0]["format"] == "refault-trace"
    assert lines[1]["args"] == {"vcpu_id": 0, "guest_rip": (1 << 64) - 1}
    assert "cause" not in lines[1]
    assert lines[-1] == {"end": "complete", "events": 3}


def test_events_come_back_by_number(tmp_path):
    path = write(tmp_path / "t", events=[EVENTS[2], EVENTS[0], EVENTS[1]])
    assert [event.seq for event in read_trace(path).events] == [0, 1, 2]


def test_a_trace_has_no_name_before_it_is_whole(tmp_path):
    path = tmp_path / "t"
    with TraceWriter(path, MACHINE) as writer:
        writer.write(EVENTS[0])
        assert not path.exists()
    assert path.exists()
    assert os.listdir(tmp_path) == ["t"]


def interrupted(path):
    with TraceWriter(path, MACHINE) as writer:
        writer.write(EVENTS[0])
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_a_readable_trace_that_says_so(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "t")
    trace = read_trace(tmp_path / "t")
    assert (trace.end, len(trace.events)) == ("interrupted", 1)


def test_a_discarded_trace_leaves_the_old_one(tmp_path):
    path = write(tmp_path / "t")
    before = path.read_bytes()
    writer = TraceWriter(path, MACHINE)
    writer.discard()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t"]


def test_an_unwritable_destination_is_refused_before_the_run(tmp_path):
    with pytest.raises(TraceError, match="it is a directory"):
        TraceWriter(tmp_path, MACHINE)
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"cannot write trace .*: (Not a directory|File exists)"):
        TraceWriter(tmp_path / "file" / "t", MACHINE)


def test_a_full_disk_is_a_trace_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    writer = TraceWriter(
        "/dev/shm/refault-never" if os.path.isdir("/dev/shm") else "/tmp/refault-never", MACHINE
    )
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(TraceError, match="No space left"):
        writer.write(EVENTS[0])
    assert not writer._temporary.exists()


def damaged(tmp_path, edit):
    path = write(tmp_path / "t")
    path.write_bytes(edit(path.read_bytes()))
    return path


HEADER = b'{"format":"refault-trace","version":1,"machine":{},"events":["*"]}\n'


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"hello\n", "not a refault trace"),
        (lambda data: b"\x7fELF\x02\x01\x00", "not a refault trace"),
        (lambda data: b'{"format":"other"}\n', "not a refault trace"),
        (lambda data: b"[1]\n", "not a refault trace"),
        (lambda data: data.replace(b'"version":1', b'"version":9'), "trace format version 9"),
        (lambda data: b'{"format":"refault-trace","version":1}\n', "no machine configuration"),
        (lambda data: data[: len(data) // 2], "the trace is cut off after"),
        (lambda data: data[: data.rindex(b'{"end"')], "cut off after 3 events"),
        (lambda data: HEADER, "cut off after 0 events"),
        (lambda data: data.replace(b'{"seq":1', b'{"seq":"one"', 1), "line 3 is not an event"),
        (lambda data: data.replace(b'{"seq":1', b"nonsense", 1), "line 3 is not an event"),
        (lambda data: data.replace(b'"vmm"', b'"\xff\xfe"', 1), "line 3 is not an event"),
        (lambda data: data.replace(b'"events":3}', b'"events":4}'), "counts 4 events, the file holds 3"),
        (lambda data: data + b'{"end":"complete","events":3}\n', "something follows the end record"),
    ],
)
def test_a_bad_file_is_one_precise_line(tmp_path, edit, why):
    path = damaged(tmp_path, edit)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert why in text
    assert "\n" not in text


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TraceError, match="no such trace file"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(TraceError, match="is a directory"):
        read_trace(tmp_path)

import msgspec

from refault.compare import first_difference, header_differences


def changed(event, /, **fields):
    return msgspec.structs.replace(event, **fields)


def test_equal_traces_have_no_difference(events):
    assert first_difference(events, list(events)) is None


def test_the_first_differing_argument_is_named(events):
    other = list(events)
    other[5] = changed(other[5], args={**other[5].args, "gfn": 9, "why": "z"}, ts=1)
    found = first_difference(events, other)
    assert (found.index, found.field) == (5, "gfn")


def test_ignored_fields_do_not_count(events):
    other = [changed(event, ts=event.ts + 1) for event in events]
    assert first_difference(events, other).field == "ts"
    assert first_difference(events, other, {"ts"}) is None


def test_another_event_comes_before_its_arguments(events):
    other = list(events)
    other[2] = changed(other[2], event="kvm:kvm_exit", args={})
    assert first_difference(events, other).field == "event"


def test_a_shorter_trace_differs_at_its_end(events):
    found = first_difference(events, events[:4])
    assert (found.index, found.field, found.right) == (4, "end of trace", None)


def test_a_missing_argument_is_not_none(events):
    one, other = changed(events[0], args={"x": None}), changed(events[0], args={})
    assert first_difference([one], [other]).field == "x"


def test_settings_that_differ_are_named_by_path():
    assert header_differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 != 3"]
    assert header_differences({"a": 1}, {}) == ["a: 1 != None"]

import pytest

from trace_events.event import Event
from trace_events.filters import FilterError, compile_filter, compile_globs

ZAP = Event(7, 100, "refault:spte_zap", "kswapd0", args={"gfn": 0x210, "level": 1, "why": "mmu-notifier"})
EXIT = Event(8, 200, "kvm:kvm_exit", "CPU 0/KVM", vcpu=0, cause=3, args={"exit_reason": 48})


def holds(text: str, event: Event = ZAP) -> bool:
    return compile_filter([text])(event)


@pytest.mark.parametrize(
    "text",
    [
        "refault/spte_zap",
        "refault/spte_zap : gfn == 0x210",
        "refault : gfn >= 528 && level == 1",
        "spte_zap : gfn == 0x200..0x210",
        "spte_zap : gfn != 0x0..0x20f",
        "*zap : why ~ 'mmu*' && !(level > 1)",
        'spte_zap : why !~ "ksm*"',
        "spte_zap : why == mmu-notifier",
        "spte_zap : gfn & 0x10",
        "spte_zap : bogus == 1 || COMM == kswapd0",
        "spte_zap : seq == 7 && ts < 101",
        "kvm_exit, spte_zap : gfn > 1",
        "spte_zap:gfn==528",
    ],
)
def test_a_filter_that_holds(text):
    assert holds(text)


@pytest.mark.parametrize(
    "text",
    [
        "kvm : gfn == 0x210",
        "spte_zap : bogus == 1",
        "spte_zap : bogus != 1",
        "spte_zap : gfn == 0x211",
        "spte_zap : gfn == 0..0x20f",
        "spte_zap : !(gfn == 0x210)",
        "spte_zap : level == 1 && level == 2",
        "spte_zap : killed_by == 3",
    ],
)
def test_a_filter_that_does_not_hold(text):
    assert not holds(text)


def test_and_binds_closer_than_or():
    assert holds("spte_zap : level == 1 || level == 2 && gfn == 0")
    assert not holds("spte_zap : (level == 1 || level == 2) && gfn == 0")


def test_one_of_several_filters_is_enough():
    match = compile_filter(["kvm_exit : exit_reason == 48", "spte_zap : gfn == 0"])
    assert match(EXIT)
    assert not match(ZAP)


def test_common_fields_are_those_of_the_event():
    assert holds("kvm_exit : CPU == 0 && cause == 3", EXIT)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (": gfn == 1", "must begin with the events"),
        ("spte_zap : gfn ==", "expected a value, found the end"),
        ("spte_zap : gfn 3", "expected a comparison, found '3'"),
        ("spte_zap : == 3", "expected a field name, found '=='"),
        ("spte_zap : (gfn == 3", "expected ')', found the end"),
        ("spte_zap : gfn == 3 level == 1", "expected '&&', '||' or the end, found 'level'"),
        ("spte_zap : gfn == $", "cannot read"),
        ("spte_zap : gfn < 1..2", "a range needs"),
        ("spte_zap : gfn & why", "'&' needs a number"),
    ],
)
def test_a_filter_that_does_not_parse_says_where(text, why):
    with pytest.raises(FilterError) as caught:
        compile_filter([text])
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_word_matches_an_event_or_a_system():
    match = compile_globs(["kvm"])
    assert match("kvm:kvm_exit")
    assert match("other:kvm")
    assert not match("kvmmmu:fast_page_fault")
    assert compile_globs(["kvm:*,refault:spte_*"])("refault:spte_zap")
    assert not compile_globs([])("kvm:kvm_exit")

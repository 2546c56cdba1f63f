from trace_events.event import Event
from trace_events.text import TextReport
from trace_events.tracepoint import Tracepoint

EXIT = Tracepoint("kvm", "kvm_exit", ("vcpu_id", "exit_reason"), lambda v, r: f"vcpu {v} reason {r}")


def report(**options):
    return TextReport(["vmm", "CPU 0/KVM"], {"kvm:kvm_exit": EXIT}.get, **options)


def event(ts=1_234_567, name="kvm:kvm_exit", task="CPU 0/KVM", vcpu=0, **args):
    return Event(0, ts, name, task, vcpu, args=args or {"vcpu_id": 0, "exit_reason": 48})


def test_the_line_is_trace_cmds():
    assert report().line(event()) == (
        "       CPU 0/KVM-1001  [000] .....     0.001235: kvm_exit:             vcpu 0 reason 48"
    )


def test_t_shows_nanoseconds():
    assert " ..... 12.000000007: " in report(nanoseconds=True).line(event(ts=12_000_000_007)).replace(
        ".....    ", "..... "
    )


def test_deltas_are_between_shown_lines():
    lines = report(deltas=True)
    assert " (+" not in lines.line(event(ts=1000))
    assert " (+5)     kvm_exit:" in lines.line(event(ts=6000))


def test_an_unknown_event_shows_its_fields():
    assert (
        report()
        .line(event(name="x:y", gfn=0x210, why="ksm"))
        .endswith(": y:                    gfn=0x210 why=ksm")
    )


def test_other_fields_than_declared_are_shown_as_they_are():
    assert report().line(event(vcpu_id=0)).endswith("vcpu_id=0")


def test_pids_follow_first_appearance_in_the_whole_trace():
    lines = report()
    assert "-1000 " in lines.line(event(task="vmm"))
    assert "-1002 " in lines.line(event(task="kswapd0"))


def test_a_newline_in_a_field_cannot_forge_a_line():
    assert "\n" not in report().line(event(name="x:y", text="a\nb"))

import pytest

from refault.exitstat import collect, format_table
from trace_events.event import Event


def test_exits_are_counted_from_exit_to_entry(events):
    stat = collect(events)
    assert [(row.name, row.samples, row.min, row.max) for row in stat.rows] == [
        ("EPT_VIOLATION", 2, 1_000, 80_000),
        ("HLT", 1, 500, 500),
    ]
    assert (stat.samples, stat.time) == (3, 81_500)


def test_the_table_is_perfs(events):
    header = ("VM-EXIT", "Samples", "Samples%", "Time%", "Min Time", "Max Time", "Avg time")
    lines = [
        "",
        "",
        "Analyze events for all VMs, all VCPUs:",
        "",
        "{:>40} {:>10} {:>9} {:>9} {:>11} {:>11} {:>16} ".format(*header),
        "",
        f"{'EPT_VIOLATION':>40}          2    66.67%    99.39%      1.00us     80.00us "
        "    40.50us ( +-  97.53% )",
        f"{'HLT':>40}          1    33.33%     0.61%      0.50us      0.50us "
        "     0.50us ( +-   0.00% )",
        "",
        "Total Samples:3, Total events handled time:81.50us.",
        "",
        "",
    ]
    assert format_table(collect(events)).split("\n") == lines


@pytest.mark.parametrize(
    ("key", "first"), [("sample", "EPT_VIOLATION"), ("min_t", "EPT_VIOLATION"), ("time", "EPT_VIOLATION")]
)
def test_rows_are_sorted_by_the_key(events, key, first):
    assert collect(events, key=key).rows[0].name == first


def test_one_vcpu_can_be_chosen(events):
    assert collect(events, vcpu=1).rows == []
    assert "VCPU 1:" in format_table(collect(events, vcpu=1))


def test_an_exit_without_an_entry_is_no_sample(events):
    assert collect(events[:2]).samples == 0


def test_mmio_reads_run_from_the_exit_and_writes_to_the_entry():
    task = "CPU 0/KVM"
    events = [
        Event(0, 0, "kvm:kvm_exit", task, 0, args={"exit_reason": 49}),
        Event(1, 700, "kvm:kvm_mmio", task, 0, args={"type": 1, "len": 4, "gpa": 0xFED00000, "val": 0}),
        Event(2, 900, "kvm:kvm_entry", task, 0, args={}),
        Event(3, 1000, "kvm:kvm_exit", task, 0, args={"exit_reason": 49}),
        Event(4, 1100, "kvm:kvm_mmio", task, 0, args={"type": 2, "len": 4, "gpa": 0xFED00000, "val": 1}),
        Event(5, 1400, "kvm:kvm_entry", task, 0, args={}),
    ]
    rows = {row.name: row.time for row in collect(events, kind="mmio").rows}
    assert rows == {"0xfed00000:R": 700, "0xfed00000:W": 300}


def test_ports_run_from_the_access_to_the_entry():
    events = [
        Event(0, 0, "kvm:kvm_pio", "t", 0, args={"rw": 1, "port": 0x3F8, "size": 1, "count": 1, "val": 65}),
        Event(1, 250, "kvm:kvm_entry", "t", 0, args={}),
    ]
    assert [(row.name, row.time) for row in collect(events, kind="ioport").rows] == [("0x3f8:POUT", 250)]

"""emu/devices: ports answer as the PC's parts do, on logical time."""

from emu.devices.bus import PortBus
from emu.devices.exitport import ExitPort
from emu.devices.pic import PicPair
from emu.devices.pit import Pit
from emu.devices.serial import Serial
from host_mm.kernel.sched import Scheduler
from trace_events.stream import TraceStream


def init_pic(pic, mask=0x00):
    for port, value in ((0x20, 0x11), (0xA0, 0x11), (0x21, 0x20), (0xA1, 0x28), (0x21, 4), (0xA1, 2),
                        (0x21, 1), (0xA1, 1), (0x21, mask), (0xA1, mask)):
        pic.write(port, 1, value)


def test_unknown_ports_read_all_ones():
    bus = PortBus()
    assert [bus.read(0x1234, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    bus.write(0x1234, 4, 5)


def test_exit_port_reports_the_status():
    got = []
    bus = PortBus()
    bus.register(0xF4, 0xF4, ExitPort(got.append))
    bus.write(0xF4, 4, 77)
    assert got == [77]


def test_serial_sends_and_looks_empty():
    sent = []
    serial = Serial(0x3F8, sent.append)
    for byte in b"hi":
        assert serial.read(0x3FD, 1) & 0x20
        serial.write(0x3F8, 1, byte)
    assert b"".join(sent) == b"hi"
    serial.write(0x3FB, 1, 0x83)
    serial.write(0x3F8, 1, 1)
    assert serial.read(0x3F8, 1) == 1
    assert len(sent) == 2


def test_serial_interrupts_for_empty_transmitter_and_input():
    level = []
    serial = Serial(0x3F8, lambda data: None, level.append)
    serial.write(0x3F9, 1, 2)
    assert level[-1] is True
    assert serial.read(0x3FA, 1) & 0xF == 2
    assert level[-1] is False
    serial.write(0x3F9, 1, 1)
    serial.receive(b"x")
    assert level[-1] is True
    assert serial.read(0x3FA, 1) & 0xF == 4
    assert serial.read(0x3F8, 1) == ord("x")
    assert level[-1] is False


def test_pic_delivers_by_priority_and_eoi():
    pic = PicPair()
    init_pic(pic)
    pic.pulse(4)
    pic.pulse(0)
    assert pic.ack() == 0x20
    assert not pic.has_interrupt()
    pic.write(0x20, 1, 0x20)
    assert pic.ack() == 0x24
    pic.write(0x20, 1, 0x64)
    assert not pic.has_interrupt()


def test_slave_interrupts_through_input_2():
    pic = PicPair()
    init_pic(pic)
    pic.pulse(9)
    assert pic.ack() == 0x29
    pic.write(0xA0, 1, 0x20)
    pic.write(0x20, 1, 0x20)
    assert not pic.has_interrupt()


def test_masked_requests_wait_and_lost_ones_are_spurious():
    pic = PicPair()
    init_pic(pic, mask=0xFF)
    pic.set_irq(1, True)
    assert not pic.has_interrupt()
    pic.write(0x21, 1, 0xFD)
    assert pic.has_interrupt()
    pic.set_irq(1, False)
    assert not pic.has_interrupt()
    assert pic.ack() == 0x27


def test_pit_ticks_without_drift():
    sched = Scheduler(TraceStream())
    ticks = []
    pit = Pit(sched, lambda: ticks.append(sched.now))
    pit.write(0x43, 1, 0x34)
    pit.write(0x40, 1, 11932 & 0xFF)
    pit.write(0x40, 1, 11932 >> 8)
    for _ in range(1000):
        sched.advance(1_000_003)
    assert len(ticks) == 1_000_003_000 * 1_193_182 // 1_000_000_000 // 11932
    pit.write(0x43, 1, 0x30)
    before = len(ticks)
    sched.advance(1_000_000_000)
    assert len(ticks) == before


def test_pit_counts_down_and_latches():
    sched = Scheduler(TraceStream())
    pit = Pit(sched, lambda: None)
    pit.write(0x43, 1, 0xB4)
    pit.write(0x42, 1, 0xFF)
    pit.write(0x42, 1, 0xFF)
    sched.advance(1_000_000)
    pit.write(0x43, 1, 0x80)
    first = pit.read(0x42, 1) | pit.read(0x42, 1) << 8
    assert first == 0xFFFF - 1193

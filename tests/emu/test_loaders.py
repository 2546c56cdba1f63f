"""emu/loaders: good images load where they say, everything else is a one-line LoaderError."""

import random
import struct

import pytest

from emu.loaders import load_image
from emu.loaders.image import BOOT_CR3, BOOT_GDT, FLAT_BASE, MBI_BASE, LoaderError, identity_tables
from emu.loaders.multiboot import BOOT_MAGIC, HEADER_MAGIC

MEM = 16 << 20


def elf64(segments, entry=0x100000, machine=62, etype=2):
    """segments: (vaddr, paddr, data, memsz)"""
    out = bytearray(b"\x7fELF\x02\x01\x01" + bytes(9))
    out += struct.pack("<HHIQQQIHHHHHH", etype, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    offset = 64 + 56 * len(segments)
    for vaddr, paddr, data, memsz in segments:
        out += struct.pack("<IIQQQQQQ", 1, 7, offset, vaddr, paddr, len(data), memsz, 0x1000)
        offset += len(data)
    for _, _, data, _ in segments:
        out += data
    return bytes(out)


def multiboot_flat(body=b"\xf4" * 64, flags=1 << 16, load=0x100000, bss=0, entry=None):
    header = struct.pack("<3I", HEADER_MAGIC, flags, -(HEADER_MAGIC + flags) & 0xFFFFFFFF)
    header += struct.pack("<5I", load, load, 0, bss, load + 32 if entry is None else entry)
    return header + body


def test_elf64_loads_at_its_physical_addresses():
    image = load_image(elf64([(0xFFFFFFFF80100000, 0x100000, b"\x90\xf4", 0x5000)], 0xFFFFFFFF80100001), MEM)
    assert (image.kind, image.mode, image.entry) == ("elf64", "long", 0x100001)
    assert image.segments[0] == (0x100000, b"\x90\xf4")
    assert image.end == 0x105000


def test_multiboot_wins_over_flat_and_passes_the_boot_information():
    image = load_image(multiboot_flat(bss=0x180000), MEM, "hello")
    assert (image.kind, image.mode, image.entry, image.end) == ("multiboot", "protected", 0x100020, 0x180000)
    assert image.registers == {"rax": BOOT_MAGIC, "rbx": MBI_BASE}
    base, mbi = image.segments[1]
    flags, lower, upper, _, cmdline = struct.unpack_from("<5I", mbi)
    assert (base, lower, upper) == (MBI_BASE, 639, (MEM >> 10) - 1024)
    assert mbi[cmdline - base :] == b"hello\0"
    assert flags & 1 << 6


def test_anything_else_is_flat_at_1_mib():
    image = load_image(b"\xf4", MEM)
    assert (image.kind, image.entry, image.segments[0]) == ("flat", FLAT_BASE, (FLAT_BASE, b"\xf4"))
    assert {base for base, _ in image.segments} >= {BOOT_GDT, BOOT_CR3}


def test_identity_tables_map_guest_memory_onto_itself():
    for size in (MEM, 6 << 30, 200 << 30):
        memory = {}
        for base, data in identity_tables(size):
            for i, entry in enumerate(struct.unpack(f"<{len(data) // 8}Q", data)):
                memory[base + 8 * i] = entry
        for address in (0, 0x12345678, size - 1, max(size, 4 << 30) - 1):
            entry = memory[BOOT_CR3 + 8 * (address >> 39)]
            entry = memory[(entry & ~0xFFF) + 8 * (address >> 30 & 511)]
            assert entry & 1
            if not entry & 0x80:
                entry = memory[(entry & ~0xFFF) + 8 * (address >> 21 & 511)]
                assert entry & ~0xFFF == address & ~0x1FFFFF
            else:
                assert entry & ~0xFFF == address & ~0x3FFFFFFF


ONE = (0x100000, 0x100000, b"\xf4", 1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "nothing to load"),
        (b"\x7fELF", "32-bit"),
        (b"\x7fELF\x01" + bytes(60), "32-bit"),
        (elf64([ONE])[:40], "damaged"),
        (elf64([ONE])[:70], "damaged"),
        (elf64([(0x100000, 0x100000, b"\xf4" * 99, 99)])[:-50], "behind the end of the file"),
        (elf64([(0x100000, 0x100000, b"\xf4", 1 << 60)]), "outside guest memory"),
        (elf64([(0x100000, (1 << 64) - 1, b"\xf4", 1)]), "outside guest memory"),
        (elf64([ONE, (0x100000, 0x100000, b"\xf4", 1)]), "overlap"),
        (elf64([(0x1000, 0x1000, b"\xf4", 1)], 0x1000), "boot structures"),
        (elf64([ONE], entry=0x200000), "no segment"),
        (elf64([ONE], machine=183), "not x86"),
        (elf64([ONE], etype=3), "not a fixed-address"),
        (elf64([]), "nothing to load"),
        (multiboot_flat(flags=1 << 16 | 1 << 5), "not offered"),
        (multiboot_flat(flags=0), "without addresses"),
        (multiboot_flat(entry=0), "no segment"),
        (multiboot_flat(bss=0xFFFFFFFF), "outside guest memory"),
        (multiboot_flat()[:16], "cut off"),
        (bytes(MEM), "outside guest memory"),
    ],
)
def test_bad_input_is_one_line(data, why):
    with pytest.raises(LoaderError) as caught:
        load_image(data, MEM)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_thousand_damaged_images_never_escape_as_another_error():
    rng = random.Random(1)
    good = [elf64([ONE, (0x200000, 0x200000, b"data" * 100, 0x4000)]), multiboot_flat(), b"\x7fELF\x02"]
    refused = []
    for _ in range(1000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randrange(1, 12)):
            if data:
                byte = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
                data[rng.randrange(min(len(data), 200))] = byte
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data) + 1)]
        try:
            image = load_image(bytes(data), MEM)
        except LoaderError as err:
            refused.append(str(err))
        else:
            assert all(base + len(body) <= MEM for base, body in image.segments)
    assert len(refused) > 200
    assert not any("\n" in text for text in refused)

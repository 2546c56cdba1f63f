"""Flat binaries: the file's bytes at 1 MiB, started there in long mode."""

from __future__ import annotations

from emu.loaders.image import FLAT_BASE, Image, boot_end, boot_structures, check_segments

__all__ = ["load_flat"]


def load_flat(data: bytes, memory_size: int) -> Image:
    """The whole file at FLAT_BASE, which is also the entry point."""
    spans = [(FLAT_BASE, len(data))] if data else []
    check_segments(spans, memory_size, boot_end(memory_size, long_mode=True), "flat")
    return Image(
        kind="flat", mode="long", entry=FLAT_BASE, end=FLAT_BASE + len(data),
        segments=[(FLAT_BASE, data), *boot_structures(memory_size, long_mode=True)], registers={},
    )

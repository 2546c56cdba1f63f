"""Guest program files: `load_image` recognises the format, `image.py` says what comes out.

elf.py: ELF64. multiboot.py: multiboot 1. flat.py: raw bytes. image.py: the common form and the
boot structures in low memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu.loaders.image import Image as Image
    from emu.loaders.image import LoaderError as LoaderError

__all__ = ["Image", "LoaderError", "load_image"]


def __getattr__(name: str) -> Any:
    if name in ("Image", "LoaderError"):
        from emu.loaders import image

        return getattr(image, name)
    raise AttributeError(name)


def load_image(data: bytes, memory_size: int, cmdline: str = "") -> Image:
    """The image in `data` for a guest of `memory_size` bytes; LoaderError (one line) if it is none.

    A multiboot header wins over ELF, so that one file serves both kinds of machine.
    """
    from emu.loaders.elf import load_elf64
    from emu.loaders.flat import load_flat
    from emu.loaders.image import LoaderError
    from emu.loaders.multiboot import find_header, load_multiboot

    if find_header(data) is not None:
        return load_multiboot(data, memory_size, cmdline)
    if data[:4] == b"\x7fELF":
        if len(data) < 5 or data[4] != 2:
            raise LoaderError("ELF: a 32-bit file without a multiboot header")
        return load_elf64(data, memory_size)
    return load_flat(data, memory_size)

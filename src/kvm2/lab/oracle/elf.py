"""What a shared object or program needs: the DT_NEEDED names of a 64-bit little-endian ELF file."""

from __future__ import annotations

import struct

PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB = 1, 5


def needed(image: bytes) -> list[str]:
    """The libraries that the dynamic linker will look for; none for what is no dynamic ELF file."""
    if image[:6] != b"\x7fELF\x02\x01":
        return []
    (offset,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    loads: list[tuple[int, int, int]] = []
    dynamic: tuple[int, int] | None = None
    for index in range(count):
        kind, _, at, address, _, length, *_ = struct.unpack_from("<IIQQQQQQ", image, offset + index * size)
        if kind == PT_LOAD:
            loads.append((address, at, length))
        elif kind == PT_DYNAMIC:
            dynamic = (at, length)
    if dynamic is None:
        return []
    entries = list(struct.iter_unpack("<qQ", image[dynamic[0] : dynamic[0] + dynamic[1] // 16 * 16]))
    strings = next((value for tag, value in entries if tag == DT_STRTAB), 0)
    base = next((at + strings - address for address, at, length in loads if address <= strings < address + length), 0)
    return [_text(image, base + value) for tag, value in entries if tag == DT_NEEDED]


def _text(image: bytes, at: int) -> str:
    return image[at : image.index(b"\0", at)].decode()

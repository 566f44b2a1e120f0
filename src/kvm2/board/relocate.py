"""Position-independent guests (ET_DYN): moved to the RAM base, with the relocations that need no symbol.

`aarch64-linux-gnu-gcc -nostdlib` makes these where the compiler's default is PIE. ELF for the Arm 64-bit architecture,
System V ABI for x86-64: R_AARCH64_RELATIVE and R_X86_64_RELATIVE write base + addend; DT_RELR is their compact form.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvm2.errors import GuestError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAIR = struct.Struct("<QQ")
_RELA = struct.Struct("<QQq")
_WORD = struct.Struct("<Q")
DT_NEEDED, DT_RELA, DT_RELASZ, DT_RELRSZ, DT_RELR, DT_JMPREL, DT_PLTRELSZ = 1, 7, 8, 35, 36, 23, 2
R_NONE = 0
R_AARCH64_RELATIVE = (1027, "R_AARCH64_RELATIVE")
R_X86_64_RELATIVE = (8, "R_X86_64_RELATIVE")
HOW = "link it with -static -no-pie -Wl,-Ttext-segment=ADDRESS"


class Relocator:
    """The segments of one image as they lie in the file (virtual address -> bytes), to be moved by `bias`."""

    def __init__(
        self, name: str, pieces: dict[int, bytearray], bias: int, relative: tuple[int, str] = R_AARCH64_RELATIVE
    ) -> None:
        self.name, self.pieces, self.bias, self.relative = name, pieces, bias, relative

    def apply(self, dynamic: bytes) -> None:
        """Apply every relocation that the dynamic section names. GuestError for one that needs a loader."""
        tags: dict[int, int] = {}
        for tag, value in _PAIR.iter_unpack(dynamic[: len(dynamic) // 16 * 16]):
            if tag == 0:
                break
            if tag == DT_NEEDED:
                raise GuestError(f"{self.name} needs shared libraries, and a bare machine has none: {HOW}")
            tags[tag] = value
        for table, size in ((DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)):
            if table in tags:
                self._rela(self._read(tags[table], tags.get(size, 0)))
        if DT_RELR in tags:
            for at in relr(self._read(tags[DT_RELR], tags.get(DT_RELRSZ, 0))):
                self._write(at, _WORD.unpack(self._read(at, 8))[0] + self.bias)

    def _rela(self, table: bytes) -> None:
        for at, info, addend in _RELA.iter_unpack(table[: len(table) // 24 * 24]):
            kind = info & 0xFFFF_FFFF
            if kind == self.relative[0]:
                self._write(at, self.bias + addend)
            elif kind != R_NONE:
                raise GuestError(
                    f"{self.name} has a relocation of type {kind} at {at:#x}, which a dynamic loader would resolve "
                    f"(kvm2 applies {self.relative[1]}): {HOW}"
                )

    def _piece(self, address: int, size: int) -> tuple[bytearray, int]:
        for start, data in self.pieces.items():
            if start <= address and address + size <= start + len(data):
                return data, address - start
        raise GuestError(f"{self.name} is broken: its dynamic section points at {address:#x}, outside its segments")

    def _read(self, address: int, size: int) -> bytes:
        data, offset = self._piece(address, size)
        return bytes(data[offset : offset + size])

    def _write(self, address: int, value: int) -> None:
        data, offset = self._piece(address, 8)
        _WORD.pack_into(data, offset, value & (1 << 64) - 1)


def relr(table: bytes) -> Iterator[int]:
    """The addresses that a DT_RELR table names: an even word is an address, an odd one a bitmap of the 63 words after.

    >>> [hex(at) for at in relr(struct.pack("<QQ", 0x1000, 0b1011))]
    ['0x1000', '0x1008', '0x1018']
    """
    at = 0
    for (word,) in _WORD.iter_unpack(table[: len(table) // 8 * 8]):
        if word & 1 == 0:
            yield word
            at = word + 8
            continue
        yield from (at + 8 * bit for bit in range(63) if word >> (bit + 1) & 1)
        at += 63 * 8

"""A guest's symbols, from a System.map or from an ELF with a symbol table (vmlinux): where an address lies.

>>> symbols = parse("map", b"ffff800080010000 T _text\\nffff800080010040 t start\\nffff800080020000 D data\\n")
>>> symbols.name(0xffff800080010044), symbols.name(0xffff80008001003f), symbols.name(0x1000)
('start+0x4', '_text+0x3f', None)
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvm2.board.loader import read_file
from kvm2.errors import GuestError

if TYPE_CHECKING:
    from pathlib import Path

_EHDR_SHOFF, _EHDR_SHENTSIZE = 40, 58
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
SHT_SYMTAB: Final = 2
STT_NOTYPE, STT_FUNC = 0, 2
SHN_UNDEF, SHN_ABS = 0, 0xFFF1
_LINE: Final = re.compile(rb"^([0-9a-fA-F]{8,16}) (\w) (\S.*)$", re.M)
_CODE: Final = frozenset(b"tTwW")  # of a System.map's types
_STUB: Final = re.compile(rb"The real System\.map is in the (\S+) package")
FARTHEST: Final = 1 << 20  # from the last symbol
WHAT: Final = "a System.map (`nm` of a kernel), or an ELF64 that has its symbol table, such as vmlinux"


@dataclass(frozen=True)
class Symbols:
    """Code symbols in the order of their addresses. `source` is the file's name."""

    source: str
    addresses: tuple[int, ...]
    names: tuple[str, ...]

    def name(self, address: int) -> str | None:
        """`symbol+0x10`, or `symbol` at its start; None below the first symbol and far behind the last."""
        at = bisect_right(self.addresses, address) - 1
        if at < 0 or (at == len(self.addresses) - 1 and address - self.addresses[at] >= FARTHEST):
            return None
        offset = address - self.addresses[at]
        return f"{self.names[at]}+{offset:#x}" if offset else self.names[at]

    def address(self, name: str) -> int | None:
        """Where a symbol is."""
        return self.addresses[self.names.index(name)] if name in self.names else None


def read_symbols(path: Path) -> Symbols:
    """The symbols in a file; GuestError where it has none: what it is, and what to give instead."""
    return parse(path.name, read_file(path))


def parse(name: str, data: bytes) -> Symbols:
    """The symbols in a file's contents."""
    found = _elf(name, data) if data[:4] == b"\x7fELF" else _map(name, data)
    if not found:
        raise GuestError(f"{name} has no symbols of code: give {WHAT}")
    # Of several names for one address the first in the file is shown.
    first: dict[int, str] = {}
    for address, symbol in found:
        first.setdefault(address, symbol)
    addresses = tuple(sorted(first))
    return Symbols(name, addresses, tuple(first[address] for address in addresses))


def _map(name: str, data: bytes) -> list[tuple[int, str]]:
    stub = _STUB.search(data)
    if stub:
        package = stub[1].decode("ascii", "replace")
        raise GuestError(
            f"{name} is Debian's stub without symbols: the real one is in {package}, in /usr/lib/debug/boot"
        )
    lines = _LINE.findall(data)
    if not lines:
        raise GuestError(f"{name} is no System.map (lines like `ffff800080010000 T _text`): give {WHAT}")
    return [(int(at, 16), symbol.decode("utf-8", "replace")) for at, kind, symbol in lines if kind[0] in _CODE]


def _elf(name: str, data: bytes) -> list[tuple[int, str]]:
    if data[4:6] != b"\x02\x01":
        raise GuestError(f"{name} is not a little-endian ELF64: give {WHAT}")
    try:
        (offset,) = struct.unpack_from("<Q", data, _EHDR_SHOFF)
        each, count = struct.unpack_from("<HH", data, _EHDR_SHENTSIZE)
        sections = [_SECTION.unpack_from(data, offset + number * each) for number in range(count)] if offset else []
        tables = [section for section in sections if section[1] == SHT_SYMTAB]
        return [symbol for table in tables for symbol in _table(data, table, sections)]
    except (struct.error, IndexError, ValueError) as error:
        raise GuestError(f"{name} is cut off, or no ELF after all ({error}): give {WHAT}") from None


def _table(data: bytes, table: tuple[int, ...], sections: list[tuple[int, ...]]) -> list[tuple[int, str]]:
    offset, size, link = table[4], table[5], table[6]
    strings = sections[link][4]
    found = []
    for place in range(offset, offset + size // _SYMBOL.size * _SYMBOL.size, _SYMBOL.size):
        string, info, _, section, value, _ = _SYMBOL.unpack_from(data, place)
        if info & 0xF not in (STT_NOTYPE, STT_FUNC) or section in (SHN_UNDEF, SHN_ABS) or not string:
            continue
        start = strings + string
        symbol = data[start : data.index(b"\0", start)].decode("utf-8", "replace")
        if symbol[0] != "$":  # the assembler's marks of code and data
            found.append((value, symbol))
    return found

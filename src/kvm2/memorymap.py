"""A guest's memory map on the command line: `512M@1G`, a size and the guest physical address where it begins.

>>> parse_memory("512M@1G")
MemoryRange(base=1073741824, size=536870912)
>>> [str(piece) for piece in parse_memory_map(["0x10000@0", "64G@1T"])]
['0x10000@0x0', '0x1000000000@0x10000000000']
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from kvm2.errors import UsageError
from kvm2.spec import MemoryRange

if TYPE_CHECKING:
    from collections.abc import Iterable

LARGEST_ADDRESS_BITS = 52  # the largest IPA size of any arm64 KVM

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_NUMBER = re.compile(r"(0x[0-9a-f]+|[0-9]+)(?:([kmgtp])(?:i?b)?)?\Z", re.IGNORECASE | re.ASCII)
_FORM = "SIZE@ADDRESS, numbers in decimal or 0x hexadecimal, with K, M, G, T or P (powers of 1024)"


def parse_number(text: str) -> int:
    """Bytes: decimal or 0x hexadecimal, with an optional unit. Raises UsageError.

    >>> parse_number("64K"), parse_number("0x100"), parse_number("2GiB")
    (65536, 256, 2147483648)
    """
    match = _NUMBER.match(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a number of bytes: give {_FORM}")
    return int(match[1], 0 if match[1][:2].lower() == "0x" else 10) << _UNITS[(match[2] or "").upper()]


def parse_memory(text: str) -> MemoryRange:
    """One range of guest memory from SIZE@ADDRESS.

    Raises UsageError: another form, no byte at all, or an end beyond 2^52, which no arm64 KVM can give.
    """
    size_text, at, address_text = text.partition("@")
    if not at:
        raise UsageError(f"memory {text!r} has no address: give {_FORM}")
    size, base = parse_number(size_text), parse_number(address_text)
    if size == 0:
        raise UsageError(f"memory {text!r} has no size: give at least one page")
    piece = MemoryRange(base, size)
    if piece.end > 1 << LARGEST_ADDRESS_BITS:
        raise UsageError(
            f"memory {text!r} ends at {piece.end:#x}: no arm64 KVM has guest addresses beyond 2^{LARGEST_ADDRESS_BITS}"
        )
    return piece


def parse_memory_map(texts: Iterable[str]) -> tuple[MemoryRange, ...]:
    """A whole map, ascending by address. Raises UsageError: as `parse_memory`, nothing given, ranges that overlap."""
    given = [(parse_memory(text), text) for text in texts]
    if not given:
        raise UsageError("no memory given: --memory SIZE@ADDRESS, once or more")
    given.sort(key=lambda entry: entry[0].base)
    for (before, before_text), (after, after_text) in itertools.pairwise(given):
        if after.base < before.end:
            raise UsageError(f"memory {before_text!r} and {after_text!r} overlap at {after.base:#x}")
    return tuple(piece for piece, _ in given)

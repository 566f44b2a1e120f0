"""SIZE@ADDRESS: every form, and every refusal by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm2.errors import UsageError
from kvm2.memorymap import parse_memory, parse_memory_map
from kvm2.spec import MemoryRange

GOOD = {
    "512M@1G": (512 << 20, 1 << 30),
    "64G@1T": (64 << 30, 1 << 40),
    "4096@0": (4096, 0),
    "0x1000@0x40000000": (4096, 1 << 30),
    "0X1000@0XA000": (4096, 0xA000),
    "1g@2t": (1 << 30, 1 << 41),
    "1GiB@4GB": (1 << 30, 4 << 30),
    "0x10K@1P": (16 << 10, 1 << 50),
    " 1M @ 2M ": (1 << 20, 2 << 20),
    "1P@3P": (1 << 50, 3 << 50),
    "4096@4503599627366400": (4096, (1 << 52) - 4096),
    "010@0": (10, 0),
}


@pytest.mark.parametrize("text", GOOD)
def test_accepted(text: str) -> None:
    size, base = GOOD[text]
    assert parse_memory(text) == MemoryRange(base, size)


WRONG = {
    "512M": "has no address",
    "": "has no address",
    "@1G": "'' is not a number",
    "1G@": "'' is not a number",
    "512M@1G@2G": "'1G@2G' is not a number",
    "-1M@0": "'-1M' is not a number",
    "1.5G@0": "'1.5G' is not a number",
    "1E@0": "'1E' is not a number",
    "1 M@0": "'1 M' is not a number",
    "0xZ@0": "'0xZ' is not a number",
    "0x@0": "'0x' is not a number",
    "M@0": "'M' is not a number",
    "1\u212a@0": "is not a number",  # the Kelvin sign
    "64iB@0": "'64iB' is not a number",
    "1_000@0": "'1_000' is not a number",
    "٣M@0": "is not a number",
    "0@1G": "has no size",
    "0K@0": "has no size",
    "4096@4P": "ends at 0x10000000001000",
    "8192@0xffffffffff000": "beyond 2\\^52",
    "1@99999999999999999999P": "beyond 2\\^52",
}


@pytest.mark.parametrize("text", WRONG)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError, match=WRONG[text]):
        parse_memory(text)


def test_maps() -> None:
    assert parse_memory_map(["1M@2M", "1M@1M"]) == (MemoryRange(1 << 20, 1 << 20), MemoryRange(2 << 20, 1 << 20))
    with pytest.raises(UsageError, match="no memory given"):
        parse_memory_map([])
    with pytest.raises(UsageError, match="'2M@0' and '1M@1M' overlap at 0x100000"):
        parse_memory_map(["1M@1M", "2M@0"])
    with pytest.raises(UsageError, match="overlap at 0x0"):
        parse_memory_map(["1M@0", "1M@0"])


@given(st.integers(0, (1 << 52) - 1), st.integers(1, 1 << 52))
def test_what_is_printed_is_read_back(base: int, size: int) -> None:
    piece = MemoryRange(base, min(size, (1 << 52) - base))
    assert parse_memory(str(piece)) == piece

"""Symbols of System.map and ELF files."""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest

from kvm2.board.symbols import parse, read_symbols
from kvm2.errors import GuestError

GCC = "aarch64-linux-gnu-gcc"


def test_a_system_map():
    symbols = parse(
        "m", b"0000000000000000 A absolute\n0000000000001000 T one\n0000000000001000 T alias\n0000000000001010 W two\n"
    )
    assert [symbols.name(at) for at in (0xFFF, 0x1000, 0x100C, 0x1010, 0x1014, 1 << 30)] == [
        None, "one", "one+0xc", "two", "two+0x4", None
    ]  # fmt: skip
    assert symbols.address("two") == 0x1010 and symbols.address("absolute") is None


def test_an_elf(tmp_path):
    if not shutil.which(GCC):
        pytest.skip(f"needs {GCC}")
    (tmp_path / "a.S").write_text(
        ".globl start\nstart: nop\n.type inner, %function\ninner: b .\n.data\nvalue: .word 1\n"
    )
    path = tmp_path / "a.elf"
    subprocess.run(
        [GCC, "-nostdlib", "-static", "-Wl,-Ttext=0x40001000", "-Wl,-e,start", "-o", str(path), str(tmp_path / "a.S")],
        check=True,
    )
    symbols = read_symbols(path)
    assert (symbols.name(0x40001000), symbols.name(0x40001004), symbols.name(0x40001006)) == (
        "start",
        "inner",
        "inner+0x2",
    )
    data = path.read_bytes()
    for size in range(4, len(data), 97):  # a file that is cut off somewhere
        try:
            parse("cut", data[:size])
        except GuestError as error:
            assert "cut" in str(error)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no System.map"),
        (b"MZ\0\0", "no System.map"),
        (b"0000000000001000 D data\n", "no symbols of code"),
        (b"\x7fELF\x01\x01" + bytes(58), "not a little-endian ELF64"),
        (b"\x7fELF\x02\x01" + bytes(58), "no symbols of code"),
        (
            b"\x7fELF\x02\x01" + bytes(34) + struct.pack("<Q", 1 << 60) + bytes(10) + struct.pack("<HH", 64, 3),
            "cut off",
        ),
    ],
)
def test_what_has_none(data, why):
    with pytest.raises(GuestError, match=why):
        parse("file", data)

"""`words.json` is what an assembler makes of its texts."""

from __future__ import annotations

import struct

import pytest

from . import asm


@pytest.mark.skipif(not asm.available(), reason="no aarch64 assembler here")
def test_the_file_is_up_to_date() -> None:
    known = asm.known()
    assert known
    # One run of the assembler for all: each text is followed by a marker; "1b" is the nearest label before.
    marker = 0xDEAD0000
    source = "\n".join(f"{text}\n.inst {marker + at:#x}" for at, text in enumerate(known))
    words = [word for (word,) in struct.iter_unpack("<I", asm.assemble(source))]
    found: list[list[int]] = [[]]
    for word in words:
        if word == marker + len(found) - 1:
            found.append([])
        else:
            found[-1].append(word)
    for text, got in zip(known, found, strict=False):
        assert " ".join(f"{word:08x}" for word in got) == known[text], text
    assert len(found) == len(known) + 1

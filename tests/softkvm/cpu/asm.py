"""Guest code for the tests, as text: assembled once, its words kept in `words.json`, so that no assembler is needed.

With an assembler here, text that is not in the file yet is added; `test_words.py` checks the file against it.
"""

from __future__ import annotations

import functools
import json
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

WORDS = Path(__file__).with_name("words.json")
AS, OBJCOPY = "aarch64-linux-gnu-as", "aarch64-linux-gnu-objcopy"
HEADER = ".arch armv8.5-a+sve+crypto\n"


@functools.cache
def known() -> dict[str, str]:
    return json.loads(WORDS.read_text()) if WORDS.exists() else {}


def normalise(text: str) -> str:
    return "\n".join(
        line for line in (raw.split("//")[0].strip() for raw in text.replace(";", "\n").split("\n")) if line
    )


def assemble(text: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, obj, binary = (Path(folder) / name for name in ("a.s", "a.o", "a.bin"))
        source.write_text(HEADER + text + "\n")
        subprocess.run([AS, "-o", str(obj), str(source)], check=True)
        subprocess.run([OBJCOPY, "-O", "binary", str(obj), str(binary)], check=True)
        return binary.read_bytes()


def available() -> bool:
    return bool(shutil.which(AS) and shutil.which(OBJCOPY))


def asm(text: str) -> bytes:
    """The machine code of position-independent AArch64 `text` (lines or `;`)."""
    text = normalise(text)
    words = known()
    if text not in words:
        if not available():
            pytest.skip("this code is not in words.json and there is no aarch64 assembler here")
        code = assemble(text)
        words[text] = " ".join(f"{word:08x}" for (word,) in struct.iter_unpack("<I", code))
        WORDS.write_text(json.dumps(dict(sorted(words.items())), indent=0) + "\n")
    return b"".join(struct.pack("<I", int(word, 16)) for word in words[text].split())

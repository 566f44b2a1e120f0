"""The access fields of a data abort, for every load and store form of one register and for what has none."""

from __future__ import annotations

import pytest

from kvm2.softkvm.cpu import decode

from .asm import asm

VALID = {  # text: SAS, SSE, SRT, SF, AR
    "ldr w1, [x2, #4]": (2, 0, 1, 0, 0),
    "str x30, [x2, #8]": (3, 0, 30, 1, 0),
    "ldrsb w1, [x2, x3]": (0, 1, 1, 0, 0),
    "ldrsh x1, [x2, w3, sxtw #1]": (1, 1, 1, 1, 0),
    "ldrsw x1, [x2]": (2, 1, 1, 1, 0),
    "sturh w9, [x2, #-3]": (1, 0, 9, 0, 0),
    "ldtrsw x9, [x2, #-3]": (2, 1, 9, 1, 0),
    "sttr x9, [x2]": (3, 0, 9, 1, 0),
    "ldarb w9, [x2]": (0, 0, 9, 0, 1),
    "stlr w9, [x2]": (2, 0, 9, 0, 1),
    "ldar x9, [x2]": (3, 0, 9, 1, 1),
    "ldlar x9, [x2]": (3, 0, 9, 1, 0),
    "stllrh w9, [x2]": (1, 0, 9, 0, 0),
    "ldaprb w9, [x2]": (0, 0, 9, 0, 1),
    "ldapr x9, [x2]": (3, 0, 9, 1, 1),
    "ldapursw x9, [x2, #4]": (2, 1, 9, 1, 1),
    "stlur x9, [x2]": (3, 0, 9, 1, 1),
    "1: ldr w9, 1b": (2, 0, 9, 0, 0),
    "1: ldr x9, 1b": (3, 0, 9, 1, 0),
    "1: ldrsw x9, 1b": (2, 1, 9, 1, 0),
    "ldraa x9, [x2]": (3, 0, 9, 1, 0),
    "ldrab x9, [x2, #8]": (3, 0, 9, 1, 0),
}
INVALID = """
ldr w1, [x2], #4; ldr w1, [x2, #4]!; strb w1, [x2], #1; ldrsw x1, [x2, #8]!
ldp x1, x2, [x3]; stp w1, w2, [x3, #8]!; ldnp x1, x2, [x3]; ldpsw x1, x2, [x3]
ldr q1, [x2]; str b1, [x2, #1]; ldur d1, [x2]; ldr s1, [x2, x3]; ldp q1, q2, [x2]; 1: ldr q1, 1b
ld1 {v0.4s}, [x2]; st4 {v0.4s, v1.4s, v2.4s, v3.4s}, [x2]; ldr z1, [x2]; ld1b {z1.b}, p0/z, [x2]
ldxr w1, [x2]; stxr w1, w2, [x3]; ldaxp x1, x2, [x3]; stlxrb w1, w2, [x3]
cas w1, w2, [x3]; casal x1, x2, [x3]; casp x0, x1, x2, x3, [x4]
ldadd w1, w2, [x3]; swpal x1, x2, [x3]; stset w1, [x3]; ldumaxb w1, w2, [x3]
prfm pldl1keep, [x2]; prfum pldl1keep, [x2]; 1: prfm pldl1keep, 1b; prfm pldl1keep, [x2, x3]
ldraa x9, [x2, #8]!; dc zva, x1; dc civac, x1; nop; add x1, x2, x3; b .; svc #0
"""


@pytest.mark.parametrize("text", VALID)
def test_valid(text: str) -> None:
    sas, sse, srt, sf, ar = VALID[text]
    word = int.from_bytes(asm(text), "little")
    assert decode.access_iss(word) == decode.ISV | sas << 22 | sse << 21 | srt << 16 | sf << 15 | ar << 14


def test_not_valid() -> None:
    for text in (part.strip() for part in INVALID.replace("\n", ";").split(";")):
        if text:
            assert decode.access_iss(int.from_bytes(asm(text), "little")) == 0, text


def test_every_word_gives_a_syndrome_within_its_fields() -> None:
    for word in range(0, 1 << 32, 0xFFF1):
        iss = decode.access_iss(word)
        assert iss & ~decode.ISS_FIELDS == 0
        assert bool(iss) == bool(iss & decode.ISV)
        if iss >> 22 & 3 == 3 and not iss & 1 << 21 and iss:
            assert iss & 1 << 15  # 8 bytes need a 64-bit register


def test_other_kinds() -> None:
    words = {text: int.from_bytes(asm(text), "little") for text in ("mrs x1, midr_el1", "nop", "msr daifset, #7")}
    assert [decode.is_system(word) for word in words.values()] == [True, False, False]
    assert [decode.is_daif_immediate(word) for word in words.values()] == [False, False, True]

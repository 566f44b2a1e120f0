"""Stage 1 under stage 2: guests with their own page tables, of every granule and on both kinds of walker."""

from __future__ import annotations

import pytest

from .rig import play

IL, WNR = 1 << 25, 1 << 6
DABT_LOW, DABT_SAME, IABT_SAME = 0x24, 0x25, 0x21
TRANSLATION, ACCESS_FLAG, PERMISSION, EXTERNAL = 0x4, 0x8, 0xC, 0x10
SHAPES = [(12, 39), (12, 48), (14, 36), (14, 47), (14, 48), (16, 42), (16, 48)]


@pytest.mark.parametrize(("shift", "va"), SHAPES)
@pytest.mark.parametrize("host", ["max-4k-nolpa2", "neoverse-n1-64k", "lpa2-16k-52"])
def test_both_halves(host, shift, va):
    faults_of(play("mmu", host, options=(f"-DSHIFT={shift}", f"-DVA={va}"), physaddr_bits=40), shift, va)


@pytest.mark.parametrize(("host", "shift"), [("lpa2-4k-52", 12), ("lpa2-4k-52", 14), ("armv9-64k-52", 16)])
def test_above_48_bits(host, shift):
    """Code, data and tables at 1 << 50, output addresses of 52 bits: Python walks both stages."""
    ran = play("mmu", host, ram=1 << 50, options=(f"-DSHIFT={shift}", "-DVA=52", "-DWIDE"), physaddr_bits=51)
    faults_of(ran, shift, 52, outside=1 << 51)


def faults_of(ran, shift, va, outside=1 << 47):
    start = 4 - -(-(va - shift) // (shift - 3))
    page, upper = 1 << shift, (1 << 64) - (1 << va)
    assert ran.out() == [0x1111, 0x3333, 0, 0x2222, 0x1111, 0x5555, page, page]
    dabt, log = DABT_SAME << 26 | IL, ran.log()
    expected = [  # (ESR, FAR)
        (dabt | WNR | PERMISSION | 3, upper + page + 16),
        (dabt | TRANSLATION | 3, upper + 2 * page + 8),
        (dabt | ACCESS_FLAG | 3, upper + 3 * page),
        (IABT_SAME << 26 | IL | PERMISSION | 3, upper),
        (dabt | TRANSLATION, upper - 8),
        (dabt | (TRANSLATION | start if start >= 0 else 0x2B), upper + (1 << va - 1)),
        (dabt | EXTERNAL, outside + 32),  # KVM puts the IPA into FAR_EL1
        (dabt | TRANSLATION | 3, upper + 7 * page),
        (dabt | WNR | PERMISSION | 3, upper + page + 24),
        (DABT_LOW << 26 | IL | PERMISSION | 3, upper + 6 * page),
    ]
    assert [(t.esr, t.far) for t in log] == expected

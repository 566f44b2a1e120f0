"""SVE: the lengths that a guest gets are those of its VM, and every loop over them gives the same sum."""

from __future__ import annotations

import pytest

from .rig import play

SUM = sum(i * i for i in range(1000))
SVE_ACCESS = 0x19 << 26 | 1 << 25


def lengths_of(ran):
    out, log = ran.out(), ran.log()
    assert (log[0].esr, len(log)) == (SVE_ACCESS, 1)
    assert out[1:32:2] == [SUM] * 16
    longest = out[30]
    assert out[32:] == [longest, longest, 1]
    return [8 * size for size in out[0:32:2]]


@pytest.mark.parametrize("bits", range(128, 2049, 128))
def test_every_length(bits):
    got = lengths_of(play("sve", "max-4k-6.12", sve=bits))
    # Every multiple of 128 exists up to the VM's longest; what is asked for beyond gives that.
    assert got == [min(128 * n, bits) for n in range(1, 17)]


@pytest.mark.parametrize(("host", "has"), [("a64fx-4k", (128, 256, 512)), ("max-4k-pow2vl", (128, 256, 512))])
@pytest.mark.parametrize("bits", [128, 256, 512])
def test_sets_with_gaps(host, has, bits):
    got = lengths_of(play("sve", host, sve=bits))
    assert got == [max(length for length in has if length <= min(bits, 128 * n)) for n in range(1, 17)]


def test_the_vcpu_call():
    assert lengths_of(play("sve", "graviton3", sve="vcpu")) == [128] + [256] * 15

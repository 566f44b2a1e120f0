"""Every ioctl about interrupts answers as a live Linux 6.12 answered it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .irq_calls import answers

RECORDED = Path(__file__).parents[1] / "data" / "irq" / "calls.txt"


@pytest.mark.parametrize("host", ["max-4k-6.12", "max-16k-6.12", "max-4k-6.1"])
def test_the_answers_are_those_of_a_live_kernel(host):
    """The kernels of the three hosts answer alike."""
    assert answers(host) == RECORDED.read_text().splitlines()

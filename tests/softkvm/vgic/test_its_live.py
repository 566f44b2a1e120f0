"""What an ITS answers to random work, as live kernels answered it: tests/data/its has their answers' checksums.

`its_work.py` says how they were recorded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import kvm2

from . import its_work

RECORDED = sorted((Path(__file__).parents[2] / "data" / "its").glob("*.txt"))
assert RECORDED
SHORT = 6  # seeds of the normal test


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
@pytest.mark.parametrize("seeds", [SHORT, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_random_work_is_answered_as_by_a_live_kernel(path, seeds):
    with kvm2.open(path.stem) as kvm:
        for line in path.read_text().splitlines()[:seeds]:
            seed, *expected = line.split()
            lines = its_work.run(kvm, int(seed))
            found = its_work.checksums(lines).split()
            wrong = next(
                (at for at, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other), None
            )
            assert wrong is None, f"seed {seed}, answer {wrong}: the live kernel's is not {lines[wrong]!r}"
            assert len(found) == len(expected)

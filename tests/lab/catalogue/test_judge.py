"""What counts as the expected answer, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from kvm2.errors import UsageError
from kvm2.lab.catalogue.judge import complaint, shown

FINDING = {"error": "EOPNOTSUPP", "path": "attrs[0].physaddr_bits", "value": 40, "min": 32, "max": 36, "mask": 7}
REFUSED = [-1, "ENOTSUP", {"findings": [{"error": "EINVAL", "path": "nr_attrs"}, FINDING]}]
WANT = {"errno": "EOPNOTSUPP", "finding": {"error": "EOPNOTSUPP", "path": "physaddr_bits", "value": 40, "max": 36}}


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("ok", [0, 0]),
        ("ok", [40, 0]),
        ("any", None),
        ("EINVAL", [-1, "EINVAL"]),
        ("EOPNOTSUPP", [-1, "ENOTSUP"]),
        ("skipped", "skipped"),
        (36, [36, 0]),
        (36, [0, 0, 36]),
        (0, [0, 0, 0]),
        (["EPERM", "EINVAL"], [-1, "EINVAL"]),
        ({"output": {"physaddr_bits": 36}}, [0, 0, {"physaddr_bits": 36, "more": 1}]),
        ({"value": 0, "note": {"error": "note"}}, [0, 0, {"notes": [{"error": "note", "path": "x"}]}]),
        (WANT, REFUSED),
    ],
)
def test_as_expected(expected: Any, answer: Any) -> None:
    assert complaint(expected, answer) == ""


@pytest.mark.parametrize(
    ("expected", "answer", "text"),
    [
        ("ok", [-1, "EINVAL"], "EINVAL, expected success"),
        ("ok", None, "no answer"),
        ("ok", "skipped", "skipped, expected ok"),
        ("skipped", [0, 0], "0, expected skipped"),
        ("EINVAL", [0, 0], "0, expected EINVAL"),
        ("EINVAL", [-1, "EPERM"], "EPERM, expected EINVAL"),
        (36, [44, 0], "44 (0x2c), expected 36"),
        (36, [0, 0, 44], "44 (0x2c), expected 36"),
        (36, [-1, "EINVAL"], "EINVAL, expected success"),
        (["EPERM", "EINVAL"], [0, 0], "0, expected EPERM"),
        ({"output": {"physaddr_bits": 36}}, [0, 0, {"physaddr_bits": 40}], "physaddr_bits = 40, expected 36"),
        ({"output": {"physaddr_bits": 36}}, [0, 0], "physaddr_bits = None"),
        (
            WANT,
            [-1, "ENOTSUP"],
            "no finding with error=EOPNOTSUPP path=physaddr_bits value=40 max=36; the answer has none",
        ),
        ({**WANT, "errno": "EINVAL"}, REFUSED, "EOPNOTSUPP, expected EINVAL"),
        ({"errno": "EOPNOTSUPP", "finding": {"path": "physaddr_bits", "max": 37}}, REFUSED, "no finding with"),
        ({"errno": "EOPNOTSUPP", "finding": {"path": "bits"}}, REFUSED, "no finding with path=bits"),
        ({"value": 0, "note": {"error": "note"}}, [0, 0], "no note with error=note"),
    ],
)
def test_anything_else(expected: Any, answer: Any, text: str) -> None:
    assert text in complaint(expected, answer)


def test_a_finding_must_have_everything_at_once() -> None:
    split = [
        -1,
        "EINVAL",
        {"findings": [{"error": "EINVAL", "path": "a", "value": 1}, {"error": "E2BIG", "path": "b", "value": 2}]},
    ]
    assert complaint({"errno": "EINVAL", "finding": {"path": "a", "value": 2}}, split)


def test_a_misspelt_expectation_is_refused() -> None:
    with pytest.raises(UsageError, match="errno, finding, note, output, value"):
        complaint({"ernno": "EINVAL"}, [0, 0])


def test_answers_in_a_word() -> None:
    assert [shown(answer) for answer in ([0, 0, 7], [3, 0], [-1, "ENOTSUP"], None, "skipped")] == [
        "7", "3", "EOPNOTSUPP", "no answer", "skipped",
    ]  # fmt: skip

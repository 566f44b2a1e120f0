"""The little language of catalogue entries: what it can say, and that it is no more than that."""

from __future__ import annotations

from typing import Any

import pytest

from kvm2.errors import UsageError
from kvm2.lab.catalogue.expressions import evaluate, resolve

FACTS = {"limit": 36, "vls": 0b1011, "arch": "arm64", "source.vls": 0b11, "zero": 0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 << limit", 1 << 36),
        ("(1 << limit) - 4096", (1 << 36) - 4096),
        ("vls & ~1", 0b1010),
        ("vls & source.vls", 0b11),
        ("highest(vls) + 1", 4),
        ("min(limit, 40) if arch == 'arm64' else 0", 36),
        ("32 <= limit <= 36 and not zero", True),
        ("limit < 36 or arch != 'arm64'", False),
        ("-limit // 5 % 7 ^ 1 | 8 * 2 >> 1", -36 // 5 % 7 ^ 1 | 8 * 2 >> 1),
        ("max(1, 0x10)", 16),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert evaluate(text, FACTS) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("limitt", "no fact 'limitt'"),
        ("__import__('os')", "are understood"),
        ("().__class__", "are understood"),
        ("limit.bit_length()", "are understood"),
        ("[1, 2]", "are understood"),
        ("lambda: 1", "are understood"),
        ("1 +", "is not an expression"),
        ("limit // zero", "zero"),
        ("1 << 99999999", "a shift by 99999999"),
        ("1 < arch", "not supported"),
        ("1.5", "are understood"),
        ("highest('a')", None),
    ],
)
def test_everything_else_is_refused(text: str, why: str | None) -> None:
    with pytest.raises((UsageError, AttributeError), match=why):
        evaluate(text, FACTS)


def test_only_what_starts_with_an_equals_sign_is_an_expression() -> None:
    step = {"op": "memslot", "gpa": "=1 << limit", "note": "limit", "attributes": [{"vls": ["=vls"], "attr": "X"}]}
    assert resolve(step, FACTS) == {
        "op": "memslot", "gpa": 1 << 36, "note": "limit", "attributes": [{"vls": [0b1011], "attr": "X"}],
    }  # fmt: skip
    assert resolve(7, FACTS) == 7

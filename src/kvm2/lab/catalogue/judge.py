"""Whether an answer is the expected one.

What a step expects is `"ok"` (the default: success), `"any"`, an errno's name, `"skipped"`, a number (the output where
there is one, else what the ioctl returned), a list of these of which one is enough, or a table of: `errno`, `value`,
`output` (a part of the output), `finding` and `note` (each a table of `error`, `path`, `value`, `min`, `max`, `mask`,
of which one in the answer must have all).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvm2.errors import UsageError
from kvm2.lab.compare import same
from kvm2.lab.scenarios import SKIPPED, Answer

KEYS = {"errno", "value", "output", "finding", "note"}
REFUSED = -1


def complaint(expected: Any, answer: Answer) -> str:
    """What is wrong with an answer, "" where nothing is.

    >>> complaint("EINVAL", [-1, "EINVAL"]), complaint(36, [36, 0])
    ('', '')
    >>> complaint("ok", [-1, "EPERM"])
    'EPERM, expected success'
    """
    if expected == "any":
        return ""
    if isinstance(expected, list):
        wrong = [complaint(one, answer) for one in expected]
        return wrong[0] if all(wrong) else ""
    if expected == SKIPPED or answer == SKIPPED:
        return "" if expected == answer else f"{shown(answer)}, expected {expected}"
    if not isinstance(answer, list):
        return "no answer"
    if isinstance(expected, Mapping):
        return _table(expected, answer)
    if isinstance(expected, int):
        return _table({"value": expected}, answer)
    return _errno("" if expected == "ok" else expected, answer)


def shown(answer: Answer) -> str:
    """An answer in a word or two."""
    if not isinstance(answer, list):
        return str(answer or "no answer")
    if answer[1]:
        return _name(answer)
    return str(answer[2] if len(answer) > 2 and isinstance(answer[2], int) else answer[0])


def _name(answer: list[Any]) -> str:
    return "EOPNOTSUPP" if answer[1] == "ENOTSUP" else str(answer[1])


def _errno(name: str, answer: list[Any]) -> str:
    if not name:
        return "" if not answer[1] else f"{_name(answer)}, expected success"
    if answer[1] and same([REFUSED, name], answer[:2]):
        return ""
    return f"{shown(answer)}, expected {name}"


def _table(expected: Mapping[str, Any], answer: list[Any]) -> str:
    if set(expected) - KEYS:
        raise UsageError(f"{dict(expected)!r}: what is expected has the keys {', '.join(sorted(KEYS))}")
    wrong = _errno(expected.get("errno", ""), answer)
    if wrong:
        return wrong
    output = answer[2] if len(answer) > 2 else None
    if "value" in expected:
        value = output if isinstance(output, int) else answer[0]
        if value != expected["value"]:
            return f"{value} ({value:#x}), expected {expected['value']} ({expected['value']:#x})"
    have = output if isinstance(output, dict) else {}
    for key, want in expected.get("output", {}).items():
        if have.get(key) != want:
            return f"{key} = {have.get(key)}, expected {want}"
    for kind in ("finding", "note"):
        if kind in expected and not any(_is(expected[kind], one) for one in have.get(f"{kind}s", ())):
            return f"no {kind} with {_row(expected[kind])}; the answer has {_rows(have.get(f'{kind}s', ()))}"
    return ""


def _is(want: Mapping[str, Any], finding: Mapping[str, Any]) -> bool:
    return all(
        str(finding["path"]).split(".")[-1] == value if key == "path" else finding.get(key) == value
        for key, value in want.items()
    )


def _row(finding: Mapping[str, Any]) -> str:
    keys = ("error", "path", "value", "min", "max", "mask")
    return " ".join(f"{key}={finding[key]}" for key in keys if key in finding)


def _rows(findings: Any) -> str:
    return "; ".join(map(_row, findings)) or "none"

"""The entries of the catalogue: read from their TOML files, and checked.

>>> find("default-40-on-36-bits").hosts
('apple-m1', 'apple-m2', 'nested-36')
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvm2.errors import UsageError

FILES = Path(__file__).parent
SUBJECTS = ("ipa", "memory", "sve", "vcpu", "devices", "fleet", "negotiation", "architectures")
TEXTS = ("name", "title", "story", "today", "instead", "command")
KEYS = {*TEXTS, "issues", "hosts", "applies", "source", "steps"}


@dataclass(frozen=True, slots=True)
class Pain:
    """One entry. `today` is what its victims see, `instead` what helps, `command` what to type to see it.

    `applies` is an expression over a host's facts (`facts.MEANINGS`). `source` names a described host whose facts
    are there too, as `source.limit`: where a VM comes from. Each step has an `expect` (`judge`), beside its fields.
    """

    name: str
    title: str
    issues: tuple[str, ...]
    hosts: tuple[str, ...]
    applies: str
    story: str
    today: str
    instead: str
    command: str
    steps: tuple[Mapping[str, Any], ...]
    source: str = ""

    @property
    def links(self) -> tuple[str, ...]:
        """The issues' addresses; a mailing list's or manual's own words stay as they are."""
        return tuple(_link(issue) for issue in self.issues)


def _link(issue: str) -> str:
    repository, hash, number = issue.partition("#")
    return f"https://github.com/{repository}/issues/{number}" if hash and "/" in repository else issue


@cache
def pains() -> tuple[Pain, ...]:
    """Every entry, by subject."""
    import tomllib

    found: dict[str, Pain] = {}
    for path in (FILES / f"{subject}.toml" for subject in SUBJECTS):
        for row in tomllib.loads(path.read_text())["pain"]:
            pain = _pain(path, row)
            if pain.name in found:
                raise UsageError(f"{path}: {pain.name!r} is there twice")
            found[pain.name] = pain
    return tuple(found.values())


def _pain(path: Path, row: Mapping[str, Any]) -> Pain:
    if set(row) - KEYS or KEYS - {"source"} - set(row):
        raise UsageError(f"{path}: {row.get('name')}: an entry has the keys {', '.join(sorted(KEYS))}")
    texts = {key: " ".join(row[key].split()) for key in TEXTS}
    if not all(texts.values()) or not row["issues"] or not row["hosts"] or not row["steps"]:
        raise UsageError(f"{path}: {row['name']}: nothing may be empty")
    issues, hosts, steps = tuple(row["issues"]), tuple(row["hosts"]), tuple(row["steps"])
    return Pain(issues=issues, hosts=hosts, applies=row["applies"], source=row.get("source", ""), steps=steps, **texts)


def find(name: str) -> Pain:
    """The entry of a name; UsageError, with the nearest names, where there is none."""
    names = [pain.name for pain in pains()]
    if name not in names:
        near = difflib.get_close_matches(name, names, 3, 0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"no scenario {name!r}: {hint}`kvm2 scenarios list` has them all")
    return next(pain for pain in pains() if pain.name == name)

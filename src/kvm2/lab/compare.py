"""Answers against recorded ones: which steps are equal, which differ, and which differences have a name.

Two files guide it. `untrusted` rules say what not to believe of the records (a fault of the machine that recorded, a
running counter): such steps leave both counts. The differences file names every known difference between this software
KVM and real kernels, with its reason: a named step still counts as different.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kvm2.errors import UsageError
from kvm2.lab.scenarios import Answer, Scenario, Step, read_json

DIFFERENCES = Path(__file__).with_name("differences.toml")


@dataclass(frozen=True, slots=True)
class Rule:
    """Which steps a line of either file speaks of. Everything given must hold.

    `host` and `sc` are globs, `op` an operation, `after` an operation: steps after the first such one. `ids` are
    register ids: steps on them, and their part of a register dump. `steps` are positions. `arch` is the architecture of
    the KVM that is compared with arm64's answers, "" for arm64. `name` and `why` say what it is.
    """

    host: str = "*"
    sc: str = "*"
    op: str = ""
    after: str = ""
    ids: frozenset[int] = frozenset()
    steps: frozenset[int] = frozenset()
    arch: str = ""
    name: str = ""
    why: str = ""

    def concerns(self, host: str, scenario: str) -> bool:
        """Whether it speaks of this host and scenario at all."""
        return fnmatchcase(host, self.host) and fnmatchcase(scenario, self.sc)

    def matches(self, steps: Sequence[Step], index: int) -> bool:
        """Whether it matches the step at `index` as a whole (a register dump is never matched by ids alone)."""
        step = steps[index]
        if self.op and step["op"] != self.op:
            return False
        if self.steps and index not in self.steps:
            return False
        if self.after and not any(before["op"] == self.after for before in steps[:index]):
            return False
        return not self.ids or step.get("id") in self.ids


def _rule(path: Path, row: Any, allowed: Iterable[str]) -> Rule:
    if not isinstance(row, dict) or not set(row) <= set(allowed):
        raise UsageError(f"{path}: a rule has the keys {', '.join(allowed)}; this one is {row!r}")
    values = dict(row)
    try:
        ids = frozenset(int(text, 16) for text in values.pop("ids", ()))
        steps = frozenset(int(index) for index in values.pop("steps", ()))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {row!r}: {error}") from error
    if not all(isinstance(value, str) for value in values.values()):
        raise UsageError(f"{path}: every value but ids and steps is a text: {row!r}")
    return Rule(ids=ids, steps=steps, **values)


def load_untrusted(path: Path) -> tuple[Rule, ...]:
    """The rules of a file: `[{"host": glob, "sc": glob, "op": ..., "after": ..., "ids": [...], "why": ...}, ...]`."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UsageError(f"{path}: a list of rules is needed")
    return tuple(_rule(path, row, ("host", "sc", "op", "after", "ids", "why")) for row in rows)


def load_differences(path: Path = DIFFERENCES) -> tuple[Rule, ...]:
    """The named differences, each with a reason."""
    import tomllib

    try:
        rows = tomllib.loads(path.read_text()).get("difference", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    rules = tuple(
        _rule(path, row, ("name", "why", "arch", "host", "sc", "op", "after", "ids", "steps")) for row in rows
    )
    for rule in rules:
        if not rule.name or not rule.why:
            raise UsageError(f"{path}: every difference has a name and a why: {rule}")
    return rules


@dataclass(frozen=True, slots=True)
class Difference:
    """One step that differs; `name` is "" where no entry of the differences file matches it."""

    scenario: str
    step: int
    op: str
    brief: str
    expected: Answer
    got: Answer
    name: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The comparison of one scenario: counts of steps, and every difference."""

    scenario: str
    steps: int
    untrusted: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> int:
        """Steps that are equal."""
        return self.steps - len(self.differences)

    @property
    def named(self) -> int:
        """Steps that differ in a way the differences file names; they count as different."""
        return sum(bool(difference.name) for difference in self.differences)


def same(expected: Answer, got: Answer) -> bool:
    """Equal return value, errno and output.

    >>> same([-1, "EOPNOTSUPP"], [-1, "ENOTSUP"]), same([0, 0], [0, 0, "00"])
    (True, False)
    """
    if expected == got:
        return True
    if not isinstance(expected, list) or not isinstance(got, list) or len(expected) != len(got) or len(got) < 2:
        return False
    return expected[0] == got[0] and expected[2:] == got[2:] and _errno(expected[1]) == _errno(got[1])


def _errno(name: object) -> object:
    """The number of an errno, as some numbers have two names."""
    return getattr(errno, name, name) if isinstance(name, str) else name


def compare(
    scenario: Scenario,
    expected: Sequence[Answer],
    got: Sequence[Answer],
    host: str,
    untrusted: Sequence[Rule] = (),
    named: Sequence[Rule] = (),
) -> Verdict:
    """Two parallel lists of answers to a scenario's steps. `host` is the machine that `expected` is from."""
    steps = scenario.steps
    if not len(steps) == len(expected) == len(got):
        lengths = f"{len(steps)} steps, {len(expected)} expected answers, {len(got)} given ones"
        raise UsageError(f"scenario {scenario.name!r}: {lengths}: the files do not belong together")
    untrusted = [rule for rule in untrusted if rule.concerns(host, scenario.name)]
    named = [rule for rule in named if rule.concerns(host, scenario.name)]
    left_out, found = 0, []
    for index, step in enumerate(steps):
        if any(rule.matches(steps, index) for rule in untrusted):
            left_out += 1
            continue
        want, have = expected[index], got[index]
        if step["op"] == "reg_dump":
            drop = {f"{number:x}" for rule in untrusted if _applies(rule, steps, index) for number in rule.ids}
            want, have = _without(want, drop), _without(have, drop)
        if not same(want, have):
            name = _name(steps, index, want, have, named)
            found.append(Difference(scenario.name, index, step["op"], brief(step), want, have, name))
    return Verdict(scenario.name, len(steps) - left_out, left_out, tuple(found))


def _applies(rule: Rule, steps: Sequence[Step], index: int) -> bool:
    """Whether a rule with register ids holds for the dump at `index`, its ids aside."""
    everything_else = Rule(op=rule.op, after=rule.after, steps=rule.steps)
    return bool(rule.ids) and everything_else.matches(steps, index)


def _dump(answer: Answer) -> Mapping[str, str] | None:
    return answer[2] if isinstance(answer, list) and len(answer) == 3 and isinstance(answer[2], dict) else None


def _without(answer: Answer, registers: set[str]) -> Answer:
    """The answer of a register dump without some of them."""
    dump = _dump(answer)
    if dump is None or not isinstance(answer, list):
        return answer
    return [*answer[:2], {key: dump[key] for key in dump if key not in registers}]


def _name(steps: Sequence[Step], index: int, want: Answer, have: Answer, named: Sequence[Rule]) -> str:
    """The name of a difference, or "". Of a dump every register that differs must be named."""
    for rule in named:
        if rule.matches(steps, index):
            return rule.name
    first, second = _dump(want), _dump(have)
    if steps[index]["op"] != "reg_dump" or first is None or second is None or not same(_bare(want), _bare(have)):
        return ""
    differing = {int(key, 16) for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    rules = [rule for rule in named if _applies(rule, steps, index) and rule.ids & differing]
    known: frozenset[int] = frozenset().union(*(rule.ids for rule in rules))
    return ", ".join(dict.fromkeys(rule.name for rule in rules)) if differing and differing <= known else ""


def register_changes(difference: Difference) -> list[tuple[str, str, str]] | None:
    """What differs between two register dumps: (id, recorded, here), "absent" where there is none; else None."""
    want, have = _dump(difference.expected), _dump(difference.got)
    if (
        difference.op != "reg_dump"
        or want is None
        or have is None
        or not same(_bare(difference.expected), _bare(difference.got))
    ):
        return None
    keys = [*want, *(key for key in have if key not in want)]
    absent = "absent"
    rows = [(key, want.get(key, absent), have.get(key, absent)) for key in keys]
    return [row for row in rows if row[1] != row[2]]


def _bare(answer: Answer) -> Answer:
    return answer[:2] if isinstance(answer, list) else answer


def brief(step: Step) -> str:
    """A step on one line: its note if it has one, and its fields, long ones shortened.

    >>> brief({"op": "get_reg", "vcpu": "v0", "id": 6931039826524241984, "note": "PC"})
    'get_reg v0 0x6030000000100040 (PC)'
    """
    parts = [str(step["op"])]
    for key, value in step.items():
        if key in ("op", "note"):
            continue
        text = f"{value:#x}" if isinstance(value, int) and abs(value) > 9999 else str(value)
        parts.append(text if len(text) <= 40 else text[:32] + "...")
    return " ".join(parts) + (f" ({step['note']})" if step.get("note") else "")

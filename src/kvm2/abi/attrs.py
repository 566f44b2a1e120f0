"""How each attribute is read, worked out once from the registry, and what reading a list gives."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvm2.abi import vm2
from kvm2.abi.layout import Array, Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kvm2.abi.findings import Finding

HEADER = struct.Struct("=IHH")
HEADER_SIZE, POINTER_SIZE = HEADER.size, 8
NO_SIZE = -1


class Readable(Protocol):
    """Where a list is read from: KvmError(EFAULT) for bytes that cannot be read."""

    def read(self, address: int, size: int) -> bytes:
        """The `size` bytes at `address`."""
        ...


class FieldRule(NamedTuple):
    """A field that has a rule: its byte offset, and which of the flattened values are its own."""

    name: str
    offset: int
    first: int
    length: int
    rule: vm2.Rule

    def of(self, values: tuple[int, ...]) -> int | tuple[int, ...]:
        """The field's value, a tuple where it is an array."""
        return values[self.first] if self.length == 1 else values[self.first : self.first + self.length]


class Plan(NamedTuple):
    """How one attribute is read. `known` is what the size field says when the caller's declaration is ours, NO_SIZE
    where there is no such field; `rest` counts bytes after the 8 of the header; `allowed` applies all rules."""

    row: vm2.Attribute
    known: int
    rest: int
    codec: struct.Struct
    rules: tuple[FieldRule, ...]
    allowed: Callable[[tuple[int, ...]], bool] | None

    def structure(self, flags: int, values: tuple[int, ...]) -> Structure:
        """The attribute as an object of its class."""
        if self.known == NO_SIZE:
            return self.row.cls(self.row.type, *values)
        return self.row.cls.unpack(HEADER.pack(self.row.type, self.known, flags) + self.codec.pack(*values))


class Entry(NamedTuple):
    """An attribute that was read and is well-formed; `values` are its fields after the header, arrays flattened."""

    position: int
    type: int
    flags: int
    values: tuple[int, ...]
    address: int


class ReportArea(NamedTuple):
    """Where the report goes: the address of the REPORT attribute, of its records, and how many there is room for."""

    address: int
    records: int
    capacity: int


class Found(NamedTuple):
    """A finding and its place in the order of findings: position in the list (-1: the list itself), byte offset."""

    position: int
    offset: int
    finding: Finding


class Decoded(NamedTuple):
    """What was read from a client's memory: the well-formed attributes by type, and everything that was wrong."""

    entries: dict[int, Entry]
    found: list[Found]
    report: ReportArea | None
    plans: Mapping[int, Plan]
    broken: frozenset[int] = frozenset()  # types that stand in the list and were refused
    complete: bool = True  # False where an entry could not be read: something unknown was asked for

    @property
    def findings(self) -> tuple[Finding, ...]:
        """In the interface's order: the list itself, then entries by index, within one by offset."""
        return in_order(self.found)

    @property
    def attributes(self) -> tuple[Structure, ...]:
        """The well-formed attributes as objects, in the order of the list."""
        return tuple(self.plans[entry.type].structure(entry.flags, entry.values) for entry in self.entries.values())


def in_order(found: Iterable[Found]) -> tuple[Finding, ...]:
    """The findings in the interface's order."""
    return tuple(place.finding for place in sorted(found, key=_place))


def _place(found: Found) -> tuple[int, int]:
    return found.position, found.offset


def _codes(cls: type[Structure]) -> str:
    codes = "="
    for entry in cls.LAYOUT.fields:
        if entry.offset >= HEADER_SIZE:
            codes += f"{entry.type.count}{entry.type.item.code}" if isinstance(entry.type, Array) else entry.type.code
    return codes


def _plan(row: vm2.Attribute) -> Plan:
    sized = "size" in (entry.name for entry in row.cls.LAYOUT.fields)
    rules, at = [], 0
    for entry in row.cls.LAYOUT.fields:
        if entry.name in ("type", "size", "flags"):
            continue
        count = entry.type.count if isinstance(entry.type, Array) else 1
        if entry.name in row.rules:
            rules.append(FieldRule(entry.name, entry.offset, at, count, row.rules[entry.name]))
        at += count
    known = row.known if sized else NO_SIZE
    return Plan(
        row, known, row.cls.SIZE - HEADER_SIZE, struct.Struct(_codes(row.cls)), tuple(rules), _allowed(tuple(rules))
    )


def _allowed(rules: tuple[FieldRule, ...]) -> Callable[[tuple[int, ...]], bool] | None:
    if not rules:
        return None
    if len(rules) == 1 and rules[0].length == 1:
        test, at = rules[0].rule.allows, rules[0].first
        return lambda values: test(values[at])
    return lambda values: all(field.rule.allows(field.of(values)) for field in rules)


def make_plans(rows: Iterable[vm2.Attribute]) -> dict[int, Plan]:
    """How to read these attributes; any other type in a list is unknown."""
    return {row.type: _plan(row) for row in rows}


@lru_cache(maxsize=16)
def plans_for(arch: str, negotiation: bool = True) -> dict[int, Plan]:
    """The attributes that a host of this architecture knows ("arm64", "x86_64", ...).

    >>> sorted(plans_for("x86_64"))
    [1, 3, 4, 5, 6, 9]
    """
    without = () if negotiation else (vm2.KVM_CREATE_VM_ATTR_NEGOTIATE,)
    return make_plans(row for row in vm2.ATTRIBUTES.values() if arch in row.arches and row.type not in without)


ALL_PLANS = make_plans(vm2.ATTRIBUTES.values())

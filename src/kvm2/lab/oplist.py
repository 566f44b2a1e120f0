"""The list of scenario operations: what each one needs, and who carries it out.

An operation is declared once, by `@op(name, field=kind, ...)` on the function that lowers it to ioctls; the kinds check
a scenario file before anything runs. Replay uses the list, and so does whatever else plays scenarios.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvm2.errors import UsageError
from kvm2.lab.client import Client
from kvm2.lab.scenarios import Answer, Scenario, Step

Lower = Callable[[Client, Step], Answer]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and len(value) % 2 == 0 and all(digit in "0123456789abcdefABCDEF" for digit in value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: isinstance(value, str), "a name"),
    "name or null": (lambda value: value is None or isinstance(value, str), "a name or null"),
    "int": (_is_int, "a whole number"),
    "size": (_is_size, "a whole number from 0 up"),
    "small": (lambda value: _is_size(value) and value <= 1 << 16, "a whole number from 0 to 65536"),
    "time": (lambda value: _is_size(value) and value > 0, "a number of milliseconds above 0"),
    "bool": (lambda value: isinstance(value, bool | int), "true or false"),
    "hex": (_is_hex, "an even number of hex digits"),
    "words": (lambda value: isinstance(value, list) and all(map(_is_int, value)), "a list of whole numbers"),
    "protection": (lambda value: value in ("", "ro", "none"), '"", "ro" or "none"'),
    "names": (lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of names"),
    "attributes": (lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value), "attributes"),
    "bits": (lambda value: value in ("auto", "max") or _is_size(value), 'a number of bits, "auto" or "max"'),
    "sve": (lambda value: value == "vcpu" or _is_size(value), 'a length in bits, or "vcpu"'),
    "verb": (lambda value: value in ("get", "set", "has"), '"get", "set" or "has"'),
}


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: its fields (name -> kind; a kind that ends in "?" may be left out) and its lowering."""

    name: str
    fields: Mapping[str, str]
    lower: Lower


OPS: dict[str, Op] = {}


def op(name: str, /, **fields: str) -> Callable[[Lower], Lower]:
    """Declares the operation `name`; the decorated function plays one step of it and returns the answer."""

    def declare(lower: Lower) -> Lower:
        OPS[name] = Op(name, fields, lower)
        return lower

    return declare


def operations() -> Mapping[str, Op]:
    """Every operation by name."""
    from kvm2.lab import lowering, lowering_regs, lowering_vm2  # noqa: F401  # they declare them

    return OPS


def check(scenario: Scenario) -> None:
    """UsageError where a step is not one of the operations, or lacks what it needs; extra keys (notes) are fine.

    >>> check(Scenario("x", ({"op": "close"},)))
    Traceback (most recent call last):
    kvm2.errors.UsageError: scenario 'x', step 0: close needs 'id', a name
    """
    known = operations()
    for index, step in enumerate(scenario.steps):
        where = f"scenario {scenario.name!r}, step {index}"
        name = step.get("op") if isinstance(step, Mapping) else step
        operation = known.get(name) if isinstance(name, str) else None
        if operation is None:
            raise UsageError(f"{where}: no operation {name!r}; there are: {', '.join(sorted(known))}")
        for field, kind in operation.fields.items():
            if field not in step:
                if not kind.endswith("?"):
                    raise UsageError(f"{where}: {operation.name} needs {field!r}, {KINDS[kind][1]}")
                continue
            test, text = KINDS[kind.removesuffix("?")]
            if not test(step[field]):
                raise UsageError(f"{where}: {operation.name}: {field} = {step[field]!r} is not {text}")


def result(value: int, error: int, output: object = None) -> Answer:
    """An answer in its normal form: `[value, errno name or 0]`, with the output where there is one.

    >>> result(-1, 22), result(0, 0, "00ff"), result(0, 0, {})
    ([-1, 'EINVAL'], [0, 0, '00ff'], [0, 0])
    """
    answer: list[Any] = [value, errno.errorcode.get(error, error) if error else 0]
    if output not in (None, {}):
        answer.append(output)
    return answer


def u32(value: int) -> int:
    """The low 32 bits, as the recording program stored a number into a __u32."""
    return value & 0xFFFF_FFFF


def u64(value: int) -> int:
    """The low 64 bits."""
    return value & 0xFFFF_FFFF_FFFF_FFFF

"""Sums and comparisons over a host's facts, as catalogue entries write them: `"=1 << limit"`, `applies = "limit < 40"`.

Only numbers, names of facts, operators and a few functions are understood; nothing else of Python.

>>> evaluate("limit < 40 and highest(granules) == 14", {"limit": 36, "granules": 0x5000})
True
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from kvm2.errors import UsageError

Facts = Mapping[str, Any]

BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}
MOST_SHIFT = 4096


def highest(mask: int) -> int:
    """The number of the highest set bit; -1 of 0."""
    return mask.bit_length() - 1


FUNCTIONS: Mapping[str, Callable[..., int]] = {"highest": highest, "min": min, "max": max}


def evaluate(text: str, facts: Facts) -> Any:
    """The value of an expression; UsageError where it is none, or names a fact that there is not."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise UsageError(f"{text!r} is not an expression: {error.msg}") from error
    try:
        return _value(tree.body, facts)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{text!r}: {error}") from error


def resolve(value: Any, facts: Facts) -> Any:
    """A value of an entry with every `"=expression"` in it replaced by what it is on a host."""
    if isinstance(value, str) and value.startswith("="):
        return evaluate(value[1:], facts)
    if isinstance(value, list):
        return [resolve(one, facts) for one in value]
    if isinstance(value, dict):
        return {key: resolve(one, facts) for key, one in value.items()}
    return value


def _value(node: ast.expr, facts: Facts) -> Any:
    match node:
        case ast.Constant(value=int() | str()):
            return node.value
        case ast.Name():
            return _fact(node.id, facts)
        case ast.Attribute(value=ast.Name(id=owner)):
            return _fact(f"{owner}.{node.attr}", facts)
        case ast.BoolOp():
            join = all if isinstance(node.op, ast.And) else any
            return join(_value(one, facts) for one in node.values)
        case ast.UnaryOp() if type(node.op) in UNARY:
            return UNARY[type(node.op)](_value(node.operand, facts))
        case ast.BinOp() if type(node.op) in BINARY:
            left, right = _value(node.left, facts), _value(node.right, facts)
            if isinstance(node.op, ast.LShift) and right > MOST_SHIFT:
                raise ValueError(f"a shift by {right}")
            return BINARY[type(node.op)](left, right)
        case ast.Compare() if all(type(one) in COMPARE for one in node.ops):
            values = [_value(one, facts) for one in (node.left, *node.comparators)]
            pairs = zip(node.ops, values[:-1], values[1:], strict=True)
            return all(COMPARE[type(op)](left, right) for op, left, right in pairs)
        case ast.IfExp():
            return _value(node.body if _value(node.test, facts) else node.orelse, facts)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(one, facts) for one in node.args))
    raise UsageError(f"{ast.unparse(node)!r}: facts, numbers, operators and {', '.join(FUNCTIONS)} are understood")


def _fact(name: str, facts: Facts) -> Any:
    if name not in facts:
        raise UsageError(f"no fact {name!r}; there are: {', '.join(sorted(facts))}")
    return facts[name]

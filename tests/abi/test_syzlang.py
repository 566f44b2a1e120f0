"""The fuzz grammar: every line parses, every name is defined, and each structure adds up to its size."""

from __future__ import annotations

import re

import pytest

from kvm2.abi import ioctls, vm2
from kvm2.abi.gen.mainline import structures
from kvm2.abi.gen.syzlang import constants, describe, syzlang

NAME = r"[a-zA-Z_]\w*"
TOKEN = re.compile(r'\s*(?:([a-zA-Z_]\w*)|(-?\d+)|("[^"]*")|([\[\],:]))')
CALL = re.compile(rf"({NAME})\$({NAME})\((.*)\)(?: ({NAME}))?")
BASE = {"int8": 1, "int16": 2, "int32": 4, "int64": 8, "vma64": 8, "ptr64": 8}
WORDS = {"in", "out", "inout", "parent", "opt", "varlen"}

Type = tuple[str, list["Type"]]


class Grammar:
    """What a description file declares, read by the rules of syzkaller's descriptions_syntax.md."""

    def __init__(self, text: str) -> None:
        self.resources: set[str] = set()
        self.flags: dict[str, list[str]] = {}
        self.calls: dict[str, tuple[list[tuple[str, Type]], str | None]] = {}
        self.blocks: dict[str, tuple[str, dict[str, Type]]] = {}
        lines = iter(text.splitlines())
        for line in lines:
            if not line or line.startswith(("#", "include <")):
                continue
            if found := re.fullmatch(rf"resource ({NAME})\[fd\]", line):
                self.resources.add(found[1])
            elif found := CALL.fullmatch(line):
                assert f"{found[1]}${found[2]}" not in self.calls, line
                self.calls[f"{found[1]}${found[2]}"] = (self.arguments(found[3]), found[4])
            elif found := re.fullmatch(rf"({NAME}) ([{{\[])", line):
                assert found[1] not in self.blocks, line
                self.blocks[found[1]] = (found[2], self.block(lines, {"{": "}", "[": "]"}[found[2]]))
            elif found := re.fullmatch(rf"({NAME}) = (.+)", line):
                self.flags[found[1]] = found[2].split(", ")
            else:
                raise AssertionError(f"not a line of syzlang: {line!r}")

    def block(self, lines: object, end: str) -> dict[str, Type]:
        fields: dict[str, Type] = {}
        for line in lines:  # type: ignore[attr-defined]
            if line.split(" ")[0] == end:
                assert line in (end, f"{end} [varlen]")
                return fields
            found = re.fullmatch(rf"\t({NAME})\t(\S.*?)(?: \(out\))?", line)
            assert found, line
            assert found[1] not in fields, line
            fields[found[1]] = parse(found[2])
        raise AssertionError("a block without an end")

    def arguments(self, text: str) -> list[tuple[str, Type]]:
        return [(part.split(" ", 1)[0], parse(part.split(" ", 1)[1])) for part in split_outside(text)]

    def size(self, kind: Type) -> tuple[int, int]:
        """(size, alignment) in bytes; an array without a count has size 0."""
        name, args = kind
        if name in BASE:
            return BASE[name], BASE[name]
        if name in ("const", "flags", "len", "bytesize", "bitsize"):
            return self.size(args[1])
        if name == "array":
            size, align = self.size(args[0])
            return size * (int(args[1][0]) if len(args) > 1 else 0), align
        if name in self.resources or name == "fd":
            return 4, 4
        bracket, fields = self.blocks[name]
        offset, widest = 0, 1
        for field in fields.values():
            size, align = self.size(field)
            widest = max(widest, align)
            offset = max(offset, size) if bracket == "[" else offset + -offset % align + size
        return offset + -offset % widest, widest

    def names(self, kind: Type) -> list[str]:
        return [kind[0], *(name for arg in kind[1] for name in self.names(arg))]


def split_outside(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def parse(text: str) -> Type:
    """A type: a name, perhaps with arguments in brackets, each a type, a number, a range or a string."""
    found = re.fullmatch(rf"({NAME}|\"[^\"]*\"|-?\d+(?::-?\d+)?)(?:\[(.*)\])?", text)
    assert found, f"not a type: {text!r}"
    return found[1], [parse(part) for part in split_outside(found[2])] if found[2] else []


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(syzlang())


def test_every_ioctl_has_a_call_per_kind_of_fd(grammar: Grammar) -> None:
    calls = [name for name in grammar.calls if name.startswith("ioctl$")]
    assert len(calls) == sum(len(row.on) for row in ioctls.ioctls())
    for row in ioctls.ioctls():
        assert any(name == f"ioctl${row.name}" or name.startswith(f"ioctl${row.name}_") for name in calls), row.name


def test_every_name_is_defined(grammar: Grammar) -> None:
    known = (
        set(BASE) | WORDS | {"const", "flags", "len", "bytesize", "bitsize", "array", "ptr", "string", "fd", "intptr"}
    )
    known |= grammar.resources | set(grammar.blocks) | set(grammar.flags) | set(describe()[1])
    for name, (arguments, returns) in grammar.calls.items():
        fields = dict(arguments)
        assert returns is None or returns in grammar.resources
        for kind in fields.values():
            unknown = [n for n in grammar.names(kind) if n not in known and not re.match(r'["\d-]', n)]
            assert not unknown, (name, unknown)
    for name, (_, fields) in grammar.blocks.items():
        for field, kind in fields.items():
            siblings = known | set(fields)
            unknown = [n for n in grammar.names(kind) if n not in siblings and not re.match(r'["\d-]', n)]
            assert not unknown, (name, field, unknown)
            if kind[0] in ("len", "bytesize", "bitsize"):
                assert kind[1][0][0] in {*fields, "parent"}, (name, field)
    for name, values in grammar.flags.items():
        assert all(value.isdigit() or value in describe()[1] for value in values), name


def test_every_structure_has_its_size(grammar: Grammar) -> None:
    checked = 0
    own = {cls.LAYOUT.c_name: cls.SIZE for cls in vm2.STRUCTURES}
    for arch in ("arm64", "x86_64"):
        for cls in structures(arch):
            own.setdefault(cls.LAYOUT.c_name, cls.SIZE)
            own[f"{cls.LAYOUT.c_name}_{arch}"] = cls.SIZE
    for name in grammar.blocks:
        if name in own:
            # Sizes of structures that differ between the architectures are checked under their suffixed names.
            if f"{name}_arm64" in grammar.blocks:
                continue
            assert grammar.size((name, []))[0] == own[name], name
            checked += 1
    assert checked > 70


def test_no_block_is_unused(grammar: Grammar) -> None:
    used = {n for arguments, _ in grammar.calls.values() for _, kind in arguments for n in grammar.names(kind)}
    used |= {n for _, fields in grammar.blocks.values() for kind in fields.values() for n in grammar.names(kind)}
    assert set(grammar.blocks) - used == set()
    assert set(grammar.flags) - used == set()
    assert {row.c_name for row in vm2.ATTRIBUTES.values()} <= set(grammar.blocks)


def test_constants() -> None:
    lines = constants().splitlines()
    assert lines[:2] == ["# generated by `kvm2 abi syzlang --const`: do not edit", "arches = amd64, arm64"]
    values = dict(line.split(" = ") for line in lines[1:])
    assert values["KVM_CREATE_VM2"] == str(0x4010AE0C)
    assert values["KVM_SET_GUEST_DEBUG"] == f"amd64:{0x4048AE9B}, arm64:{0x4208AE9B}"
    assert values["KVM_CREATE_VM_ATTR_MAX_VCPUS"] == "9"


def test_the_parser_refuses_nonsense() -> None:
    for text in ("hello world", "ioctl$X(fd fd_kvm", "s {\n\tf\n}", "s {\n\tf\tint32", "resource x"):
        with pytest.raises(AssertionError):
            Grammar(text)

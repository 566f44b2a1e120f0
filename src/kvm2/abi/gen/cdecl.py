"""Declared structures as C text.

>>> from kvm2.abi.structs import OneReg
>>> print(struct_text(OneReg).expandtabs(8), end="")
/* One register. */
struct kvm_one_reg {
        __u64 id; /* KVM_REG_*; its size is in bits 55:52 */
        __u64 addr; /* -> the value */
};
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from kvm2.abi.layout import Array, Field, Scalar, Structure, UnionOf, extent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

WIDTH: Final = 100


def is_structure(kind: Any) -> TypeGuard[type[Structure]]:
    """Whether a C type is a declared structure."""
    return isinstance(kind, type) and issubclass(kind, Structure)


def is_named(cls: type[Structure]) -> bool:
    """Whether the structure has a tag in C; those without are members of one that has."""
    return cls.LAYOUT.c_name.islower()


def is_anonymous_union(field: Field) -> bool:
    """Whether the field is a union without a name in C: its c_name is then one of its members."""
    return isinstance(field.type, UnionOf) and field.c_name in dict(field.type.members)


def declared(module: ModuleType) -> list[type[Structure]]:
    """The structures that a module declares, in its order."""
    return [cls for cls in vars(module).values() if is_structure(cls) and cls.__module__ == module.__name__]


def comment(text: str, indent: str = "") -> str:
    """A C comment of as many lines as it takes."""
    if len(text) + len(indent) + 6 <= WIDTH:
        return f"{indent}/* {text} */\n"
    lines = textwrap.wrap(text, WIDTH - len(indent) - 3)
    return f"{indent}/*\n" + "".join(f"{indent} * {line}\n" for line in lines) + f"{indent} */\n"


def docstring(cls: type[Structure]) -> str:
    """The docstring on one line."""
    return " ".join((cls.__doc__ or "").split())


def type_name(kind: Any) -> str:
    """A scalar's or structure's name in C."""
    return kind.c_type if isinstance(kind, Scalar) else f"struct {kind.LAYOUT.c_name}"


def member_text(name: str, kind: Any) -> str:
    """One member without its semicolon: `__u64 vls[8]`."""
    if isinstance(kind, Array):
        return f"{type_name(kind.item)} {name}[{kind.count or ''}]"
    return f"{type_name(kind)} {name}"


def struct_text(cls: type[Structure]) -> str:
    """The whole `struct ... { ... };` with its comments."""
    text = comment(docstring(cls)) + f"struct {cls.LAYOUT.c_name} {{\n"
    for field in cls.LAYOUT.fields:
        text += _field_text(field)
    return text + "};\n"


def _field_text(field: Field) -> str:
    if isinstance(field.type, UnionOf):
        members = "".join(f"\t\t{member_text(name, kind)};\n" for name, kind in field.type.members)
        tail = "" if is_anonymous_union(field) else f" {field.c_name}"
        return f"\tunion {{\n{members}\t}}{tail};{_note(field.doc)}\n"
    line = f"\t{member_text(field.c_name, field.type)};"
    if len(line) + len(field.doc) + 14 > WIDTH:
        return comment(field.doc, "\t") + line + "\n"
    return line + _note(field.doc) + "\n"


def _note(doc: str) -> str:
    return f" /* {doc} */" if doc else ""


def c_leaves(cls: type[Structure], prefix: str = "", base: int = 0) -> Iterator[tuple[str, int, int]]:
    """(designator for offsetof, offset, size in bytes) of every field; a nested structure's own fields follow it.

    The size of a flexible array is 0.
    """
    for field in cls.LAYOUT.fields:
        path = prefix + field.c_name
        yield path, base + field.offset, field.size
        if is_structure(field.type):
            yield from c_leaves(field.type, path + ".", base + field.offset)


def size_of(kind: Any) -> int:
    """Bytes of a C type."""
    return extent(kind)[0]

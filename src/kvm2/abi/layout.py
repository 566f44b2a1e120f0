"""How a C structure is declared once, and everything that follows from the declaration.

A structure is a frozen dataclass whose annotations are C types; `Structure` works out offsets, size, packing and
unpacking. The header, the reference, the schema and the fuzz grammar read the same `LAYOUT`.

>>> class Pair(Structure, c_name="pair"):
...     "Two numbers."
...     slot: u32 = field(doc="the slot")
...     pad: u32 = 0
...     words: Annotated[tuple[int, ...], Array(U64, 2)] = (0, 0)
>>> Pair(1, words=(2, 3)).pack().hex()
'010000000000000002000000000000000300000000000000'
>>> Pair.unpack(Pair(7).pack()).slot, Pair.SIZE, Pair.LAYOUT.at("words").offset
(7, 24, 8)
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import struct
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self


class Scalar(NamedTuple):
    """A C integer type: the `struct` code, its size and alignment in bytes, its name in a kernel header."""

    code: str
    size: int
    c_type: str


U8, U16, U32, U64 = (
    Scalar("B", 1, "__u8"),
    Scalar("H", 2, "__u16"),
    Scalar("I", 4, "__u32"),
    Scalar("Q", 8, "__u64"),
)
S8, S16, S32, S64 = (
    Scalar("b", 1, "__s8"),
    Scalar("h", 2, "__s16"),
    Scalar("i", 4, "__s32"),
    Scalar("q", 8, "__s64"),
)
CHAR = Scalar("B", 1, "char")
U128 = Scalar("16s", 16, "__uint128_t")
"""A 16-byte register, kept as bytes; only as the item of an array."""
INT, ULONG = Scalar("i", 4, "int"), Scalar("Q", 8, "unsigned long")
"""C types that a few old ioctls name; `unsigned long` as 64-bit callers have it."""

u8 = Annotated[int, U8]
u16 = Annotated[int, U16]
u32 = Annotated[int, U32]
u64 = Annotated[int, U64]
s8 = Annotated[int, S8]
s16 = Annotated[int, S16]
s32 = Annotated[int, S32]
s64 = Annotated[int, S64]


class Array(NamedTuple):
    """`item[count]`; count 0 is a flexible tail. Arrays of 1-byte items are `bytes`, others tuples."""

    item: Any
    count: int  # type: ignore[assignment]  # hides tuple.count


class UnionOf(NamedTuple):
    """A C union kept as raw bytes of `size`; `members` (name, type) are for the generated header."""

    size: int
    members: tuple[tuple[str, Any], ...]
    align: int = 8


class Field(NamedTuple):
    """One field: where it lies, its C type (`Scalar`, `Array`, `UnionOf` or a `Structure` class), its text.

    `c_name` is its name in C, where Python cannot have the same.
    """

    name: str
    offset: int
    size: int
    type: Any
    doc: str
    c_name: str


class Layout(NamedTuple):
    """A structure's name in C, its size and alignment in bytes, its fields in order."""

    c_name: str
    size: int
    align: int
    fields: tuple[Field, ...]

    def __getitem__(self, key: Any) -> Any:
        return self.at(key) if isinstance(key, str) else tuple.__getitem__(self, key)

    def at(self, name: str) -> Field:
        """The field of that name; KeyError: no such."""
        for f in self.fields:
            if f.name == name:
                return f
        raise KeyError(f"struct {self.c_name} has no field {name}")


def field(*, doc: str = "", default: Any = 0, c_name: str = "") -> Any:
    """A field with a text for the reference; its default is 0 unless given."""
    return dataclasses.field(default=default, metadata={"doc": doc, "c_name": c_name})


def extent(kind: Any) -> tuple[int, int]:
    """(size, alignment) in bytes of a C type."""
    if isinstance(kind, Scalar):
        return kind.size, kind.size
    if isinstance(kind, Array):
        size, align = extent(kind.item)
        return size * kind.count, align
    if isinstance(kind, UnionOf):
        return kind.size, kind.align
    layout: Layout = kind.LAYOUT
    return layout.size, layout.align


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Structure:
    """The base of every declared structure. Sizes and offsets are checked: no implicit padding unless `padded`."""

    LAYOUT: ClassVar[Layout]
    SIZE: ClassVar[int]
    _codec: ClassVar[struct.Struct]
    _flat: ClassVar[bool]
    _names: ClassVar[tuple[str, ...]]
    _scalars: ClassVar[Any]
    _defaults: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, c_name: str = "", padded: bool = False) -> None:
        # The methods are ours, below: generating them per class would be nine tenths of the time a declaration takes.
        dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
        hints = inspect.get_annotations(cls, eval_str=True)
        declared = [f for f in dataclasses.fields(cls) if f.name in hints]  # type: ignore[arg-type]
        metadata = {f.name: f.metadata for f in declared}
        offset, widest, fields, codes, flat = 0, 1, [], "=", True
        for name, data in metadata.items():
            hint = hints[name]
            kind = hint.__metadata__[0] if hasattr(hint, "__metadata__") else hint
            size, align = extent(kind)
            gap = -offset % align
            if gap and not padded:
                raise TypeError(f"{c_name}.{name}: {gap} bytes of implicit padding before it")
            codes += "x" * gap + (kind.code if isinstance(kind, Scalar) else f"{size}s")
            flat = flat and (isinstance(kind, Scalar) or _is_bytes(kind))
            offset += gap
            fields.append(Field(name, offset, size, kind, data.get("doc", ""), data.get("c_name") or name))
            offset, widest = offset + size, max(widest, align)
        tail = -offset % widest
        if tail and not padded:
            raise TypeError(f"{c_name}: {tail} bytes of implicit padding at its end")
        cls.LAYOUT = Layout(c_name or cls.__name__, offset + tail, widest, tuple(fields))
        cls.SIZE, cls._codec, cls._flat = offset + tail, struct.Struct(codes + "x" * tail), flat
        cls._names = tuple(metadata)
        # Most structures are numbers only, and there are two or more: then one call fetches them all.
        plain = len(fields) > 1 and all(isinstance(f.type, Scalar) for f in fields)
        cls._scalars = staticmethod(operator.attrgetter(*metadata)) if plain else None
        cls._defaults = {f.name: f.default for f in declared if f.default is not dataclasses.MISSING}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = self._names
        values = self._defaults | dict(zip(names, args, strict=False)) | kwargs
        if len(values) != len(names) or len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            raise TypeError(
                f"{type(self).__name__} takes {', '.join(names)}, each once; those without a default always"
            )
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name}: structures do not change")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name}: structures do not change")

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self._names)

    def __hash__(self) -> int:
        return hash((self.__class__, *(getattr(self, name) for name in self._names)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._names)})"

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """The structure in the SIZE bytes of `data` from `offset`; struct.error where there are fewer."""
        values = cls._codec.unpack_from(data, offset)
        if cls._flat:
            return cls(*values)
        return cls(*(_unpack(f.type, v) for f, v in zip(cls.LAYOUT.fields, values, strict=True)))

    def pack(self) -> bytes:
        """The SIZE bytes of the structure, in native byte order; struct.error where a value does not fit."""
        if self._scalars is not None:
            return self._codec.pack(*self._scalars(self))
        values = [_pack(f.type, getattr(self, f.name)) for f in self.LAYOUT.fields]
        return self._codec.pack(*values)

    @classmethod
    def walk(cls, prefix: str = "", base: int = 0) -> Iterator[tuple[str, Field]]:
        """Every leaf field with its dotted path; offsets are from the outermost structure."""
        for f in cls.LAYOUT.fields:
            path = f"{prefix}{f.name}"
            if isinstance(f.type, type) and issubclass(f.type, Structure):
                yield from f.type.walk(path + ".", base + f.offset)
            else:
                yield path, f._replace(offset=base + f.offset)


def _is_bytes(kind: Any) -> bool:
    return isinstance(kind, UnionOf) or (
        isinstance(kind, Array) and isinstance(kind.item, Scalar) and kind.item.size == 1
    )


def _unpack(kind: Any, value: Any) -> Any:
    if isinstance(kind, Scalar) or _is_bytes(kind):
        return value
    if isinstance(kind, Array):
        if isinstance(kind.item, Scalar):
            return struct.unpack("=" + kind.count * kind.item.code, value)
        return tuple(kind.item.unpack(value, i * kind.item.SIZE) for i in range(kind.count))
    return kind.unpack(value)


def _pack(kind: Any, value: Any) -> Any:
    if isinstance(kind, Scalar):
        return value
    if _is_bytes(kind):
        return _fits(value, extent(kind)[0])
    if isinstance(kind, Array):
        _fits(value, kind.count)
        if not isinstance(kind.item, Scalar):
            return b"".join(v.pack() for v in value)
        fill = bytes(16) if kind.item is U128 else 0
        return struct.pack("=" + kind.count * kind.item.code, *value, *(fill,) * (kind.count - len(value)))
    return value.pack()


def _fits(value: Any, count: int) -> Any:
    """`value`, refused where it is longer than the field: `struct` would cut it off without a word."""
    if len(value) > count:
        raise struct.error(f"{len(value)} elements where the field has {count}")
    return value

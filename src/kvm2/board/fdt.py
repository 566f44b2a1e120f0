"""Flattened device trees (Devicetree Specification 0.4, chapter 5): made property by property, and read back.

>>> tree = Fdt()
>>> tree.root.cells("#address-cells", 2)
>>> tree.root.child("chosen").text("bootargs", "console=ttyAMA0")
>>> read_fdt(tree.pack()).node("/chosen").texts("bootargs")
('console=ttyAMA0',)
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from kvm2.errors import UsageError

MAGIC = 0xD00DFEED
VERSION, COMPATIBLE_VERSION = 17, 16
_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
_HEADER = struct.Struct(">10I")
_RESERVATION = struct.Struct(">2Q")
_WORD = struct.Struct(">I")
_PROPERTY = struct.Struct(">2I")
# 2.2.1 and 2.2.4: names have up to 31 characters of these; a node's may end with an address.
_NODE_NAME = re.compile(r"[A-Za-z][0-9A-Za-z,._+-]{0,30}(@[0-9A-Za-z,._+-]+)?\Z", re.ASCII)
_PROPERTY_NAME = re.compile(r"[0-9A-Za-z,._+?#-]{1,31}\Z", re.ASCII)
_DEEPEST = 64  # no tree of a machine is deeper; a reader of foreign bytes needs an end


class Header(NamedTuple):
    """The ten words at the start of a blob; offsets and sizes in bytes."""

    magic: int
    total_size: int
    structure_at: int
    strings_at: int
    reservations_at: int
    version: int
    compatible_version: int
    boot_cpu: int
    strings_size: int
    structure_size: int


class Node:
    """A node: its properties as bytes, in order, and its children by name ("uart@9000000")."""

    def __init__(self, name: str, tree: Fdt) -> None:
        self.name = name
        self.properties: dict[str, bytes] = {}
        self.children: dict[str, Node] = {}
        self._tree = tree

    def child(self, name: str, address: int | None = None) -> Node:
        """A new node below, `name@address` where an address is given. UsageError: a wrong name, or one that is there.

        >>> Fdt().root.child("memory", 1 << 40).name
        'memory@10000000000'
        """
        full = name if address is None else f"{name}@{address:x}"
        if not _NODE_NAME.match(full):
            raise UsageError(
                f"{full!r} is no name of a device tree node: up to 31 of 0-9 a-z A-Z , . _ + -, and @address"
            )
        if full in self.children:
            raise UsageError(f"device tree node {self.name or '/'} has a child {full!r} already")
        node = self.children[full] = Node(full, self._tree)
        return node

    def raw(self, name: str, value: bytes) -> None:
        """A property's bytes; setting it again replaces it."""
        if not _PROPERTY_NAME.match(name):
            raise UsageError(f"{name!r} is no name of a device tree property: 1 to 31 of 0-9 a-z A-Z , . _ + ? # -")
        self.properties[name] = bytes(value)

    def cells(self, name: str, *values: int) -> None:
        """A property of 32-bit numbers."""
        self.raw(name, _numbers(name, values, 4))

    def wide(self, name: str, *values: int) -> None:
        """A property of 64-bit numbers, two cells each."""
        self.raw(name, _numbers(name, values, 8))

    def text(self, name: str, *values: str) -> None:
        """A property of strings, each ended by a NUL."""
        for value in values:
            if "\0" in value:
                raise UsageError(f"{name} = {value!r}: a string of a device tree has no NUL inside")
        self.raw(name, b"".join(value.encode() + b"\0" for value in values))

    def flag(self, name: str) -> None:
        """A property that is only there."""
        self.raw(name, b"")

    @property
    def phandle(self) -> int:
        """The number that other nodes refer to this one by; made when first asked for."""
        if "phandle" not in self.properties:
            self._tree.phandles += 1
            self.cells("phandle", self._tree.phandles)
        return self.numbers("phandle")[0]

    def numbers(self, name: str, size: int = 4) -> tuple[int, ...]:
        """A property as big-endian numbers of 4 or 8 bytes. UsageError where it is not there or not a multiple."""
        value = self._value(name)
        if len(value) % size:
            raise UsageError(f"{self.name or '/'}: {name} has {len(value)} bytes, not a multiple of {size}")
        return tuple(int.from_bytes(value[at : at + size]) for at in range(0, len(value), size))

    def texts(self, name: str) -> tuple[str, ...]:
        """A property as strings. UsageError where it is not there or does not end with a NUL."""
        value = self._value(name)
        if not value.endswith(b"\0"):
            raise UsageError(f"{self.name or '/'}: {name} is no string: it does not end with a NUL")
        return tuple(one.decode(errors="backslashreplace") for one in value[:-1].split(b"\0"))

    def _value(self, name: str) -> bytes:
        if name not in self.properties:
            have = ", ".join(self.properties) or "none"
            raise UsageError(f"{self.name or '/'} has no property {name!r}; it has {have}")
        return self.properties[name]


class Fdt:
    """A device tree: its root, the memory that it reserves as (address, size), the physical id of the boot CPU."""

    def __init__(self, boot_cpu: int = 0) -> None:
        self.boot_cpu = boot_cpu
        self.phandles = 0
        self.root = Node("", self)
        self.reserved: list[tuple[int, int]] = []

    def node(self, path: str) -> Node:
        """The node of a path from the root, "/cpus/cpu@0". UsageError where there is none."""
        node = self.root
        for part in path.strip("/").split("/") if path.strip("/") else ():
            if part not in node.children:
                have = ", ".join(node.children) or "no children"
                raise UsageError(f"device tree has no node {path!r}: {node.name or '/'} has {have}")
            node = node.children[part]
        return node

    def pack(self) -> bytes:
        """The blob, version 17: header, reservations, structure, strings."""
        structure, strings = bytearray(), _Strings()
        _pack_node(self.root, structure, strings)
        structure += _WORD.pack(_END)
        reservations = b"".join(_RESERVATION.pack(*one) for one in [*self.reserved, (0, 0)])
        structure_at = _HEADER.size + len(reservations)
        strings_at = structure_at + len(structure)
        header = Header(
            magic=MAGIC,
            total_size=strings_at + len(strings.data),
            structure_at=structure_at,
            strings_at=strings_at,
            reservations_at=_HEADER.size,
            version=VERSION,
            compatible_version=COMPATIBLE_VERSION,
            boot_cpu=self.boot_cpu,
            strings_size=len(strings.data),
            structure_size=len(structure),
        )
        return _HEADER.pack(*header) + reservations + bytes(structure) + bytes(strings.data)


class _Strings:
    """The block of property names, each kept once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._at: dict[str, int] = {}

    def offset(self, name: str) -> int:
        if name not in self._at:
            self._at[name] = len(self.data)
            self.data += name.encode() + b"\0"
        return self._at[name]


def _numbers(name: str, values: tuple[int, ...], size: int) -> bytes:
    for value in values:
        if not 0 <= value < 1 << 8 * size:
            raise UsageError(f"device tree property {name}: {value:#x} does not fit {8 * size} bits")
    return b"".join(value.to_bytes(size) for value in values)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _pack_node(node: Node, out: bytearray, strings: _Strings) -> None:
    out += _WORD.pack(_BEGIN_NODE) + _padded(node.name.encode() + b"\0")
    for name, value in node.properties.items():
        out += _WORD.pack(_PROP) + _PROPERTY.pack(len(value), strings.offset(name)) + _padded(value)
    for child in node.children.values():
        _pack_node(child, out, strings)
    out += _WORD.pack(_END_NODE)


def read_fdt(blob: bytes) -> Fdt:
    """The tree in a blob. UsageError says where it is no device tree."""
    if len(blob) < _HEADER.size:
        raise UsageError(f"a device tree's header has {_HEADER.size} bytes; these are {len(blob)}")
    header = Header(*_HEADER.unpack_from(blob))
    if header.magic != MAGIC:
        raise UsageError(f"not a device tree: it starts with {header.magic:#010x}, not {MAGIC:#010x}")
    if header.compatible_version > VERSION or header.version < VERSION:
        raise UsageError(f"a device tree of version {header.version}: version {VERSION} is read")
    if header.total_size > len(blob):
        raise UsageError(f"a device tree of {header.total_size} bytes, cut off at {len(blob)}")
    tree = Fdt(header.boot_cpu)
    at = header.reservations_at
    while at + _RESERVATION.size <= header.total_size:
        found = _RESERVATION.unpack_from(blob, at)
        if found == (0, 0):
            break
        tree.reserved.append(found)
        at += _RESERVATION.size
    _Reader(blob[: header.total_size], header, tree).read()
    return tree


class _Reader:
    """The structure block, token by token."""

    def __init__(self, blob: bytes, header: Header, tree: Fdt) -> None:
        self.blob, self.header, self.tree = blob, header, tree
        self.at, self.end = header.structure_at, header.structure_at + header.structure_size

    def word(self) -> int:
        if self.at + _WORD.size > min(self.end, len(self.blob)):
            raise UsageError(f"a device tree's structure ends at byte {self.at} without its end token")
        value: int = _WORD.unpack_from(self.blob, self.at)[0]
        self.at += _WORD.size
        return value

    def read(self) -> None:
        path: list[Node] = []
        while True:
            where, token = self.at, self.word()
            if token == _BEGIN_NODE and len(path) < _DEEPEST:
                path.append(self._begin(path, where))
            elif token == _PROP and path:
                size, name = self.word(), self._string(self.word())
                path[-1].properties[name] = self._take(size, where)
            elif token == _END_NODE and path:
                path.pop()
            elif token == _END and not path:
                return
            elif token != _NOP:
                raise UsageError(f"a device tree's structure has token {token:#x} at byte {where}, which is none there")

    def _begin(self, path: list[Node], where: int) -> Node:
        stop = self.blob.find(b"\0", self.at, self.end)
        if stop < 0:
            raise UsageError(f"the name of the device tree node at byte {where} has no end")
        name = self._take(stop + 1 - self.at, where)[:-1].decode(errors="backslashreplace")
        if not path:
            return self.tree.root
        node = path[-1].children[name] = Node(name, self.tree)
        return node

    def _take(self, size: int, where: int) -> bytes:
        found = self.blob[self.at : self.at + size]
        self.at += size + -size % 4
        if self.at > min(self.end, len(self.blob)):
            raise UsageError(f"what begins at byte {where} of a device tree goes on behind its end")
        return found

    def _string(self, offset: int) -> str:
        start = self.header.strings_at + offset
        stop = self.blob.find(b"\0", start)
        if stop < 0 or offset >= self.header.strings_size:
            raise UsageError(f"a device tree property's name at byte {start} is outside the strings")
        return self.blob[start:stop].decode(errors="backslashreplace")

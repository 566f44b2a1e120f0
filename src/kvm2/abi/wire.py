"""Attribute objects to bytes, and a client's bytes to attributes and findings.

`decode` is the one reader of a list: sizes, flags, tails and values that no host could give are judged here. Each byte
is read once, nothing is written, and everything that is wrong becomes a finding, not only the first. What one host
allows comes later (`softkvm.creation`).

>>> from kvm2.abi.vm2 import Arm64PhysaddrSize, MaxVcpus
>>> data = encode([Arm64PhysaddrSize(physaddr_bits=36), MaxVcpus(max_vcpus=4)], base=0x1000)
>>> decode(Buffer(0x1000, data), 0x1000).attributes
(Arm64PhysaddrSize(type=2, physaddr_bits=36), MaxVcpus(type=9, size=16, flags=0, max_vcpus=4, pad=0))
>>> for finding in decode(Buffer(0x1000, data[:-8]), 0x1000).findings:
...     print(finding)
8 bytes of MAX_VCPUS at 0x1030 cannot be read; pass the address of memory that this process may access
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvm2.abi.attrs import ALL_PLANS, HEADER, HEADER_SIZE, NO_SIZE, POINTER_SIZE, Decoded, Entry, Plan, ReportArea
from kvm2.abi.walk import MAX_ATTRS, REPORT, Walk
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvm2.abi.attrs import Readable
    from kvm2.abi.layout import Structure

_OUTER = struct.Struct("=IHHQ")
_VERSION = struct.Struct("=I")
_HEADER, _WORD = HEADER.unpack, struct.Struct("=4xI").unpack
_POINTERS = tuple(struct.Struct(f"={count}Q") for count in range(MAX_ATTRS + 1))
OUTER_SIZE = _OUTER.size


class Buffer:
    """Bytes that stand at `base`, as a memory to decode from: EFAULT for anything outside."""

    def __init__(self, base: int, data: bytes) -> None:
        self.base, self.data = base, data

    def read(self, address: int, size: int) -> bytes:
        """The `size` bytes at `address`."""
        start = address - self.base
        if start < 0 or start + size > len(self.data):
            raise KvmError(errno.EFAULT, f"{size} bytes at {address:#x} cannot be read")
        return self.data[start : start + size]


def encode(attributes: Iterable[Structure], base: int, *, terminated: bool = False) -> bytes:
    """One buffer that is to stand at address `base`: struct kvm_create_vm2, the pointer array, the attributes.

    With `terminated` the array ends with a NULL entry and nr_attrs is 0. Nothing is checked: a list may be wrong on
    purpose.
    """
    return encode_packed([attribute.pack() for attribute in attributes], base, terminated)


def encoded_size(packed: Iterable[bytes]) -> int:
    """How many bytes `encode_packed` makes of attributes, without a NULL entry."""
    return OUTER_SIZE + sum(POINTER_SIZE + len(data) + -len(data) % 8 for data in packed)


def encode_packed(packed: Sequence[bytes], base: int, terminated: bool = False) -> bytes:
    """`encode`, for attributes that are bytes already."""
    words = []
    at = base + OUTER_SIZE + POINTER_SIZE * (len(packed) + terminated)
    for data in packed:
        words.append(at)
        at += len(data) + -len(data) % 8
    if terminated:
        words.append(0)
    outer = _OUTER.pack(0, 0 if terminated else len(packed), 0, base + OUTER_SIZE if words else 0)
    return outer + struct.pack(f"={len(words)}Q", *words) + b"".join(data + bytes(-len(data) % 8) for data in packed)


def decode(memory: Readable, address: int, plans: Mapping[int, Plan] = ALL_PLANS) -> Decoded:
    """Reads the list whose struct kvm_create_vm2 is at `address`. Raises nothing: what is wrong is in the findings.

    `plans` are the attributes that the host knows (`attrs.plans_for`).
    """
    read = memory.read
    try:
        version, nr_attrs, pad, array = _OUTER.unpack(read(address, OUTER_SIZE))
    except KvmError:
        return _without_list(read, address, plans)
    if version or pad or nr_attrs > MAX_ATTRS or not nr_attrs:
        return _unusual(read, (version, nr_attrs, pad, array), plans)
    try:
        pointers = _POINTERS[nr_attrs].unpack(read(array, nr_attrs * POINTER_SIZE))
    except KvmError:
        walk = Walk(read, plans, {})
        walk.pointers(array, nr_attrs)
        return walk.decoded()
    return _plain(read, pointers, plans)


def _plain(read: Callable[[int, int], bytes], pointers: tuple[int, ...], plans: Mapping[int, Plan]) -> Decoded:
    """Attributes as this library declares them, each once, without flags; the first other one goes to a Walk."""
    entries: dict[int, Entry] = {}
    for index, pointer in enumerate(pointers):
        header = payload = b""
        if pointer:
            try:
                header = read(pointer, HEADER_SIZE)
                kind, size, flags = _HEADER(header)
                plan = plans.get(kind)
                if plan is not None and kind not in entries:
                    known, allowed = plan.known, plan.allowed
                    if known == size and not flags:
                        if plan.rest:
                            payload = read(pointer + HEADER_SIZE, plan.rest)
                        values = plan.codec.unpack(payload)
                        if allowed is None or allowed(values):
                            entries[kind] = Entry(index, kind, 0, values, pointer)
                            continue
                    elif known == NO_SIZE:
                        values = _WORD(header)
                        if allowed is None or allowed(values):
                            entries[kind] = Entry(index, kind, 0, values, pointer)
                            continue
            except KvmError:
                pass  # the walk asks once more, and says what cannot be read
        walk = Walk(read, plans, entries)
        walk.entry(index, pointer, header, payload)
        for later in range(index + 1, len(pointers)):
            walk.entry(later, pointers[later])
        return walk.decoded()
    report = entries.get(REPORT)
    area = ReportArea(report.address, report.values[0], report.values[1]) if report is not None else None
    return Decoded(entries, [], area, plans)


def _unusual(read: Callable[[int, int], bytes], outer: tuple[int, int, int, int], plans: Mapping[int, Plan]) -> Decoded:
    """A list whose own structure needs more than a look: a NULL-terminated one, or one with something wrong in it."""
    version, nr_attrs, pad, array = outer
    walk = Walk(read, plans, {})
    if version:
        return _other_version(walk, version)
    if nr_attrs > MAX_ATTRS:
        walk.complete = False
        walk.about_list(errno.E2BIG, 4, nr_attrs, MAX_ATTRS, f"nr_attrs = {nr_attrs}: at most {MAX_ATTRS}")
    if pad:
        walk.about_list(errno.EINVAL, 6, pad, 0, f"pad = {pad:#x}: must be zero")
    if not nr_attrs:
        if array:
            walk.pointers(array, None)
        return walk.decoded()
    count = min(nr_attrs, MAX_ATTRS)
    try:
        pointers = _POINTERS[count].unpack(read(array, count * POINTER_SIZE))
    except KvmError:
        walk.pointers(array, count)
        return walk.decoded()
    for index, pointer in enumerate(pointers):
        walk.entry(index, pointer)
    return walk.decoded()


def _other_version(walk: Walk, version: int) -> Decoded:
    walk.complete = False
    walk.about_list(errno.EOPNOTSUPP, 0, version, 0, f"version = {version}: this host knows version 0")
    return walk.decoded()


def _without_list(read: Callable[[int, int], bytes], address: int, plans: Mapping[int, Plan]) -> Decoded:
    """The structure cannot be read as a whole. Of another version it may be shorter: that is asked first."""
    walk = Walk(read, plans, {})
    try:
        (version,) = _VERSION.unpack(read(address, _VERSION.size))
    except KvmError:
        version = 0
    if version:
        return _other_version(walk, version)
    walk.complete = False
    walk.about_list(errno.EFAULT, 0, address, 0, f"struct kvm_create_vm2 at {address:#x} cannot be read")
    return walk.decoded()

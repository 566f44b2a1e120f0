"""Structures as values that people and programs can read: fields by name, constants by name, padding left out.

Everything comes from the declarations: which constants a field takes is what its text says ("KVM_MEM_*").

>>> from kvm2.abi.structs import EnableCap, MpState, UserspaceMemoryRegion
>>> text(fields(UserspaceMemoryRegion(3, 2, 0x4000_0000, 0x10000, 0x7f00_0000_0000)))
'{slot=3, flags=KVM_MEM_READONLY, guest_phys_addr=0x40000000, memory_size=0x10000, userspace_addr=0x7f0000000000}'
>>> text(fields(MpState(5))), plain(fields(EnableCap(165)))["cap"]
('{mp_state=KVM_MP_STATE_STOPPED}', {'number': 165, 'name': 'KVM_CAP_ARM_VM_IPA_SIZE'})
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kvm2.abi import caps, onereg, vm2
from kvm2.abi.layout import Array, Scalar, Structure, UnionOf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvm2.abi.layout import Field


class Named(NamedTuple):
    """A number that has a name: a constant, flags, a register, a descriptor."""

    number: int
    name: str


class Record(NamedTuple):
    """Fields under a name: one attribute, one exit."""

    name: str
    fields: dict[str, Any]


Value: TypeAlias = Any
"""int (Hex), str, bytes, Named, Record, a dict or a list of such."""


class Hex(int):
    """A number that people read in hexadecimal, however small: what a register holds."""


MOST_ITEMS, MOST_STRUCTURES, MOST_BYTES, DECIMAL_BELOW = 16, 4, 32, 1 << 16
# Structures that hold registers.
_REGISTERS = (
    "kvm_regs",
    "kvm_sregs",
    "kvm_sregs2",
    "kvm_segment",
    "kvm_dtable",
    "kvm_debugregs",
    "kvm_xcr",
    "kvm_msr_entry",
    "kvm_cpuid_entry",
    "kvm_cpuid_entry2",
)

_CONSTANT = re.compile(r"\bKVM_[A-Z0-9_]+\*?")
_ARCH = re.compile(r"\s*(arm64|x86|s390|powerpc): ")
_FLAGS = ("flags", "capabilities", "attributes", "control")
_PADDING = re.compile(r"_*(pad|padding|reserved)\d*")
_MODULES = {"x86_64": "x86", "s390x": "s390"}
# Fields whose text names no constants, because it says what they are for.
_ALSO = {
    ("kvm_create_vm_attr_machine_type", "machine_type"): "arm64: KVM_CREATE_VM_ARM64_MACHINE_*",
    ("SystemEvent", "data"): "",  # what is named there is a flag of one type only
}


class Constants(NamedTuple):
    """What a field's numbers mean. `flags`: each bit by itself; otherwise the whole number is one of the constants."""

    names: dict[int, str]
    flags: bool

    def of(self, number: int) -> Value:
        """The number with its name; itself where nothing is known of it."""
        if not self.flags:
            return Named(number, self.names[number]) if number in self.names else number
        parts = [name for bit, name in self.names.items() if bit and number & bit == bit]
        left = number & ~sum(bit for bit in self.names if number & bit == bit)
        return Named(number, "|".join(parts + [hex(left)] * bool(left))) if parts else number


_constants: dict[tuple[str, str, str, str], Constants | None] = {}


def constants_of(cls: type[Structure], field: str, arch: str) -> Constants | None:
    """The constants that a field takes on an architecture; None where its text names none."""
    key = (cls.__module__, cls.__qualname__, field, arch)
    if key not in _constants:
        _constants[key] = _constants_of(cls, field, arch)
    return _constants[key]


def _constants_of(cls: type[Structure], field: str, arch: str) -> Constants | None:
    c_name = cls.LAYOUT.c_name
    doc = _ALSO.get((c_name, field), cls.LAYOUT.at(field).doc)
    flags = field in _FLAGS or field.endswith("flags") or "bit map of" in doc
    as_bits = "bit map of" in doc
    known = vars(sys.modules[cls.__module__]) | vars(vm2)
    found: dict[int, str] = {}
    for part in doc.split(";"):
        only = _ARCH.match(part)
        if only and only[1] != _MODULES.get(arch, arch):
            continue
        for word in _CONSTANT.findall(part):
            for name, value in _expanded(word, known):
                number = 1 << value if as_bits else value
                if not flags or as_bits or value & (value - 1) == 0:
                    found.setdefault(number, name)
    return Constants(found, flags) if found else None


def _expanded(word: str, known: dict[str, Any]) -> Iterator[tuple[str, int]]:
    if not word.endswith("*"):
        if isinstance(known.get(word), int):
            yield word, known[word]
        return
    for name, value in known.items():
        if name.startswith(word[:-1]) and isinstance(value, int):
            yield name, value


def register(reg_id: int) -> Value:
    """A KVM_GET_ONE_REG id by name; the id itself where it names nothing."""
    found = onereg.parse(reg_id)
    return reg_id if found.name.startswith("0x") else Named(reg_id, found.name)


def capability(number: int) -> Value:
    """A capability by name, or the number where 6.12 has no such."""
    name = caps.name_of(number)
    return Named(number, name) if name in caps.CAPABILITIES else number


def attribute_type(number: int) -> Value:
    """An attribute's type by the name of its constant."""
    row = vm2.ATTRIBUTES.get(number)
    return Named(number, row.constant) if row else number


_SPECIAL: dict[tuple[str, str], Callable[[int], Value]] = {
    ("kvm_one_reg", "id"): register,
    ("kvm_enable_cap", "cap"): capability,
    ("kvm_vm2_attr", "type"): attribute_type,
    ("kvm_vm2_attr_info", "type"): attribute_type,
    ("Io", "port"): lambda port: Named(port, hex(port)),
}


def fields(structure: Structure, arch: str = "arm64") -> dict[str, Value]:
    """The fields of a structure by their names in C. Padding is left out while it is zero, as it must be, and so is a
    flexible tail."""
    shown: dict[str, Value] = {}
    for f in structure.LAYOUT.fields:
        value = getattr(structure, f.name)
        if not f.size or (_PADDING.fullmatch(f.name) and not _any(value)):
            continue
        shown[f.name if isinstance(f.type, UnionOf) else f.c_name] = _field(type(structure), f, value, arch)
    return shown


def _any(value: Any) -> bool:
    return any(value) if isinstance(value, bytes | tuple) else bool(value)


def _field(cls: type[Structure], f: Field, value: Any, arch: str) -> Value:
    special = _SPECIAL.get((cls.LAYOUT.c_name, f.name))
    if special:
        return special(value)
    if isinstance(value, Structure):
        return fields(value, arch)
    if isinstance(f.type, UnionOf):
        member = dict(f.type.members).get(arch)
        return fields(member.unpack(value), arch) if member is not None else value
    if isinstance(value, bytes):
        return value.split(b"\0", 1)[0].decode("ascii", "replace") if _is_text(f.type) else value
    known = constants_of(cls, f.name, arch)
    if isinstance(value, tuple):
        parts: list[Value] = [fields(one, arch) if isinstance(one, Structure) else one for one in value]
        if known and parts:
            parts[0] = known.of(parts[0])
        return parts
    if known:
        return known.of(value)
    return Hex(value) if cls.LAYOUT.c_name in _REGISTERS else value


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Array) and isinstance(kind.item, Scalar) and kind.item.c_type == "char"


def text(value: Value) -> str:
    """For people: `{slot=0, flags=KVM_MEM_READONLY}`. Long lists and long bytes are cut short, and say so."""
    match value:
        case Named():
            return value.name
        case Record():
            return value.name + (text(value.fields) if value.fields else "")
        case dict():
            return "{" + ", ".join(f"{name}={text(one)}" for name, one in value.items()) + "}"
        case bytes():
            return _bytes_text(value)
        case list() | tuple():
            return _list_text(value)
        case int() if not isinstance(value, bool):
            return str(value) if value < (10 if isinstance(value, Hex) else DECIMAL_BELOW) else hex(value)
    return str(value)


def _bytes_text(value: bytes) -> str:
    kept = value.rstrip(b"\0")
    if not kept:
        return f"{len(value)} zero bytes" if len(value) > 8 else value.hex()
    if len(value) <= MOST_BYTES:
        return value.hex()
    if len(kept) <= MOST_BYTES:
        return f"{kept.hex()} and {len(value) - len(kept)} zero bytes"
    return f"{value[:MOST_BYTES].hex()}... ({len(value)} bytes)"


def _list_text(value: list[Value] | tuple[Value, ...]) -> str:
    items = list(value)
    while items and items[-1] == 0:
        items.pop()
    most = MOST_STRUCTURES if items and isinstance(items[0], dict) else MOST_ITEMS
    zeros, cut = len(value) - len(items), len(items) - most
    shown = [text(one) for one in items[:most]]
    if cut > 0:
        shown.append(f"... {cut + zeros} more")
    elif zeros:
        shown.append(f"0 x {zeros}" if zeros > 1 else "0")
    return "[" + ", ".join(shown) + "]"


def plain(value: Value) -> Any:
    """For JSON: named numbers as {"number", "name"}, records with their name inside, bytes as hexadecimal."""
    match value:
        case Named():
            return {"number": value.number, "name": value.name}
        case Record():
            return {"name": value.name, **{name: plain(one) for name, one in value.fields.items()}}
        case dict():
            return {name: plain(one) for name, one in value.items()}
        case bytes():
            return value.hex()
        case list() | tuple():
            return [plain(one) for one in value]
    return value

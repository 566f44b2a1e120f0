"""`generated/kvm2.schema.json`: the structures as JSON Schema, and the registry itself under "registry".

A structure is an object of its fields: integers within the range of their C type, byte arrays as hex strings.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvm2.abi import caps, exits, ioctls, onereg, vm2
from kvm2.abi.gen import MARKER
from kvm2.abi.gen.cdecl import c_leaves, docstring, is_structure, type_name
from kvm2.abi.gen.mainline import structures
from kvm2.abi.layout import CHAR, Array, Field, Scalar, Structure, UnionOf

if TYPE_CHECKING:
    from kvm2.abi.ioc import Ioctl

JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"


def range_of(kind: Scalar) -> tuple[int, int]:
    """The least and greatest value of an integer type."""
    bits = kind.size * 8
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind.code.islower() else (0, (1 << bits) - 1)


def field_schema(field: Field, cls: type[Structure] | None = None) -> dict[str, Any]:
    """The JSON Schema of one field."""
    schema = _type_schema(field.type)
    if field.doc:
        schema["description"] = field.doc
    for row in vm2.ATTRIBUTES.values():
        if row.cls is not cls:
            continue
        if field.name == "type":
            return {"const": row.type, "description": row.constant}
        if field.name == "capabilities":
            schema["maxItems"] = vm2.KVM_CREATE_VM2_MAX_CAPABILITIES // 64
        if rule := row.rules.get(field.name):
            schema |= _rule_schema(rule) if isinstance(field.type, Scalar) else {"$comment": rule.text}
    return schema


def _rule_schema(rule: vm2.Rule) -> dict[str, Any]:
    """The values that every host takes for well-formed."""
    if rule.mask:
        return {"enum": [n for n in range(rule.mask.bit_length()) if (n == 0 or rule.mask >> n & 1) and rule.allows(n)]}
    if rule.min == rule.max:
        return {"const": rule.min}
    allowed = {"minimum": rule.min, "maximum": rule.max}
    return {"anyOf": [{"const": 0}, allowed]} if rule.min > 0 and rule.allows(0) else allowed


def _type_schema(kind: Any) -> dict[str, Any]:
    if isinstance(kind, Scalar):
        low, high = range_of(kind)
        return {"type": "integer", "minimum": low, "maximum": high}
    if isinstance(kind, UnionOf):
        return _hex(kind.size)
    if isinstance(kind, Array):
        if kind.item is CHAR:
            return {"type": "string", "maxLength": max(kind.count - 1, 0)}
        if isinstance(kind.item, Scalar) and kind.item.size == 1:
            return _hex(kind.count)
        item = _hex(16) if isinstance(kind.item, Scalar) and kind.item.size == 16 else _type_schema(kind.item)
        return {"type": "array", "items": item} | ({"maxItems": kind.count} if kind.count else {})
    return struct_schema(kind)


def _hex(size: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^([0-9a-f]{{2}}){{0,{size}}}$"}


def struct_schema(cls: type[Structure]) -> dict[str, Any]:
    """The JSON Schema of a structure: an object that may leave out what is zero or has a default."""
    schema = {
        "type": "object",
        "description": docstring(cls),
        "properties": {f.name: field_schema(f, cls) for f in cls.LAYOUT.fields},
        "additionalProperties": False,
    }
    return schema | ({"required": ["type"]} if any(row.cls is cls for row in vm2.ATTRIBUTES.values()) else {})


def _finding() -> dict[str, Any]:
    numbers = {f.name: field_schema(f) for f in vm2.Vm2Finding.LAYOUT.fields if f.name not in ("message", "error")}
    error = {"type": "string", "description": 'the errno\'s name; "note"'}
    texts = {name: {"type": "string"} for name in ("message", "path", "hint", "by")}
    properties = {"error": error, "errno": {"type": "integer", "minimum": 0}, **numbers, **texts}
    required = [name for name in properties if name != "attr_type"]
    return {"type": "object", "description": docstring(vm2.Vm2Finding), "properties": properties, "required": required}


def _structure_row(cls: type[Structure]) -> dict[str, Any]:
    fields = [{"path": path, "offset": offset, "size": size} for path, offset, size in c_leaves(cls)]
    return {"name": cls.LAYOUT.c_name, "size": cls.SIZE, "fields": fields}


def _ioctl_row(row: Ioctl) -> dict[str, Any]:
    return {
        "name": row.name,
        "number": row.number,
        "direction": row.direction,
        "payload": type_name(row.payload) if row.payload else None,
        "on": list(row.on),
        "capability": row.cap,
        "arches": list(row.arches),
        "doc": row.doc,
        "arg": row.arg,
        "returns": row.returns or "0",
    }


def _attribute_row(row: vm2.Attribute) -> dict[str, Any]:
    rules = {name: {"allowed": rule.text, "min": rule.min, "max": rule.max} for name, rule in row.rules.items()}
    return {
        "type": row.type,
        "name": row.constant,
        "structure": row.c_name,
        "size": row.cls.SIZE,
        "first_published_size": row.published,
        "arches": sorted(row.arches),
        "has_value": row.has_value,
        "negotiable": row.negotiable,
        "skip_flags": row.skip,
        "rules": rules,
        "doc": row.doc,
    }


def registry() -> dict[str, Any]:
    """Everything that is declared, as plain data."""
    arm, x86 = structures("arm64"), structures("x86_64")
    return {
        "ioctls": [_ioctl_row(row) for row in ioctls.ioctls()],
        "attributes": [_attribute_row(row) for row in vm2.ATTRIBUTES.values()],
        "structures": {
            "kvm2": [_structure_row(cls) for cls in vm2.STRUCTURES],
            "arm64": [_structure_row(cls) for cls in arm],
            "x86_64": [_structure_row(cls) for cls in x86],
        },
        "capabilities": dict(caps.CAPABILITIES),
        "exits": [
            {"number": row.number, "name": row.name, "member": row.member, "arches": list(row.arches), "doc": row.doc}
            for row in exits.EXITS.values()
        ],
        "core_registers": {reg.name: f"{reg.id:#018x}" for reg in onereg.CORE_REGS},
    }


def document() -> dict[str, Any]:
    """The whole schema document."""
    defs = {cls.LAYOUT.c_name: struct_schema(cls) for cls in vm2.STRUCTURES}
    payloads = [row.payload for row in ioctls.IOCTLS]
    defs |= {kind.LAYOUT.c_name: struct_schema(kind) for kind in payloads if is_structure(kind)}
    defs["finding"] = _finding()
    defs["attribute"] = {"oneOf": [{"$ref": f"#/$defs/{row.c_name}"} for row in vm2.ATTRIBUTES.values()]}
    return {
        "$schema": JSON_SCHEMA,
        "$id": "urn:kvm2:abi:1",
        "$comment": MARKER.format("schema"),
        "title": "KVM_CREATE_VM2: a list of attributes",
        "type": "array",
        "maxItems": vm2.KVM_CREATE_VM2_MAX_ATTRS,
        "items": {"$ref": "#/$defs/attribute"},
        "$defs": defs,
        "registry": registry(),
    }


def schema() -> str:
    """The text of kvm2.schema.json."""
    return json.dumps(document(), indent=1) + "\n"

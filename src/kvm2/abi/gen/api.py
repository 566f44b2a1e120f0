"""`docs/api.rst`: the new ioctls in the manner of the kernel's Documentation/virt/kvm/api.rst."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from kvm2.abi import vm2
from kvm2.abi.gen import MARKER, api_text
from kvm2.abi.gen.cdecl import is_structure, struct_text
from kvm2.abi.gen.header import constants, new_ioctls

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvm2.abi.ioc import Ioctl
    from kvm2.abi.layout import Structure

WIDTH: Final = 100
_MACROS: Final = {"": "_IO", "w": "_IOW", "r": "_IOR", "wr": "_IOWR"}
# Structures that a call's section shows besides its argument.
_ALSO: Final[dict[str, tuple[type[Structure], ...]]] = {
    "KVM_CREATE_VM2_FIXED": (vm2.CreateVm2FixedArm64,),
    "KVM_DESCRIBE_VM2": (vm2.Vm2AttrInfo,),
}
# Groups of constants for the section of a call, by prefix.
_CONSTANTS: Final[dict[str, tuple[str, ...]]] = {
    "KVM_CREATE_VM2": ("KVM_CREATE_VM2_MAX_",),
    "KVM_CREATE_VM2_FIXED": ("KVM_ARM_",),
    "KVM_DESCRIBE_VM2": ("KVM_VM2_ATTR_INFO_",),
}


def _heading(text: str, mark: str) -> str:
    return f"{text}\n{mark * len(text)}\n\n"


def _literal(text: str) -> str:
    """A C text as a literal block."""
    return "::\n\n" + textwrap.indent(text.expandtabs(8), "  ") + "\n"


def _prose(text: str) -> str:
    return text.strip() + "\n\n"


def table(rows: Iterable[Sequence[str]]) -> str:
    """A simple table without headings; the last column is wrapped."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    left = sum(widths) + 2 * len(widths)
    last = min(WIDTH - left - 2, max(len(row[-1]) for row in cells))
    rule = "  " + "  ".join("=" * width for width in [*widths, last]) + "\n"
    text = rule
    for row in cells:
        first, *more = textwrap.wrap(row[-1], last) or [""]
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        text += f"  {head}  {first}".rstrip() + "\n"
        # A simple table takes a line whose first column is blank for more of the line above.
        text += "".join(f"  {' ' * left}{line}\n" for line in more)
    return text + rule + "\n"


def _constants(*prefixes: str) -> str:
    """A table of constants. The word before it ends the literal block that may stand above."""
    rows = [(name, value) for name, value in constants().items() if name.startswith(prefixes)]
    return "Constants:\n\n" + table((name, str(value) if "_MAX_" in name else f"{value:#x}") for name, value in rows)


def _call(number: int, row: Ioctl) -> str:
    parameters, prose = api_text.CALLS[row.name]
    on = {"system": "system ioctl", "vm": "vm ioctl", "vcpu": "vcpu ioctl"}[row.on[0]]
    payload = row.payload
    if not is_structure(payload):
        raise ValueError(f"{row.name} has no structure: docs/api.rst has no form for that")
    arches = "arm64" if row.arches == ("arm64",) else "all"
    text = _heading(f"2.{number} {row.name}", "-")
    text += f":Capability: {row.cap}\n:Architectures: {arches}\n:Type: {on}\n:Parameters: {parameters}\n"
    text += f":Returns: {row.returns or '0'}; -1 on error\n"
    text += f":Number: {row.number:#010x}, {_MACROS[row.direction]}(KVMIO, {row.nr:#04x}, "
    text += f"struct {payload.LAYOUT.c_name})\n\n"
    text += "Errors:\n\n" + table(sorted(api_text.ERRORS[row.name].items()))
    text += _prose(prose)
    if row.name != "KVM_VM2_SET_ATTRS" and row.name != "KVM_VM2_COMMIT":
        text += "".join(_structure(cls) for cls in (payload, *_ALSO.get(row.name, ())))
    if row.name in _CONSTANTS:
        text += _constants(*_CONSTANTS[row.name])
    return text


def _structure(cls: type[Structure]) -> str:
    return f"``struct {cls.LAYOUT.c_name}``, {cls.SIZE} bytes:\n\n" + _literal(struct_text(cls))


def _attribute(number: int, row: vm2.Attribute) -> str:
    arches = "all" if len(row.arches) > 2 else ", ".join(sorted(row.arches))
    text = _heading(f"3.{number} {row.constant}", "-")
    text += f":Type: {row.type}\n:Architectures: {arches}\n:Negotiable: {'yes' if row.negotiable else 'no'}\n"
    text += f":Readable: {'yes' if row.has_value else 'no'}\n:May be skipped: {_skip(row.skip)}\n\n"
    text += _prose(row.doc) + _prose(api_text.ATTRIBUTES[row.macro])
    for name, rule in row.rules.items():
        text += f"``{name}`` must be {rule.text} (EINVAL).\n\n"
    return text + _structure(row.cls)


def _skip(flags: int) -> str:
    names = [n for n, bit in constants().items() if n.startswith("KVM_CREATE_VM_ATTR_SKIP_") and flags & bit]
    return ", ".join(name.removeprefix("KVM_CREATE_VM_ATTR_") for name in names) or "never"


def api() -> str:
    """The text of api.rst."""
    text = f".. SPDX-License-Identifier: GPL-2.0-only\n.. {MARKER.format('api')}\n\n"
    title = "Creating a VM from attributes: KVM_CREATE_VM2"
    text += "=" * len(title) + "\n" + _heading(title, "=") + _prose(api_text.INTRO)
    text += _heading("1. General description", "=") + _prose(api_text.GENERAL)
    text += _heading("2. The calls", "=")
    for number, row in enumerate(new_ioctls(), 1):
        text += _call(number, row)
    text += _heading("3. The attributes", "=") + _prose(api_text.ATTRIBUTES_INTRO) + _structure(vm2.AttrHdr)
    text += _constants("KVM_CREATE_VM_ATTR_SKIP_")
    text += "".join(_attribute(n, row) for n, row in enumerate(vm2.ATTRIBUTES.values(), 1))
    text += _constants("KVM_CREATE_VM_ARM64_")
    text += _heading("4. The report", "=") + _prose(api_text.REPORT) + _structure(vm2.Vm2Finding)
    text += _constants("KVM_VM2_FINDING_")
    text += _heading("5. Capabilities", "=") + _heading("5.1 KVM_CAP_CREATE_VM2", "-")
    text += f":Number: {vm2.KVM_CAP_CREATE_VM2}\n:Architectures: all\n:Type: system, vm\n"
    text += ":Returns: a mask of the calls that there are, 0 where there are none\n\n"
    masks = [name for name in constants() if name.startswith("KVM_CREATE_VM2_") and "_MAX_" not in name]
    text += table([(name, f"{constants()[name]:#x}", _MASKS[name]) for name in masks])
    return text + _heading("6. Example", "=") + _prose(api_text.EXAMPLE).rstrip("\n") + "\n"


_MASKS: Final = {
    "KVM_CREATE_VM2_LIST": "KVM_CREATE_VM2, KVM_VM2_GET_ATTR",
    "KVM_CREATE_VM2_STRUCT_FIXED": "KVM_CREATE_VM2_FIXED, KVM_VM2_GET_ATTR",
    "KVM_CREATE_VM2_NEGOTIATION": "the attribute NEGOTIATE, KVM_VM2_SET_ATTRS, KVM_VM2_COMMIT",
    "KVM_CREATE_VM2_DESCRIBE": "KVM_DESCRIBE_VM2",
}

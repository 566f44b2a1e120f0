"""`generated/kvm2.h`: the C header of the new interface, and `generated/kvm2_check.c`, which proves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi import ioctls, vm2
from kvm2.abi.gen import MARKER
from kvm2.abi.gen.cdecl import c_leaves, comment, is_structure, struct_text, type_name

if TYPE_CHECKING:
    from kvm2.abi.ioc import Ioctl

# (title, prefixes or names, how the value is written). The first group that fits a constant has it.
_GROUPS: Final = (
    ("KVM_CHECK_EXTENSION takes this, and answers which of the calls the host has.", ("KVM_CAP_",), "number"),
    (
        "Limits: attributes in a list, bytes of one, bits of a set of capabilities.",
        ("KVM_CREATE_VM2_MAX_",),
        "number",
    ),
    ("Bits of the answer to KVM_CAP_CREATE_VM2.", ("KVM_CREATE_VM2_",), "bit"),
    ("Flags of an attribute.", ("KVM_CREATE_VM_ATTR_SKIP_",), "bit"),
    ("Types of attributes.", ("KVM_CREATE_VM_ATTR_",), "type"),
    ("arm64's values of kvm_create_vm_attr_machine_type.machine_type.", ("KVM_CREATE_VM_ARM64_MACHINE_",), "number"),
    ("arm64's bits of kvm_create_vm_attr_arch_capabilities.capabilities[0].", ("KVM_CREATE_VM_ARM64_",), "wide bit"),
    ("Bits of kvm_create_vm2_fixed.arm64.capabilities.", ("KVM_ARM_",), "wide bit"),
    ("Flags of kvm_vm2_attr_info.", ("KVM_VM2_ATTR_INFO_",), "bit"),
    ("kvm_vm2_finding.attr_index of what is not in the list.", ("KVM_VM2_FINDING_",), "hex"),
)


def constants() -> dict[str, int]:
    """Every constant of the new interface, in the order of its declaration."""
    return {name: value for name, value in vars(vm2).items() if name.startswith("KVM_") and isinstance(value, int)}


def new_ioctls() -> list[Ioctl]:
    """The ioctls that no mainline kernel has."""
    return [row for row in ioctls.IOCTLS if row.cap == "KVM_CAP_CREATE_VM2"]


def _value(value: int, style: str) -> str:
    if style.endswith("bit"):
        return f"(1{'ULL' if style == 'wide bit' else 'U'} << {value.bit_length() - 1})"
    return f"{value:#x}U" if style == "hex" else str(value)


def summary(doc: str) -> str:
    """The first clause of a text."""
    return doc.split(".")[0].split(":")[0]


def _constants_text() -> str:
    left, text = constants(), ""
    for title, prefixes, style in _GROUPS:
        text += "\n" + comment(title)
        for name in [name for name in left if name.startswith(prefixes)]:
            value = left.pop(name)
            line = f"#define {name} {_value(value, style)}"
            text += line + (f" /* {summary(vm2.ATTRIBUTES[value].doc)} */" if style == "type" else "") + "\n"
    if left:
        raise ValueError(f"constants of abi/vm2.py that no group of the header has: {', '.join(left)}")
    return text


def _macro(row: Ioctl) -> str:
    macro = {"": "_IO", "w": "_IOW", "r": "_IOR", "wr": "_IOWR"}[row.direction]
    return f"#define {row.name} {macro}(KVMIO, {row.nr:#04x}, {type_name(row.payload)})"


def header() -> str:
    """The text of kvm2.h."""
    text = "/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */\n"
    text += f"/* {MARKER.format('header')} */\n"
    text += comment(
        "KVM_CREATE_VM2: creating a KVM virtual machine from a list of attributes. The structures are the same for 32- "
        "and 64-bit callers; every reserved byte must be zero."
    )
    text += "#ifndef KVM2_H\n#define KVM2_H\n\n#include <linux/ioctl.h>\n#include <linux/types.h>\n\n"
    text += "#ifndef KVMIO\n#define KVMIO 0xAE\n#endif\n" + _constants_text()
    for cls in vm2.STRUCTURES:
        text += "\n" + struct_text(cls)
    text += "\n" + comment("Every attribute; type says which member counts.") + "union kvm_create_vm_attr {\n"
    text += "".join(f"\tstruct {cls.LAYOUT.c_name} {name};\n" for name, cls in vm2.UNION_MEMBERS) + "};\n"
    for row in new_ioctls():
        on = {"system": "/dev/kvm"}.get(row.on[0], f"a {row.on[0].upper()}")
        text += "\n" + comment(f"On {on}. {row.doc}") + _macro(row) + "\n"
    return text + "\n#endif /* KVM2_H */\n"


def check() -> str:
    """The text of kvm2_check.c: a static assertion for every size, offset and number."""
    text = f"/* SPDX-License-Identifier: GPL-2.0-only */\n/* {MARKER.format('header --check')} */\n"
    text += '#include "kvm2.h"\n\n#ifdef __cplusplus\n#define SAME(a, b) static_assert((a) == (b), #a)\n'
    text += "#else\n#define SAME(a, b) _Static_assert((a) == (b), #a)\n#endif\n"
    text += "#define OFFSET(type, member) __builtin_offsetof(type, member)\n"
    text += "#define SIZE(type, member) sizeof(((type *)0)->member)\n\n"
    for cls in vm2.STRUCTURES:
        tag = f"struct {cls.LAYOUT.c_name}"
        text += f"SAME(sizeof({tag}), {cls.SIZE});\n"
        for path, offset, size in c_leaves(cls):
            text += f"SAME(OFFSET({tag}, {path}), {offset});\nSAME(SIZE({tag}, {path}), {size});\n"
    widest = max(cls.SIZE for _, cls in vm2.UNION_MEMBERS)
    text += f"SAME(sizeof(union kvm_create_vm_attr), {widest});\n\n"
    text += "".join(f"SAME({name}, {value:#x}U);\n" for name, value in constants().items())
    text += "".join(f"SAME({row.name}, {row.number:#x}U);\n" for row in new_ioctls() if is_structure(row.payload))
    return text

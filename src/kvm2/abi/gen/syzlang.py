"""`generated/kvm2.syz.txt`: the ioctls as syzkaller descriptions, and the values of its constants.

Structures follow the declarations: a field whose text starts with "->" is a pointer, one called pad or reserved is
zero, sizes and types of attributes are what they must be. Where the architectures differ, names end in the
architecture. The file has every KVM ioctl, so it stands in place of syzkaller's own dev_kvm*.txt, not beside them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

from kvm2.abi import ioctls, structs_arm64, vm2
from kvm2.abi.gen import MARKER
from kvm2.abi.gen.cdecl import declared, docstring, is_named
from kvm2.abi.layout import Array, Field, Scalar, Structure, UnionOf

if TYPE_CHECKING:
    from kvm2.abi.ioc import Ioctl

_FDS: Final = {"system": "fd_kvm", "vm": "fd_kvmvm", "vcpu": "fd_kvmcpu", "device": "fd_kvmdev"}
_RETURNS: Final = {"a VM fd": "fd_kvmvm", "a vCPU fd": "fd_kvmcpu"}
_DIRECTIONS: Final = {"w": "in", "r": "out", "wr": "inout", "": "in"}
_HEAD: Final = """\
include <linux/kvm.h>
include <kvm2.h>

resource fd_kvm[fd]
resource fd_kvmvm[fd]
resource fd_kvmcpu[fd]
resource fd_kvmdev[fd]

openat$kvm2(fd const[AT_FDCWD], file ptr[in, string["/dev/kvm"]], flags const[O_RDWR], mode const[0]) fd_kvm
"""
# Fields whose type says more than the structure does: (structure, field) -> type.
_KNOWN: Final = {
    ("kvm_create_vm2", "nr_attrs"): "len[attrs, int16]",
    ("kvm_create_vm2", "attrs"): "ptr64[in, array[ptr64[inout, kvm_create_vm_attr]]]",
    ("kvm_describe_vm2", "count"): "len[entries, int32]",
    ("kvm_describe_vm2", "entries"): "ptr64[out, array[kvm_vm2_attr_info]]",
    ("kvm_vm2_attr", "type"): "flags[kvm_create_vm_attr_types, int32]",
    ("kvm_vm2_attr", "size"): "bytesize[attr, int32]",
    ("kvm_vm2_attr", "attr"): "ptr64[inout, kvm_create_vm_attr]",
    ("kvm_create_vm_attr_report", "records"): "ptr64[out, array[kvm_vm2_finding]]",
    ("kvm_create_vm_attr_report", "capacity"): "len[records, int32]",
    ("kvm_create_vm_attr_any", "type"): "flags[kvm_create_vm_attr_types, int32]",
    ("kvm_create_vm_attr_hdr", "type"): "flags[kvm_create_vm_attr_types, int32]",
    ("kvm_create_vm_attr_hdr", "size"): "bytesize[parent, int16]",
    ("kvm_create_vm_attr_arch_capabilities", "size"): "bitsize[capabilities, int16]",
    (
        "kvm_create_vm_attr_arch_capabilities",
        "capabilities",
    ): "array[flags[kvm_create_vm_arm64_caps, int64], 1]",
    ("kvm_create_vm2_fixed_arm64", "capabilities"): "flags[kvm_create_vm2_fixed_arm64_capabilities, int64]",
    ("kvm_create_vm_attr_arm64_granule", "page_shift"): "flags[kvm_create_vm_attr_page_shifts, int32]",
    ("kvm_userspace_memory_region", "memory_size"): "len[userspace_addr, int64]",
    ("kvm_userspace_memory_region", "userspace_addr"): "vma64",
    ("kvm_userspace_memory_region2", "memory_size"): "len[userspace_addr, int64]",
    ("kvm_userspace_memory_region2", "userspace_addr"): "vma64",
    ("kvm_create_device", "fd"): "fd_kvmdev (out)",
    ("kvm_irqfd", "fd"): "fd",
    ("kvm_ioeventfd", "fd"): "fd",
    ("kvm_reg_list", "n"): "int64",
}


class Description:
    """Collects what the calls need: structures by their C tag, each once."""

    def __init__(self) -> None:
        self.blocks: dict[str, str] = {}
        self.values: dict[str, int] = {}

    def const(self, name: str, value: int) -> str:
        """The name, its value noted for the .const file."""
        self.values[name] = value
        return name

    def struct(self, cls: type[Structure], arch: str) -> str:
        """The name of a structure, declared with all that it holds."""
        name = _tag(cls, arch)
        if name not in self.blocks:
            self.blocks[name] = ""
            lines = [f"\t{f.c_name}\t{self.field(cls, f, arch)}" for f in cls.LAYOUT.fields]
            self.blocks[name] = f"# {docstring(cls)}\n{name} {{\n" + "\n".join(lines) + "\n}\n"
        return name

    def field(self, cls: type[Structure], f: Field, arch: str) -> str:
        """The type of a field."""
        tag = cls.LAYOUT.c_name
        if known := _KNOWN.get((tag, f.c_name)):
            return known
        row = next((row for row in vm2.ATTRIBUTES.values() if row.cls is cls), None)
        if row and f.name == "type":
            return f"const[{self.const(row.constant, row.type)}, int32]"
        if row and f.name == "size":
            return "bytesize[parent, int16]"
        if f.name == "flags" and tag.startswith("kvm_create_vm_attr_"):
            return "flags[kvm_create_vm_attr_flags, int16]"
        if row and f.name in row.rules and isinstance(f.type, Scalar) and row.rules[f.name].max:
            return f"{_int(f.type)}[0:{row.rules[f.name].max}]"
        last = cls.LAYOUT.fields[-1]
        if f.c_name in ("nr", "nmsrs", "nent", "nevents") and not last.size:
            return f"len[{last.c_name}, {_int(f.type)}]"
        if f.doc.startswith("->"):
            return "ptr64[inout, array[int8]]"
        return self.type(f.type, arch, zero=f.name.startswith(("pad", "reserved", "version")))

    def type(self, kind: Any, arch: str, zero: bool = False) -> str:
        """A C type."""
        if isinstance(kind, Scalar):
            return f"const[0, {_int(kind)}]" if zero else _int(kind)
        if isinstance(kind, Array):
            item = self.type(kind.item, arch, zero)
            return f"array[{item}, {kind.count}]" if kind.count else f"array[{item}]"
        if isinstance(kind, UnionOf):
            return self.union(kind, arch)
        return self.struct(kind, arch)

    def union(self, kind: UnionOf, arch: str) -> str:
        """The name of a union without a tag, made from its members' names."""
        name = "kvm_union_" + "_".join(name for name, _ in kind.members)
        lines = [f"\t{member}\t{self.type(of, arch)}" for member, of in kind.members]
        self.blocks[name] = f"{name} [\n" + "\n".join(lines) + "\n]\n"
        return name


def _int(kind: Scalar) -> str:
    return f"int{kind.size * 8}" if kind.size <= 8 else f"array[int8, {kind.size}]"


@cache
def _twice() -> frozenset[str]:
    """Class names that both architectures declare, each in its own way."""
    from kvm2.abi import structs_x86, structs_x86_vm

    theirs = {cls.__name__ for module in (structs_x86, structs_x86_vm) for cls in declared(module)}
    return frozenset(theirs & {cls.__name__ for cls in declared(structs_arm64)})


def _tag(cls: type[Structure], arch: str) -> str:
    tag = cls.LAYOUT.c_name if is_named(cls) else f"kvm_{cls.__name__.lower()}"
    own = cls.__module__.rpartition(".")[2]
    ambiguous = cls.__name__ in _twice() and own.startswith(("structs_x86", "structs_arm64"))
    return f"{tag}_{arch}" if ambiguous else tag


def _call(row: Ioctl, kind: str, into: Description) -> str:
    alike = ioctls.named(row.name)
    suffix = "" if len(alike) == 1 else f"_{row.arches[0]}"
    suffix += "" if len(row.on) == 1 else f"_{kind}"
    arg = _argument(row, into)
    returns = _RETURNS.get(row.returns.partition(";")[0], "")
    name = into.const(row.name, row.number) if not suffix else row.name
    call = f"ioctl${row.name}{suffix}(fd {_FDS[kind]}, cmd const[{name}], arg {arg})"
    return f"{call} {returns}".rstrip() + "\n"


def _argument(row: Ioctl, into: Description) -> str:
    if row.payload is None:
        return "intptr" if row.arg else "const[0]"
    arch = row.arches[0]
    if isinstance(row.payload, Scalar):
        return f"ptr[{_DIRECTIONS[row.direction]}, {into.type(row.payload, arch)}]"
    direction = _DIRECTIONS[row.direction]
    pointers = any(f.doc.startswith(("->", "out")) for f in row.payload.LAYOUT.fields)
    # The macro's direction is history: what is written as "in" may hold pointers through which the kernel writes, and
    # a few calls that the kernel only reads are _IOR.
    if pointers or (direction == "out" and "GET" not in row.name and "PREFERRED" not in row.name):
        direction = "inout"
    return f"ptr[{direction}, {into.struct(row.payload, arch)}]"


def _flags(into: Description) -> str:
    types = [into.const(row.constant, row.type) for row in vm2.ATTRIBUTES.values()]
    groups = {
        "kvm_create_vm_attr_types": types,
        "kvm_create_vm_attr_flags": _named(into, "KVM_CREATE_VM_ATTR_SKIP_"),
        "kvm_create_vm_arm64_caps": [name for name in _named(into, "KVM_CREATE_VM_ARM64_") if "_MACHINE_" not in name],
        "kvm_create_vm2_fixed_arm64_capabilities": _named(into, "KVM_ARM_"),
        "kvm_create_vm_attr_page_shifts": ["0", "12", "14", "16"],
    }
    return "".join(f"{name} = {', '.join(values)}\n" for name, values in groups.items())


def _named(into: Description, prefix: str) -> list[str]:
    return [into.const(k, v) for k, v in vars(vm2).items() if k.startswith(prefix) and isinstance(v, int)]


def describe() -> tuple[str, dict[str, int]]:
    """The text of kvm2.syz.txt and the values of the constants that it names."""
    into = Description()
    calls = "".join(_call(row, kind, into) for row in ioctls.ioctls() for kind in row.on)
    for row in ioctls.ioctls():
        into.values[row.name] = row.number
    into.values |= {"AT_FDCWD": (1 << 64) - 100, "O_RDWR": 2}
    union = "# Every attribute; type says which member counts.\nkvm_create_vm_attr [\n"
    union += "".join(f"\t{name}\t{into.struct(cls, 'arm64')}\n" for name, cls in vm2.UNION_MEMBERS) + "] [varlen]\n"
    for cls in (vm2.Vm2AttrInfo, vm2.Vm2Finding, structs_arm64.VcpuInit):
        into.struct(cls, "arm64")
    text = f"# {MARKER.format('syzlang')}\n{_HEAD}{calls}\n{union}\n" + "\n".join(into.blocks.values())
    return text + "\n" + _flags(into), into.values


def syzlang() -> str:
    """The text of kvm2.syz.txt."""
    return describe()[0]


def constants() -> str:
    """The text of kvm2.syz.txt.const: what syz-extract would find, had a kernel the header."""
    text = f"# {MARKER.format('syzlang --const')}\narches = amd64, arm64\n"
    for name, value in sorted(describe()[1].items()):
        rows = {arch: row.number for row in ioctls.named(name) for arch in row.arches}
        if len(set(rows.values())) > 1:
            text += f"{name} = amd64:{rows['x86_64']}, arm64:{rows['arm64']}\n"
        else:
            text += f"{name} = {value}\n"
    return text

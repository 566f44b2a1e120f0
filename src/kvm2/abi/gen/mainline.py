"""C files that compare the registry with the headers of a 6.12 kernel: one static assertion per size, offset, number.

They are compiled for their architecture with the kernel's linux/kvm.h in the include path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi import caps, exits, ioctls, onereg, structs, structs_arm64, structs_irq
from kvm2.abi.gen import MARKER
from kvm2.abi.gen.cdecl import c_leaves, declared, is_named, is_structure

if TYPE_CHECKING:
    from types import ModuleType

    from kvm2.abi.layout import Structure

# Names that are ours: groups and shorthands, not macros of a kernel header.
_NOT_MACROS: Final = {"KVM_CAP_CREATE_VM2"}


def modules(arch: str) -> list[ModuleType]:
    """The modules that declare the structures of an architecture."""
    common = [structs, structs_irq]
    if arch == "arm64":
        return [*common, structs_arm64]
    from kvm2.abi import structs_sev, structs_x86, structs_x86_vm

    return [*common, structs_x86, structs_x86_vm, structs_sev]


def structures(arch: str) -> list[type[Structure]]:
    """Every structure of an architecture that has a tag in C, each once."""
    found = {cls.LAYOUT.c_name: cls for module in modules(arch) for cls in declared(module) if is_named(cls)}
    return list(found.values())


def macros(arch: str) -> dict[str, int]:
    """Every constant of the registry that is a macro of the kernel's headers."""
    sources = [caps, exits, *modules(arch)] + ([onereg] if arch == "arm64" else [])
    found: dict[str, int] = {}
    for source in sources:
        ints = {name: value for name, value in vars(source).items() if isinstance(value, int)}
        found |= {name: value for name, value in ints.items() if name.startswith(("KVM_", "SYNC_REGS_SIZE"))}
    for name in _NOT_MACROS | _of_others(arch):
        found.pop(name, None)
    return found


def _of_others(arch: str) -> set[str]:
    """Macros that only the other architecture's header defines."""
    arm = {"KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2", "KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED"}
    arm |= {name for name in vars(exits) if name.startswith("KVM_HYPERCALL_EXIT_")}
    arm |= {name for name in vars(structs_irq) if name.startswith("KVM_ARM_")}
    # linux/kvm.h has these only where the architecture's header says so.
    x86 = ("REINJECT_CONTROL", "MCE", "PIT2", "PIT_STATE2", "XEN_HVM", "DEBUGREGS", "XSAVE", "XCRS")
    return {f"KVM_CAP_{name}" for name in x86} if arch == "arm64" else arm


def _struct_asserts(cls: type[Structure]) -> str:
    tag = f"struct {cls.LAYOUT.c_name}"
    text = f"SAME(sizeof({tag}), {cls.SIZE});\n"
    for path, offset, size in c_leaves(cls):
        text += f"SAME(OFFSET({tag}, {path}), {offset});\n"
        if size:
            text += f"SAME(SIZE({tag}, {path}), {size});\n"
    return text


def _exit_asserts(arch: str) -> str:
    members = {row.member: exits.payload_of(row.number, arch) for row in exits.EXITS.values() if row.payload}
    members["emulation_failure"] = exits.EmulationFailure
    text = _struct_asserts(exits.Run)
    for member, payload in members.items():
        if payload is None:
            continue
        base = exits.UNION_OFFSET
        text += f"SAME(SIZE(struct kvm_run, {member}), {payload.SIZE});\n"
        text += f"SAME(OFFSET(struct kvm_run, {member}), {base});\n"
        inner = member if member != "debug" or arch == "arm64" else "debug.arch"
        for path, offset, _ in c_leaves(payload, f"{inner}.", base):
            text += f"SAME(OFFSET(struct kvm_run, {path}), {offset});\n"
    return text


def _core_asserts() -> str:
    parts = {"fp_regs.reserved": "fp_regs.__reserved"}
    text = ""
    for reg in onereg.CORE_REGS:
        macro = f"KVM_REG_ARM_CORE_REG({parts.get(reg.name, reg.name)})"
        bits = (reg.size.bit_length() - 1) << onereg.KVM_REG_SIZE_SHIFT
        text += f"SAME(KVM_REG_ARM64 | {bits:#x}ULL | KVM_REG_ARM_CORE | {macro}, {reg.id:#x}ULL);\n"
    for n in range(32):
        text += f"SAME(KVM_REG_ARM64_SVE_ZREG({n}, 3), {onereg.sve_z(n, 3):#x}ULL);\n"
    for n in range(16):
        text += f"SAME(KVM_REG_ARM64_SVE_PREG({n}, 3), {onereg.sve_p(n, 3):#x}ULL);\n"
    return text + f"SAME(KVM_REG_ARM64_SVE_FFR(3), {onereg.sve_ffr(3):#x}ULL);\n"


def check(arch: str) -> str:
    """The text of mainline_<arch>.c."""
    text = f"/* SPDX-License-Identifier: GPL-2.0-only */\n/* {MARKER.format('header --mainline ' + arch)} */\n"
    text += "#include <linux/bits.h>\n#include <linux/kvm.h>\n\n"
    text += "#ifndef offsetof\n#define offsetof __builtin_offsetof\n#endif\n"
    text += "#define SAME(a, b) _Static_assert((a) == (b), #a)\n"
    text += "#define OFFSET(type, member) __builtin_offsetof(type, member)\n"
    text += "#define SIZE(type, member) sizeof(((type *)0)->member)\n\n"
    text += "".join(_struct_asserts(cls) for cls in structures(arch)) + _exit_asserts(arch) + "\n"
    for row in ioctls.ioctls(arch):
        if row.cap != "KVM_CAP_CREATE_VM2":
            text += f"SAME({row.name}, {row.number:#x}U);\n"
            if is_structure(row.payload) and row.direction:
                text += f"SAME(_IOC_SIZE({row.name}), {row.size});\n"
    text += "".join(f"SAME({name}, {value:#x}ULL);\n" for name, value in macros(arch).items())
    return text + (_core_asserts() if arch == "arm64" else "")

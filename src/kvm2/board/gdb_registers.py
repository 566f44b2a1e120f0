"""The registers of an arm64 vCPU as gdb numbers them, and the target description that says so.

The features org.gnu.gdb.aarch64.core and .fpu are gdb's own (GDB manual, "AArch64 Features"); kvm2.aarch64.system has
the system registers that one looks at when a kernel does not come up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.vcpu import Vcpu

EL1H: Final = 5
_MODE: Final = 0xF
V_BYTES: Final = 16
SYSTEM: Final = (
    *("SCTLR_EL1", "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1", "VBAR_EL1", "CPACR_EL1", "CONTEXTIDR_EL1"),
    *("ELR_EL1", "SPSR_EL1", "ESR_EL1", "FAR_EL1", "SP_EL0", "SP_EL1", "TPIDR_EL0", "TPIDR_EL1", "PAR_EL1"),
    *("MPIDR_EL1", "MDSCR_EL1", "CNTV_CTL_EL0", "CNTV_CVAL_EL0"),
)
_IN_CORE: Final = frozenset({"ELR_EL1", "SPSR_EL1", "SP_EL0", "SP_EL1"})  # KVM's core registers, not system ones


@dataclass(frozen=True)
class Register:
    """One register: gdb's name, its size in bytes, its type and group for the description, and ours for ONE_REG."""

    name: str
    size: int
    kind: str
    group: str
    one_reg: str


CORE: Final = (
    *(Register(f"x{n}", 8, "int", "general", f"x{n}") for n in range(31)),
    Register("sp", 8, "data_ptr", "general", ""),
    Register("pc", 8, "code_ptr", "general", "pc"),
    Register("cpsr", 4, "cpsr_flags", "general", "pstate"),
)
FPU: Final = (
    *(Register(f"v{n}", V_BYTES, "aarch64v", "float", f"v{n}") for n in range(32)),
    *(Register(name, 4, "int", "float", name) for name in ("fpsr", "fpcr")),
)
SYSTEM_REGISTERS: Final = tuple(
    Register(name.lower(), 8, "int", "system", name.lower() if name in _IN_CORE else name) for name in SYSTEM
)
ALL: Final = (*CORE, *FPU, *SYSTEM_REGISTERS)
PC, CPSR = 32, 33

_FLAGS: Final = (
    *(("SP", 0), ("EL", 2), ("nRW", 4), ("F", 6), ("I", 7), ("A", 8), ("D", 9), ("IL", 20), ("SS", 21)),
    *(("PAN", 22), ("UAO", 23), ("V", 28), ("C", 29), ("Z", 30), ("N", 31)),
)
_TYPES: Final = """
<vector id="v2d" type="ieee_double" count="2"/><vector id="v2u" type="uint64" count="2"/>
<vector id="v4f" type="ieee_single" count="4"/><vector id="v4u" type="uint32" count="4"/>
<vector id="v8u" type="uint16" count="8"/><vector id="v16u" type="uint8" count="16"/>
<vector id="v1u" type="uint128" count="1"/>
<union id="vnd"><field name="f" type="v2d"/><field name="u" type="v2u"/></union>
<union id="vns"><field name="f" type="v4f"/><field name="u" type="v4u"/></union>
<union id="vnh"><field name="u" type="v8u"/></union>
<union id="vnb"><field name="u" type="v16u"/></union>
<union id="vnq"><field name="u" type="v1u"/></union>
<union id="aarch64v"><field name="d" type="vnd"/><field name="s" type="vns"/><field name="h" type="vnh"/>
<field name="b" type="vnb"/><field name="q" type="vnq"/></union>"""


def target_xml() -> bytes:
    """The description that qXfer:features:read gives."""
    number = 0

    def feature(name: str, types: str, registers: tuple[Register, ...]) -> str:
        nonlocal number
        lines = [f'<feature name="{name}">', types]
        for register in registers:
            lines.append(
                f'<reg name="{register.name}" bitsize="{8 * register.size}" type="{register.kind}" '
                f'group="{register.group}" regnum="{number}"/>'
            )
            number += 1
        return "\n".join([*lines, "</feature>"])

    fields = "".join(f'<field name="{name}" start="{bit}" end="{bit + (name == "EL")}"/>' for name, bit in _FLAGS)
    flags = f'<flags id="cpsr_flags" size="4">{fields}</flags>'
    parts = (
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">',
        "<architecture>aarch64</architecture>",
        feature("org.gnu.gdb.aarch64.core", flags, CORE),
        feature("org.gnu.gdb.aarch64.fpu", _TYPES, FPU),
        feature("kvm2.aarch64.system", "", SYSTEM_REGISTERS),
        "</target>\n",
    )
    return "\n".join(parts).encode()


def _stack_pointer(vcpu: Vcpu) -> str:
    pstate = vcpu.get_reg("pstate")
    assert isinstance(pstate, int)
    return "sp_el1" if pstate & _MODE == EL1H else "sp_el0"


def read(vcpu: Vcpu, register: Register) -> bytes | None:
    """The register's bytes in the guest's order; None where this vCPU does not have it."""
    try:
        value = vcpu.get_reg(register.one_reg or _stack_pointer(vcpu))
    except KvmError:
        if register.kind != "aarch64v":
            return None
        return _vector(vcpu, register)[:V_BYTES] or None
    data = value if isinstance(value, bytes) else value.to_bytes(8, "little")
    return data[: register.size]


def _vector(vcpu: Vcpu, register: Register) -> bytes:
    """The Z register over a V register: with SVE, KVM has only that one."""
    try:
        value = vcpu.get_reg(f"z{register.name[1:]}")
    except KvmError:
        return b""
    return value if isinstance(value, bytes) else b""


def write(vcpu: Vcpu, register: Register, data: bytes) -> None:
    """Set it; KvmError where KVM refuses."""
    if register.kind != "aarch64v":
        vcpu.set_reg(register.one_reg or _stack_pointer(vcpu), int.from_bytes(data, "little"))
        return
    try:
        vcpu.set_reg(register.one_reg, data)
    except KvmError:
        whole = _vector(vcpu, register)
        if not whole:
            raise
        vcpu.set_reg(f"z{register.name[1:]}", data + whole[V_BYTES:])

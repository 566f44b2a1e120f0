"""The state of a vCPU as plain data: the truth while no emulated core holds it.

Shapes are those of KVM's registers (`KVM_REG_ARM_CORE`, `KVM_REG_ARM64_SVE`): a Z register is always 256 bytes, its
low 16 bytes are the V register, and what lies above the vector length in use is zero.
"""

from __future__ import annotations

Z_BYTES = 256
P_BYTES = 32

# PSTATE after a reset of a vCPU: EL1h with D, A, I and F masked (VCPU_RESET_PSTATE_EL1 of arch/arm64/kvm/reset.c).
RESET_PSTATE = 0x3C5

SPSR_EL1, SPSR_ABT, SPSR_UND, SPSR_IRQ, SPSR_FIQ = range(5)


class CpuState:
    """Everything that makes a vCPU's architectural state, as of a reset with all registers zero.

    `sys` maps a system register's encoding (`op0<<14 | op1<<11 | crn<<7 | crm<<3 | op2`) to its value; SP_EL1, ELR_EL1
    and SPSR_EL1 are core registers in KVM's interface and live in their own fields, not in `sys`.

    >>> state = CpuState()
    >>> len(state.x), hex(state.pstate), len(state.v[0]), len(state.p[0])
    (31, '0x3c5', 256, 32)
    >>> state.copy().x == state.x
    True
    """

    __slots__ = ("elr_el1", "ffr", "fpcr", "fpsr", "p", "pc", "pstate", "sp_el0", "sp_el1", "spsr", "sys", "v", "x")

    def __init__(self) -> None:
        self.x: list[int] = [0] * 31
        self.sp_el0 = 0
        self.pc = 0
        self.pstate = RESET_PSTATE
        self.sp_el1 = 0
        self.elr_el1 = 0
        self.spsr: list[int] = [0] * 5
        self.v: list[bytes] = [bytes(Z_BYTES)] * 32
        self.p: list[bytes] = [bytes(P_BYTES)] * 16
        self.ffr = bytes(P_BYTES)
        self.fpsr = 0
        self.fpcr = 0
        self.sys: dict[int, int] = {}

    def copy(self) -> CpuState:
        """An independent copy (snapshots, tests)."""
        other = CpuState()
        for name in self.__slots__:
            value = getattr(self, name)
            setattr(other, name, value.copy() if isinstance(value, list | dict) else value)
        return other

"""What a hypercall does: the values for the caller's registers, and the exit to prepare.

>>> Result.of(-1).values
(18446744073709551615, 0, 0, 0)
"""

from __future__ import annotations

from typing import NamedTuple

U32, U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
SMCCC_VERSION = 0x80000000
PSCI_0_1_BASE = 0x95C1BA5E  # of KVM's own numbers for PSCI 0.1


class SystemEvent(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT: type, and data[0] where ndata is 1."""

    type: int
    ndata: int = 0
    flags: int = 0


class Hypercall(NamedTuple):
    """KVM_EXIT_HYPERCALL: the function id, KVM_HYPERCALL_EXIT_* flags."""

    nr: int
    flags: int


class Result(NamedTuple):
    """What a call does to the caller. `values` go to X0 and up (() changes nothing); `narrow`: X1 to X3 lose their
    upper halves first; `exit`: leave to userspace; `wait`: wait for an interrupt as WFI does, then go on."""

    values: tuple[int, ...] = ()
    exit: SystemEvent | Hypercall | None = None
    wait: bool = False
    narrow: bool = False

    @classmethod
    def of(cls, *values: int) -> Result:
        """Values for X0 to X3; the missing ones are zero, negative ones in two's complement."""
        if len(values) == 1:
            return cls((values[0] & U64, 0, 0, 0))
        return cls(tuple(value & U64 for value in (*values, 0, 0, 0, 0)[:4]))

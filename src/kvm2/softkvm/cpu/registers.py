"""The system registers that the emulated core itself holds, and fast transfers of many of them.

`NATIVE[model]` lists what `Core.load` and `Core.save` move: every register of KVM's arm64 table (arch/arm64/kvm/
sys_regs.c) that the guest reads and writes in the core without a trap. Registers that the core traps to EL2 (ID
registers, CSSELR, ACTLR, PMU, physical timer, debug registers), that it treats as constant (AMAIR, AFSR) or does not
have live in `CpuState.sys` alone. A test proves each entry by a round trip through guest code.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p
from typing import TYPE_CHECKING, Final

from kvm2.softkvm.cpu import engine as uc

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def enc(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The encoding used everywhere: the low 16 bits of KVM's register id.

    >>> hex(enc(3, 0, 1, 0, 0))
    '0xc080'
    """
    return op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


MDSCR_EL1 = enc(2, 0, 0, 2, 2)
SCTLR_EL1 = enc(3, 0, 1, 0, 0)
CPACR_EL1 = enc(3, 0, 1, 0, 2)
ZCR_EL1 = enc(3, 0, 1, 2, 0)
TTBR0_EL1, TTBR1_EL1, TCR_EL1 = (enc(3, 0, 2, 0, op2) for op2 in range(3))
APIAKEYLO_EL1 = enc(3, 0, 2, 1, 0)
AFSR0_EL1, AFSR1_EL1 = enc(3, 0, 5, 1, 0), enc(3, 0, 5, 1, 1)
ESR_EL1 = enc(3, 0, 5, 2, 0)
FAR_EL1 = enc(3, 0, 6, 0, 0)
PAR_EL1 = enc(3, 0, 7, 4, 0)
MAIR_EL1 = enc(3, 0, 10, 2, 0)
AMAIR_EL1 = enc(3, 0, 10, 3, 0)
VBAR_EL1 = enc(3, 0, 12, 0, 0)
CONTEXTIDR_EL1 = enc(3, 0, 13, 0, 1)
TPIDR_EL1 = enc(3, 0, 13, 0, 4)
CNTKCTL_EL1 = enc(3, 0, 14, 1, 0)
TPIDR_EL0, TPIDRRO_EL0 = enc(3, 3, 13, 0, 2), enc(3, 3, 13, 0, 3)
CNTFRQ_EL0, CNTPCT_EL0 = enc(3, 3, 14, 0, 0), enc(3, 3, 14, 0, 1)
CNTV_TVAL_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0 = (enc(3, 3, 14, 3, op2) for op2 in range(3))

SPSR_EL1, SPSR_IRQ, SPSR_ABT, SPSR_UND, SPSR_FIQ = enc(3, 0, 4, 0, 0), *(enc(3, 4, 4, 3, op2) for op2 in range(4))
HCR_EL2, MDCR_EL2, CPTR_EL2 = (enc(3, 4, 1, 1, op2) for op2 in range(3))
ZCR_EL2, ZCR_EL3 = enc(3, 4, 1, 2, 0), enc(3, 6, 1, 2, 0)
VTTBR_EL2, VTCR_EL2 = enc(3, 4, 2, 1, 0), enc(3, 4, 2, 1, 2)
HPFAR_EL2 = enc(3, 4, 6, 0, 4)
VPIDR_EL2, VMPIDR_EL2 = enc(3, 4, 0, 0, 0), enc(3, 4, 0, 0, 5)
CNTVOFF_EL2, CNTHCTL_EL2 = enc(3, 4, 14, 0, 3), enc(3, 4, 14, 1, 0)
SCR_EL3, CPTR_EL3 = enc(3, 6, 1, 1, 0), enc(3, 6, 1, 1, 2)
ID_AA64MMFR0_EL1 = enc(3, 0, 0, 7, 0)

_V8_0 = (
    SCTLR_EL1,
    CPACR_EL1,
    TTBR0_EL1,
    TTBR1_EL1,
    TCR_EL1,
    AFSR0_EL1,
    AFSR1_EL1,
    ESR_EL1,
    FAR_EL1,
    PAR_EL1,
    MAIR_EL1,
    AMAIR_EL1,
    VBAR_EL1,
    CONTEXTIDR_EL1,
    TPIDR_EL1,
    CNTKCTL_EL1,
    TPIDR_EL0,
    TPIDRRO_EL0,
)
_KEYS = tuple(enc(3, 0, 2, crm, op2) for crm, count in ((1, 4), (2, 4), (3, 2)) for op2 in range(count))

NATIVE: Final[dict[str, frozenset[int]]] = {
    "a72": frozenset(_V8_0),
    "max": frozenset((*_V8_0, ZCR_EL1, *_KEYS)),
}


# Constants in the emulator, plain registers on hardware: each gets an unused field of the emulator's register file.
STORED: Final = (AFSR0_EL1, AFSR1_EL1, AMAIR_EL1)


class Batch:
    """Many registers of one instance, read or written by one call.

    `plain` are Unicorn register numbers (64 bit or less), `system` are encodings; values come in that order.
    """

    def __init__(self, handle: c_void_p, plain: Sequence[int], system: Iterable[int]) -> None:
        system = tuple(system)
        self.system = system
        self._handle = handle
        self._count = len(plain) + len(system)
        self._cells = (ctypes.c_uint64 * len(plain))()
        self._requests = (uc.CpReg * len(system))(*(uc.CpReg.of(number) for number in system))
        self._numbers = (c_int * self._count)(*plain, *[uc.REG_CP] * len(system))
        step = ctypes.sizeof(uc.CpReg)
        cells, requests = ctypes.addressof(self._cells), ctypes.addressof(self._requests)
        pointers = [cells + 8 * at for at in range(len(plain))] + [requests + step * at for at in range(len(system))]
        self._pointers = (c_void_p * self._count)(*pointers)
        # The values of the system registers, seen as every third word of the requests (5 x 4 bytes, padding, 8 bytes).
        self._words = (ctypes.c_uint64 * (len(system) * step // 8)).from_buffer(self._requests)
        self._step = step // 8
        self._lib = uc.engine().FAST

    def read(self) -> list[int]:
        """Every value."""
        self._lib.uc_reg_read_batch(self._handle, self._numbers, self._pointers, self._count)
        return self._cells[:] + self._words[self._step - 1 :: self._step]

    def write(self, values: Sequence[int]) -> None:
        """Every value, in order."""
        plain = len(self._cells)
        self._cells[:] = list(values[:plain])
        for at, value in enumerate(values[plain:]):
            self._words[at * self._step + self._step - 1] = value
        self._lib.uc_reg_write_batch(self._handle, self._numbers, self._pointers, self._count)

"""A64 instructions of the measured guests, as words (Arm ARM, C4), and guests made of them."""

from __future__ import annotations

import struct

LOAD_ADDRESS = 0x4000_0000
PSCI_VERSION, PSCI_SYSTEM_OFF = 0x8400_0000, 0x8400_0008
MMIO_ADDRESS = 0x0900_0000

HVC = 0xD400_0002


def movz(register: int, value: int, shift: int = 0) -> int:
    """MOVZ Xd, #value, LSL #shift."""
    return 0xD280_0000 | shift // 16 << 21 | value << 5 | register


def movk(register: int, value: int, shift: int) -> int:
    """MOVK Xd, #value, LSL #shift."""
    return 0xF280_0000 | shift // 16 << 21 | value << 5 | register


def mov(register: int, value: int) -> list[int]:
    """A 32-bit constant."""
    return [movz(register, value & 0xFFFF), movk(register, value >> 16, 16)]


def subs_one(register: int) -> int:
    """SUBS Xd, Xd, #1."""
    return 0xF100_0400 | register << 5 | register


def add_one(register: int) -> int:
    """ADD Xd, Xd, #1."""
    return 0x9100_0400 | register << 5 | register


def branch(words: int) -> int:
    """B, `words` instructions on."""
    return 0x1400_0000 | words & 0x3FF_FFFF


def branch_not_equal(words: int) -> int:
    """B.NE, `words` instructions on."""
    return 0x5400_0001 | (words & 0x7_FFFF) << 5


def code(*parts: int | list[int]) -> bytes:
    """Machine code."""
    words = [word for part in parts for word in (part if isinstance(part, list) else [part])]
    return struct.pack(f"<{len(words)}I", *words)


OFF = [*mov(0, PSCI_SYSTEM_OFF), HVC]
EOR_X3_X3_X1 = 0xCA01_0063
LDR_X4_X1_POST8, STR_X4_X2_POST8 = 0xF840_8424, 0xF800_8444
STR_W1_X0 = 0xB900_0001

# Stores to a device for ever: each store is an exit.
MMIO_LOOP = code(mov(0, MMIO_ADDRESS), STR_W1_X0, branch(-1))
# X19 times PSCI_VERSION, then off.
PSCI_LOOP = code(mov(0, PSCI_VERSION), HVC, subs_one(19), branch_not_equal(-4), OFF)
# X19 times four instructions without memory.
ALU_LOOP = code(add_one(1), EOR_X3_X3_X1, subs_one(19), branch_not_equal(-3))
# X19 times 64 KiB, 8 bytes each. The emulator's TLB is direct-mapped with as few as 64 entries: source, destination and
# code lie so that no two of them share an entry, which would measure nothing but their fight for it.
COPY_WORDS = 8192
SOURCE, DESTINATION = LOAD_ADDRESS + 0x11_0000, LOAD_ADDRESS + 0x23_0000
COPY_LOOP = code(
    mov(1, SOURCE),
    mov(2, DESTINATION),
    mov(20, COPY_WORDS),
    LDR_X4_X1_POST8,
    STR_X4_X2_POST8,
    subs_one(20),
    branch_not_equal(-3),
    subs_one(19),
    branch_not_equal(-11),
)

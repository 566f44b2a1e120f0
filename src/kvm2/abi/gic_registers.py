"""The memory-mapped registers of GICv2 and GICv3, frame by frame, as far as KVM's virtual one has them.

Offsets and names are those of Arm IHI 0048 (GICv2) and IHI 0069 (GICv3); which widths an access may have, and which
registers there are, is from the tables in `vgic-mmio-v2.c` and `vgic-mmio-v3.c` of arch/arm64/kvm/vgic. Whatever is not
here reads as zero and ignores writes, and userspace gets ENXIO for it.

>>> GICD_V3.at(0x6108).name, GICD_V3.at(0x6108).intid(0x6108)
('GICD_IROUTER', 33)
>>> GICD_V3.at(0x10000) is None, GICR.at(0x1_0080).name
(True, 'GICR_IGROUPR0')
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Final, NamedTuple

INTIDS: Final = 1024  # that registers with some bits for each interrupt have room for
PRIVATE: Final = 32  # of them, SGIs and PPIs
SIZE_4K, SIZE_64K = 4 << 10, 64 << 10

# Widths of accesses, in bytes.
WORD: Final = frozenset({4})
BYTE_OR_WORD: Final = frozenset({1, 4})
WORD_OR_DOUBLE: Final = frozenset({4, 8})


class Register(NamedTuple):
    """One register, or a row of them: `length` bytes from `offset` in its frame.

    `widths` are the accesses that it takes, in bytes, each aligned; `bits` of it belong to each interrupt (0: none do);
    `first` is the interrupt at its start.
    """

    name: str
    offset: int
    length: int
    widths: frozenset[int] = WORD
    bits: int = 0
    first: int = 0

    def intid(self, offset: int) -> int:
        """The interrupt whose bits are at `offset` of the frame; only where `bits` is not 0."""
        return self.first + (offset - self.offset) * 8 // self.bits


class Frame:
    """The registers of one frame, by offset."""

    def __init__(self, name: str, size: int, registers: tuple[Register, ...]) -> None:
        self.name, self.size, self.registers = name, size, registers

    def __iter__(self) -> Iterator[Register]:
        return iter(self.registers)

    @cached_property
    def words(self) -> dict[int, Register]:
        """The register of each aligned 32-bit word that has one, by offset / 4."""
        return {
            word: register
            for register in self.registers
            for word in range(register.offset // 4, (register.offset + register.length) // 4)
        }

    def at(self, offset: int) -> Register | None:
        """The register that the byte at `offset` belongs to."""
        return self.words.get(offset >> 2)


def _row(name: str, offset: int, bits: int, widths: frozenset[int] = WORD) -> Register:
    """Registers with some bits for each of the 1024 interrupts."""
    return Register(name, offset, INTIDS * bits // 8, widths, bits)


def _private(name: str, offset: int, bits: int, widths: frozenset[int] = WORD) -> Register:
    """Registers of the SGI frame, with some bits for each SGI and PPI."""
    return Register(name, SIZE_64K + offset, PRIVATE * bits // 8, widths, bits)


# What both distributors have in common.
_DISTRIBUTOR: Final = (
    _row("GICD_IGROUPR", 0x080, 1),
    _row("GICD_ISENABLER", 0x100, 1),
    _row("GICD_ICENABLER", 0x180, 1),
    _row("GICD_ISPENDR", 0x200, 1),
    _row("GICD_ICPENDR", 0x280, 1),
    _row("GICD_ISACTIVER", 0x300, 1),
    _row("GICD_ICACTIVER", 0x380, 1),
    _row("GICD_IPRIORITYR", 0x400, 8, BYTE_OR_WORD),
    _row("GICD_ITARGETSR", 0x800, 8, BYTE_OR_WORD),
    _row("GICD_ICFGR", 0xC00, 2),
)

GICD_V3: Final = Frame(
    "GICD",
    SIZE_64K,
    (
        Register("GICD_CTLR", 0x000, 4),
        Register("GICD_TYPER", 0x004, 4),
        Register("GICD_IIDR", 0x008, 4),
        Register("GICD_TYPER2", 0x00C, 4),
        Register("GICD_STATUSR", 0x010, 4),
        *_DISTRIBUTOR,
        _row("GICD_IGRPMODR", 0xD00, 1),
        _row("GICD_IROUTER", 0x6000, 64, WORD_OR_DOUBLE),
        Register("GICD_IDREGS", 0xFFD0, 48),
    ),
)

GICR: Final = Frame(
    "GICR",
    2 * SIZE_64K,
    (
        Register("GICR_CTLR", 0x000, 4),
        Register("GICR_IIDR", 0x004, 4),
        Register("GICR_TYPER", 0x008, 8, WORD_OR_DOUBLE),
        # GICR_STATUSR stands in the kernel's table out of its order, so that the search never finds it.
        Register("GICR_WAKER", 0x014, 4),
        Register("GICR_PROPBASER", 0x070, 8, WORD_OR_DOUBLE),
        Register("GICR_PENDBASER", 0x078, 8, WORD_OR_DOUBLE),
        Register("GICR_INVLPIR", 0x0A0, 8, WORD_OR_DOUBLE),
        Register("GICR_INVALLR", 0x0B0, 8, WORD_OR_DOUBLE),
        Register("GICR_SYNCR", 0x0C0, 4),
        Register("GICR_IDREGS", 0xFFD0, 48),
        # The SGI frame.
        _private("GICR_IGROUPR0", 0x080, 1),
        _private("GICR_ISENABLER0", 0x100, 1),
        _private("GICR_ICENABLER0", 0x180, 1),
        _private("GICR_ISPENDR0", 0x200, 1),
        _private("GICR_ICPENDR0", 0x280, 1),
        _private("GICR_ISACTIVER0", 0x300, 1),
        _private("GICR_ICACTIVER0", 0x380, 1),
        _private("GICR_IPRIORITYR", 0x400, 8, BYTE_OR_WORD),
        _private("GICR_ICFGR", 0xC00, 2),
        _private("GICR_IGRPMODR0", 0xD00, 1),
        Register("GICR_NSACR", SIZE_64K + 0xE00, 4),
    ),
)

GICD_V2: Final = Frame(
    "GICD",
    SIZE_4K,
    (
        Register("GICD_CTLR", 0x000, 4),
        Register("GICD_TYPER", 0x004, 4),
        Register("GICD_IIDR", 0x008, 4),
        *_DISTRIBUTOR,
        Register("GICD_SGIR", 0xF00, 4),
        Register("GICD_CPENDSGIR", 0xF10, 16, BYTE_OR_WORD, 8),
        Register("GICD_SPENDSGIR", 0xF20, 16, BYTE_OR_WORD, 8),
    ),
)

# The CPU interface of a GICv2 as a guest sees it: the hardware's GICV frame under the names of GICC.
GICC: Final = Frame(
    "GICC",
    2 * SIZE_4K,
    (
        Register("GICC_CTLR", 0x0000, 4),
        Register("GICC_PMR", 0x0004, 4),
        Register("GICC_BPR", 0x0008, 4),
        Register("GICC_IAR", 0x000C, 4),
        Register("GICC_EOIR", 0x0010, 4),
        Register("GICC_RPR", 0x0014, 4),
        Register("GICC_HPPIR", 0x0018, 4),
        Register("GICC_ABPR", 0x001C, 4),
        Register("GICC_AIAR", 0x0020, 4),
        Register("GICC_AEOIR", 0x0024, 4),
        Register("GICC_AHPPIR", 0x0028, 4),
        Register("GICC_APR", 0x00D0, 16),
        Register("GICC_IIDR", 0x00FC, 4),
        Register("GICC_DIR", 0x1000, 4),
    ),
)

# What of it KVM_DEV_ARM_VGIC_GRP_CPU_REGS shows (`vgic_v2_cpu_registers`).
GICC_USER: Final = Frame(
    "GICC of userspace",
    2 * SIZE_4K,
    tuple(
        register
        for register in GICC
        if register.name in ("GICC_CTLR", "GICC_PMR", "GICC_BPR", "GICC_ABPR", "GICC_APR", "GICC_IIDR")
    ),
)

FRAMES: Final = (GICD_V3, GICR, GICD_V2, GICC)

# ---- fields

KVM_PRODUCT_ID, ARM_IMPLEMENTER = 0x4B, 0x43B  # of the IIDR registers: 'K', JEP106 of Arm
IIDR_PRODUCT_SHIFT, IIDR_REVISION_SHIFT, IIDR_REVISION_MASK = 24, 12, 0xF000

GICD_CTLR_ENABLE_GRP1, GICD_CTLR_ARE, GICD_CTLR_DS, GICD_CTLR_NASSGIREQ = 1 << 1, 1 << 4, 1 << 6, 1 << 8
GICD_CTLR_V2_ENABLE: Final = 1 << 0
GICD_TYPER_CPUS_SHIFT, GICD_TYPER_LPIS, GICD_TYPER_IDBITS_SHIFT = 5, 1 << 17, 19
ID_BITS_SPIS, ID_BITS_LPIS = 10, 16  # of interrupt numbers, without and with an ITS
PIDR2_OFFSET, PIDR2_GICV3 = 0xFFE8, 0x3B
IROUTER_AFFINITY: Final = 0xFFFFFF  # Aff2, Aff1, Aff0
ICFGR_EDGE: Final = 2

GICR_CTLR_ENABLE_LPIS, GICR_CTLR_CES, GICR_CTLR_IR = 1 << 0, 1 << 1, 1 << 2
GICR_TYPER_PLPIS, GICR_TYPER_LAST = 1 << 0, 1 << 4
GICR_TYPER_NUMBER_SHIFT, GICR_TYPER_AFFINITY_SHIFT = 8, 32

GICD_SGIR_TARGETS_SHIFT, GICD_SGIR_FILTER_SHIFT = 16, 24
SGIR_TO_TARGETS, SGIR_TO_OTHERS, SGIR_TO_SELF = 0, 1, 2

# GICC_CTLR as a guest with both groups sees it (GICV_CTLR).
GICC_CTLR_GRP0, GICC_CTLR_GRP1, GICC_CTLR_ACKCTL = 1 << 0, 1 << 1, 1 << 2
GICC_CTLR_FIQEN, GICC_CTLR_CBPR, GICC_CTLR_EOIMODE = 1 << 3, 1 << 4, 1 << 9
GICC_SOURCE_SHIFT: Final = 10  # of the sender in IAR, EOIR, DIR and HPPIR
GICC_INTID_MASK: Final = 0x3FF
GICC_IIDR_PRODUCT_SHIFT, GICC_IIDR_ARCH_SHIFT, GICC_ARCH_V2 = 20, 16, 2

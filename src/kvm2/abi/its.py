"""The interrupt translation service and LPIs: registers, commands, and the tables in guest memory.

Names and layouts are those of Arm IHI 0069 (GICv3), chapters 5 and 12; the tables are KVM's own
(Documentation/virt/kvm/devices/arm-vgic-its.rst, "ITS Table ABI REV0"). Everything is little endian.

>>> hex(BASER_TYPE.put(0, TYPE_DEVICE)), GITS.at(GITS_BASER + 8).name, GITS.at(0x200)
('0x100000000000000', 'GITS_BASER', None)
>>> COMMANDS[MAPTI], DTE_NEXT.get(0x8002000000000000)
('MAPTI', 1)
"""

from __future__ import annotations

from typing import Final

from kvm2.abi.gic_registers import SIZE_64K, WORD_OR_DOUBLE, Frame, Register

# ---- fields


class Bits:
    """A field of a register, a command word or a table entry: bits `high` to `low`.

    `limit` is how many values it has, `mask` its bits where they lie.
    """

    __slots__ = ("limit", "low", "mask", "most")

    def __init__(self, high: int, low: int) -> None:
        self.low, self.limit = low, 1 << high - low + 1
        self.most = self.limit - 1
        self.mask = self.most << low

    def get(self, word: int) -> int:
        """The field's value."""
        return word >> self.low & self.most

    def put(self, word: int, value: int) -> int:
        """The word with the field changed; ValueError where the value does not fit."""
        if not 0 <= value < self.limit:
            raise ValueError(f"{value:#x} does not fit: {self.limit:#x} values from bit {self.low}")
        return word & ~self.mask | value << self.low


# ---- registers of the control frame


FRAME_ALIGN: Final = SIZE_64K
GITS_CTLR: Final = 0x0000
GITS_IIDR: Final = 0x0004
GITS_TYPER: Final = 0x0008
GITS_CBASER: Final = 0x0080
GITS_CWRITER: Final = 0x0088
GITS_CREADR: Final = 0x0090
GITS_BASER: Final = 0x0100
GITS_IDREGS: Final = 0xFFD0
GITS_TRANSLATER: Final = 0x10040  # devices write here; an access of a vCPU does nothing

GITS: Final = Frame(
    "GITS",
    2 * SIZE_64K,  # the control frame and the translation frame
    (
        Register("GITS_CTLR", GITS_CTLR, 4),
        Register("GITS_IIDR", GITS_IIDR, 4),
        Register("GITS_TYPER", GITS_TYPER, 8, WORD_OR_DOUBLE),
        Register("GITS_CBASER", GITS_CBASER, 8, WORD_OR_DOUBLE),
        Register("GITS_CWRITER", GITS_CWRITER, 8, WORD_OR_DOUBLE),
        Register("GITS_CREADR", GITS_CREADR, 8, WORD_OR_DOUBLE),
        Register("GITS_BASER", GITS_BASER, 8 * 8, WORD_OR_DOUBLE),
        Register("GITS_IDREGS", GITS_IDREGS, 48),
    ),
)

CTLR_ENABLED: Final = 1 << 0
CTLR_QUIESCENT: Final = 1 << 31

IIDR_REVISION: Final = Bits(15, 12)
IIDR_ARM: Final = 0x43B
IIDR_PRODUCT: Final = Bits(31, 24)
PRODUCT_KVM: Final = 0x4B

TYPER_PHYSICAL: Final = 1 << 0
TYPER_ITT_ENTRY_SIZE: Final = Bits(7, 4)  # bytes - 1
TYPER_ID_BITS: Final = Bits(12, 8)  # - 1
TYPER_DEVBITS: Final = Bits(17, 13)  # - 1

ID_REGISTERS: Final = {
    0xFFD0: 0x40,  # GITS_PIDR4: a 64K page that software sees
    0xFFE0: 0x92,  # GITS_PIDR0 and 1: the part
    0xFFE4: 0xB4,
    0xFFE8: 0x3B,  # GITS_PIDR2: GICv3
    0xFFF0: 0x0D,  # GITS_CIDR0 to 3: of every GIC
    0xFFF4: 0xF0,
    0xFFF8: 0x05,
    0xFFFC: 0xB1,
}

VALID: Final = 1 << 63  # GITS_CBASER, GITS_BASER<n>, and the entries of tables that have it
BASER_INDIRECT: Final = 1 << 62
BASER_TYPE: Final = Bits(58, 56)
BASER_ENTRY_SIZE: Final = Bits(52, 48)  # - 1
BASER_ADDRESS: Final = Bits(47, 16)
BASER_ADDRESS_HIGH: Final = Bits(15, 12)  # bits 51:48 of the address, as the pages are 64K
BASER_SHAREABILITY: Final = Bits(11, 10)  # in GITS_CBASER and GICR_PROPBASER, GICR_PENDBASER as well
BASER_PAGE_SIZE: Final = Bits(9, 8)
BASER_PAGES: Final = Bits(7, 0)  # - 1, in GITS_CBASER too
ITS_INNER: Final = Bits(61, 59)  # cacheability in GITS_CBASER and GITS_BASER<n>
ITS_OUTER: Final = Bits(55, 53)
CBASER_ADDRESS: Final = Bits(51, 12)
CBASER_RES0: Final = Bits(15, 12)  # the queue is aligned to 64K
COMMAND_OFFSET: Final = Bits(19, 5)  # in GITS_CREADR and GITS_CWRITER

TYPE_DEVICE: Final = 1
TYPE_COLLECTION: Final = 4
PAGE_64K: Final = 2
INNER_SHAREABLE: Final = 1
OUTER_SHAREABLE: Final = 2
NON_CACHEABLE: Final = (0, 1)  # of an inner cacheability: device memory, normal non-cacheable
SAME_AS_INNER: Final = 0  # of an outer cacheability
OUTER_ALLOWED: Final = (SAME_AS_INNER, 1)  # KVM knows this one and non-cacheable
READ_WRITE_BACK: Final = 3

# ---- registers of a redistributor that are about LPIs

PROPBASER_ID_BITS: Final = Bits(4, 0)  # - 1
PROPBASER_ADDRESS: Final = Bits(51, 12)
PENDBASER_ADDRESS: Final = Bits(51, 16)
PENDBASER_PTZ: Final = 1 << 62  # the table is all zeros
LPI_INNER: Final = Bits(9, 7)  # cacheability in GICR_PROPBASER and GICR_PENDBASER
LPI_OUTER: Final = Bits(58, 56)
PROPBASER_RES0: Final = Bits(63, 59).mask | Bits(55, 52).mask | Bits(6, 5).mask
PENDBASER_RES0: Final = 1 << 63 | Bits(61, 59).mask | Bits(55, 52).mask | Bits(15, 12).mask | Bits(6, 0).mask

LPI_ENABLED: Final = 1 << 0  # of a byte of the configuration table
LPI_PRIORITY: Final = Bits(7, 2)

# ---- commands: four words of 64 bits

COMMAND_SIZE: Final = 32
MOVI, INT, CLEAR, SYNC = 0x01, 0x03, 0x04, 0x05
MAPD, MAPC, MAPTI, MAPI, INV, INVALL, MOVALL, DISCARD = range(0x08, 0x10)
COMMANDS: Final = {
    MOVI: "MOVI",
    INT: "INT",
    CLEAR: "CLEAR",
    SYNC: "SYNC",
    MAPD: "MAPD",
    MAPC: "MAPC",
    MAPTI: "MAPTI",
    MAPI: "MAPI",
    INV: "INV",
    INVALL: "INVALL",
    MOVALL: "MOVALL",
    DISCARD: "DISCARD",
}
OPCODE: Final = Bits(7, 0)  # of word 0
DEVICE_ID: Final = Bits(63, 32)
EVENT_ID: Final = Bits(31, 0)  # of word 1
ITT_SIZE: Final = Bits(4, 0)  # - 1, in bits of the event id
PHYSICAL_ID: Final = Bits(63, 32)
COLLECTION_ID: Final = Bits(15, 0)  # of word 2
ITT_ADDRESS: Final = Bits(51, 8)
TARGET: Final = Bits(47, 16)  # of word 2, for MOVALL's second one of word 3


class Error:
    """What a command ends with that cannot be done; the guest is not told."""

    MOVI_UNMAPPED_INTERRUPT = 0x010107
    MOVI_UNMAPPED_COLLECTION = 0x010109
    INT_UNMAPPED_INTERRUPT = 0x010307
    CLEAR_UNMAPPED_INTERRUPT = 0x010507
    MAPD_DEVICE_OOR = 0x010801
    MAPD_ITTSIZE_OOR = 0x010802
    MAPC_PROCNUM_OOR = 0x010902
    MAPC_COLLECTION_OOR = 0x010903
    MAPTI_UNMAPPED_DEVICE = 0x010A04
    MAPTI_ID_OOR = 0x010A05
    MAPTI_PHYSICALID_OOR = 0x010A06
    INV_UNMAPPED_INTERRUPT = 0x010C07
    INVALL_UNMAPPED_COLLECTION = 0x010D09
    MOVALL_PROCNUM_OOR = 0x010E01
    DISCARD_UNMAPPED_INTERRUPT = 0x010F07


# ---- tables of revision 0

ENTRY_SIZE: Final = 8
L1_ADDRESS: Final = Bits(51, 16)  # of an entry in the first level of an indirect device table
DTE_NEXT: Final = Bits(62, 49)
DTE_ITT_ADDRESS: Final = Bits(48, 5)  # bits 51:8 of the address
DTE_SIZE: Final = Bits(4, 0)  # - 1
CTE_TARGET: Final = Bits(47, 16)
CTE_ID: Final = Bits(15, 0)
ITE_NEXT: Final = Bits(63, 48)
ITE_LPI: Final = Bits(47, 16)
ITE_COLLECTION: Final = Bits(15, 0)

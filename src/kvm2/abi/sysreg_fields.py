"""The fields of arm64 registers: name, lowest bit, width, signedness; and the classes of ESR_ELx.

Names are the Arm ARM's; a field is found in any case. What 6.12's arch/arm64/tools/sysreg does not have (VTCR_EL2,
HCR_EL2, ESR_ELx ...) is from the Arm ARM's register pages.

>>> parange = field("ID_AA64MMFR0_EL1", "PARange")
>>> parange.get(0x1125), hex(parange.set(0x1125, 2)), field("ID_AA64PFR0_EL1", "fp").get(0xF << 16)
(5, '0x1122', -1)
>>> describe("VTTBR_EL2", 0x0003_0000_4000_1001)
{'CnP': 1, 'BADDR': 536872960, 'VMID': 3}
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final, NamedTuple

from kvm2.abi import sysregs


class Field(NamedTuple):
    """One field of a register: bits `lsb + width - 1 : lsb`; a `signed` one counts from -2**(width-1)."""

    name: str
    lsb: int
    width: int
    signed: bool

    @property
    def mask(self) -> int:
        """The field's bits in the register."""
        return (1 << self.width) - 1 << self.lsb

    def get(self, register: int) -> int:
        """The field's value."""
        value = (register & self.mask) >> self.lsb
        return value - (1 << self.width) if self.signed and value >> self.width - 1 else value

    def set(self, register: int, value: int) -> int:
        """The register with the field changed; ValueError where the value does not fit."""
        low = -(1 << self.width - 1) if self.signed else 0
        if not low <= value < low + (1 << self.width):
            raise ValueError(f"{self.name} = {value}: {low} to {low + (1 << self.width) - 1} fit in {self.width} bits")
        return register & ~self.mask | (value << self.lsb & self.mask)


# "name:lsb:width", "s" behind the width of a signed field.
_FIELDS: Final[Mapping[str, str]] = {
    "ID_AA64MMFR0_EL1": (
        "PARange:0:4 ASIDBits:4:4 BigEnd:8:4 SNSMem:12:4 BigEndEL0:16:4 TGran16:20:4 TGran64:24:4s "
        "TGran4:28:4s TGran16_2:32:4 TGran64_2:36:4 TGran4_2:40:4 ExS:44:4 FGT:56:4 ECV:60:4"
    ),
    "ID_AA64MMFR1_EL1": (
        "HAFDBS:0:4 VMIDBits:4:4 VH:8:4 HPDS:12:4 LO:16:4 PAN:20:4 SpecSEI:24:4 XNX:28:4 TWED:32:4 ETS:36:4 "
        "HCX:40:4 AFP:44:4 nTLBPA:48:4 TIDCP1:52:4 CMOW:56:4 ECBHB:60:4"
    ),
    "ID_AA64MMFR2_EL1": (
        "CnP:0:4 UAO:4:4 LSM:8:4 IESB:12:4 VARange:16:4 CCIDX:20:4 NV:24:4 ST:28:4 AT:32:4 IDS:36:4 FWB:40:4 "
        "TTL:48:4 BBM:52:4 EVT:56:4 E0PD:60:4"
    ),
    "ID_AA64MMFR3_EL1": (
        "TCRX:0:4 SCTLRX:4:4 S1PIE:8:4 S2PIE:12:4 S1POE:16:4 S2POE:20:4 AIE:24:4 MEC:28:4 D128:32:4 "
        "D128_2:36:4 SNERR:40:4 ANERR:44:4 SDERR:52:4 ADERR:56:4 Spec_FPACC:60:4"
    ),
    "ID_AA64MMFR4_EL1": "EIESB:4:4 ASID2:8:4 HACDBS:12:4 FGWTE3:16:4 NV_frac:20:4 E2H0:24:4s E3DSE:36:4",
    "ID_AA64PFR0_EL1": (
        "EL0:0:4 EL1:4:4 EL2:8:4 EL3:12:4 FP:16:4s AdvSIMD:20:4s GIC:24:4 RAS:28:4 SVE:32:4 SEL2:36:4 "
        "MPAM:40:4 AMU:44:4 DIT:48:4 RME:52:4 CSV2:56:4 CSV3:60:4"
    ),
    "ID_AA64PFR1_EL1": (
        "BT:0:4 SSBS:4:4 MTE:8:4 RAS_frac:12:4 MPAM_frac:16:4 SME:24:4 RNDR_trap:28:4 CSV2_frac:32:4 NMI:36:4 "
        "MTE_frac:40:4 GCS:44:4 THE:48:4 MTEX:52:4 DF2:56:4 PFAR:60:4"
    ),
    "ID_AA64PFR2_EL1": "MTEPERM:0:4 MTESTOREONLY:4:4 MTEFAR:8:4 FPMR:32:4",
    "ID_AA64ISAR0_EL1": (
        "AES:4:4 SHA1:8:4 SHA2:12:4 CRC32:16:4 Atomic:20:4 TME:24:4 RDM:28:4 SHA3:32:4 SM3:36:4 SM4:40:4 "
        "DP:44:4 FHM:48:4 TS:52:4 TLB:56:4 RNDR:60:4"
    ),
    "ID_AA64ISAR1_EL1": (
        "DPB:0:4 APA:4:4 API:8:4 JSCVT:12:4 FCMA:16:4 LRCPC:20:4 GPA:24:4 GPI:28:4 FRINTTS:32:4 SB:36:4 "
        "SPECRES:40:4 BF16:44:4 DGH:48:4 I8MM:52:4 XS:56:4 LS64:60:4"
    ),
    "ID_AA64ISAR2_EL1": (
        "WFxT:0:4 RPRES:4:4 GPA3:8:4 APA3:12:4 MOPS:16:4 BC:20:4 PAC_frac:24:4 CLRBHB:28:4 SYSREG_128:32:4 "
        "SYSINSTR_128:36:4 PRFMSLC:40:4 RPRFM:48:4 CSSC:52:4 LUT:56:4 ATS1A:60:4"
    ),
    "ID_AA64ISAR3_EL1": "CPA:0:4 FAMINMAX:4:4 TLBIW:8:4 PACM:12:4",
    "ID_AA64DFR0_EL1": (
        "DebugVer:0:4 TraceVer:4:4 PMUVer:8:4 BRPs:12:4 WRPs:20:4 CTX_CMPs:28:4 PMSVer:32:4 DoubleLock:36:4s "
        "TraceFilt:40:4 TraceBuffer:44:4 MTPMU:48:4 BRBE:52:4 ExtTrcBuff:56:4 HPMN0:60:4"
    ),
    "ID_AA64DFR1_EL1": (
        "SYSPMUID:0:8 BRPs:8:8 WRPs:16:8 CTX_CMPs:24:8 SPMU:32:4 PMICNTR:36:4 ABLE:40:4 ITE:44:4 EBEP:48:4 "
        "DPFZS:52:4 ABL_CMPs:56:8"
    ),
    "ID_AA64ZFR0_EL1": (
        "SVEver:0:4 AES:4:4 BitPerm:16:4 BF16:20:4 B16B16:24:4 SHA3:32:4 SM4:40:4 I8MM:44:4 F32MM:52:4 F64MM:56:4"
    ),
    "ID_AA64SMFR0_EL1": (
        "SF8DP2:28:1 SF8DP4:29:1 SF8FMA:30:1 F32F32:32:1 BI32I32:33:1 B16F32:34:1 F16F32:35:1 I8I32:36:4 "
        "F8F32:40:1 F8F16:41:1 F16F16:42:1 B16B16:43:1 I16I32:44:4 F64F64:48:1 I16I64:52:4 SMEver:56:4 "
        "LUTv2:60:1 FA64:63:1"
    ),
    "ID_AA64FPFR0_EL1": "F8E5M2:0:1 F8E4M3:1:1 F8DP2:28:1 F8DP4:29:1 F8FMA:30:1 F8CVT:31:1",
    "ID_PFR0_EL1": "State0:0:4 State1:4:4 State2:8:4 State3:12:4 CSV2:16:4 AMU:20:4 DIT:24:4 RAS:28:4",
    "ID_PFR1_EL1": (
        "ProgMod:0:4 Security:4:4 MProgMod:8:4 Virtualization:12:4 GenTimer:16:4 Sec_frac:20:4 Virt_frac:24:4 GIC:28:4"
    ),
    "ID_DFR0_EL1": (
        "CopDbg:0:4 CopSDbg:4:4 MMapDbg:8:4 CopTrc:12:4 MMapTrc:16:4 MProfDbg:20:4 PerfMon:24:4 TraceFilt:28:4"
    ),
    "ID_MMFR0_EL1": "VMSA:0:4 PMSA:4:4 OuterShr:8:4s ShareLvl:12:4 TCM:16:4 AuxReg:20:4 FCSE:24:4 InnerShr:28:4s",
    "ID_MMFR1_EL1": ("L1HvdVA:0:4 L1UniVA:4:4 L1HvdSW:8:4 L1UniSW:12:4 L1Hvd:16:4 L1Uni:20:4 L1TstCln:24:4 BPred:28:4"),
    "ID_MMFR2_EL1": (
        "L1HvdFG:0:4 L1HvdBG:4:4 L1HvdRng:8:4 HvdTLB:12:4 UniTLB:16:4 MemBarr:20:4 WFIStall:24:4 HWAccFlg:28:4"
    ),
    "ID_MMFR3_EL1": (
        "CMaintVA:0:4 CMaintSW:4:4 BPMaint:8:4 MaintBcst:12:4 PAN:16:4 CohWalk:20:4 CMemSz:24:4 Supersec:28:4"
    ),
    "ID_MMFR4_EL1": "SpecSEI:0:4 AC2:4:4 XNX:8:4 CnP:12:4 HPDS:16:4 LSM:20:4 CCIDX:24:4 EVT:28:4",
    "ID_ISAR0_EL1": "Swap:0:4 BitCount:4:4 BitField:8:4 CmpBranch:12:4 Coproc:16:4 Debug:20:4 Divide:24:4",
    "ID_ISAR5_EL1": "SEVL:0:4 AES:4:4 SHA1:8:4 SHA2:12:4 CRC32:16:4 RDM:24:4 VCMA:28:4",
    "ID_ISAR6_EL1": "JSCVT:0:4 DP:4:4 FHM:8:4 SB:12:4 SPECRES:16:4 BF16:20:4 I8MM:24:4",
    "MVFR0_EL1": "SIMDReg:0:4 FPSP:4:4 FPDP:8:4 FPTrap:12:4 FPDivide:16:4 FPSqrt:20:4 FPShVec:24:4 FPRound:28:4",
    "MVFR1_EL1": "FPFtZ:0:4 FPDNaN:4:4 SIMDLS:8:4 SIMDInt:12:4 SIMDSP:16:4 SIMDHP:20:4 FPHP:24:4 SIMDFMAC:28:4",
    "MVFR2_EL1": "SIMDMisc:0:4 FPMisc:4:4",
    "ID_PFR2_EL1": "CSV3:0:4 SSBS:4:4 RAS_frac:8:4",
    "CTR_EL0": "IminLine:0:4 L1Ip:14:2 DminLine:16:4 ERG:20:4 CWG:24:4 IDC:28:1 DIC:29:1 TminLine:32:6",
    "DCZID_EL0": "BS:0:4 DZP:4:1",
    "CLIDR_EL1": (
        "Ctype1:0:3 Ctype2:3:3 Ctype3:6:3 Ctype4:9:3 Ctype5:12:3 Ctype6:15:3 Ctype7:18:3 LoUIS:21:3 LoC:24:3 "
        "LoUU:27:3 ICB:30:3 Ttypen:33:14"
    ),
    "CCSIDR_EL1": "LineSize:0:3 Associativity:3:10 NumSets:13:15",
    "CSSELR_EL1": "InD:0:1 Level:1:3 TnD:4:1",
    "SCTLR_EL1": (
        "M:0:1 A:1:1 C:2:1 SA:3:1 SA0:4:1 CP15BEN:5:1 nAA:6:1 ITD:7:1 SED:8:1 UMA:9:1 EnRCTX:10:1 EOS:11:1 "
        "I:12:1 EnDB:13:1 DZE:14:1 UCT:15:1 nTWI:16:1 nTWE:18:1 WXN:19:1 TSCXT:20:1 IESB:21:1 EIS:22:1 "
        "SPAN:23:1 E0E:24:1 EE:25:1 UCI:26:1 EnDA:27:1 nTLSMD:28:1 LSMAOE:29:1 EnIB:30:1 EnIA:31:1 CMOW:32:1 "
        "MSCEn:33:1 EnFPM:34:1 BT0:35:1 BT1:36:1 ITFSB:37:1 TCF0:38:2 TCF:40:2 ATA0:42:1 ATA:43:1 DSSBS:44:1 "
        "TWEDEn:45:1 TWEDEL:46:4 TMT0:50:1 TMT:51:1 TME0:52:1 TME:53:1 EnASR:54:1 EnAS0:55:1 EnALS:56:1 "
        "EPAN:57:1 TCSO0:58:1 TCSO:59:1 EnTP2:60:1 NMI:61:1 SPINTMASK:62:1 TIDCP:63:1"
    ),
    "CPACR_EL1": "ZEN:16:2 FPEN:20:2 SMEN:24:2 TTA:28:1 E0POE:29:1",
    "ZCR_EL1": "LEN:0:4",
    "TCR2_EL1": ("PnCH:0:1 PIE:1:1 E0POE:2:1 POE:3:1 AIE:4:1 D128:5:1 PTTWI:10:1 HAFT:11:1 DisCH0:14:1 DisCH1:15:1"),
    "MDSCR_EL1": (
        "SS:0:1 ERR:6:1 TDCC:12:1 KDE:13:1 HDE:14:1 MDE:15:1 SC2:19:1 TDA:21:1 INTdis:22:2 TXU:26:1 RXO:27:1 "
        "TXfull:29:1 RXfull:30:1 TFO:31:1 EMBWE:32:1 TTA:33:1 EnSPM:34:1 EHBWE:35:1"
    ),
    "HCR_EL2": (
        "VM:0:1 SWIO:1:1 PTW:2:1 FMO:3:1 IMO:4:1 AMO:5:1 VF:6:1 VI:7:1 VSE:8:1 FB:9:1 BSU:10:2 DC:12:1 "
        "TWI:13:1 TWE:14:1 TID0:15:1 TID1:16:1 TID2:17:1 TID3:18:1 TSC:19:1 TIDCP:20:1 TACR:21:1 TSW:22:1 "
        "TPC:23:1 TPU:24:1 TTLB:25:1 TVM:26:1 TGE:27:1 TDZ:28:1 HCD:29:1 TRVM:30:1 RW:31:1 CD:32:1 ID:33:1 "
        "E2H:34:1 TLOR:35:1 TERR:36:1 TEA:37:1 MIOCNCE:38:1 APK:40:1 API:41:1 NV:42:1 NV1:43:1 AT:44:1 "
        "NV2:45:1 FWB:46:1 FIEN:47:1 TID4:49:1 TICAB:50:1 AMVOFFEN:51:1 TOCU:52:1 EnSCXT:53:1 TTLBIS:54:1 "
        "TTLBOS:55:1 ATA:56:1 DCT:57:1 TID5:58:1 TWEDEn:59:1 TWEDEL:60:4"
    ),
    "VTCR_EL2": (
        "T0SZ:0:6 SL0:6:2 IRGN0:8:2 ORGN0:10:2 SH0:12:2 TG0:14:2 PS:16:3 VS:19:1 HA:21:1 HD:22:1 HWU59:25:1 "
        "HWU60:26:1 HWU61:27:1 HWU62:28:1 NSW:29:1 NSA:30:1 RES1:31:1 DS:32:1 SL2:33:1"
    ),
    "VTTBR_EL2": "CnP:0:1 BADDR:1:47 VMID:48:16",
    "MPIDR_EL1": "Aff0:0:8 Aff1:8:8 Aff2:16:8 MT:24:1 U:30:1 RES1:31:1 Aff3:32:8",
    "MIDR_EL1": "Revision:0:4 PartNum:4:12 Architecture:16:4 Variant:20:4 Implementer:24:8",
    "ESR_EL1": "ISS:0:25 IL:25:1 EC:26:6 ISS2:32:24",
    "ESR_EL2": "ISS:0:25 IL:25:1 EC:26:6 ISS2:32:24",
    "HPFAR_EL2": "FIPA:4:44 NS:63:1",
    "TCR_EL1": (
        "T0SZ:0:6 EPD0:7:1 IRGN0:8:2 ORGN0:10:2 SH0:12:2 TG0:14:2 T1SZ:16:6 A1:22:1 EPD1:23:1 IRGN1:24:2 "
        "ORGN1:26:2 SH1:28:2 TG1:30:2 IPS:32:3 AS:36:1 TBI0:37:1 TBI1:38:1 HA:39:1 HD:40:1 HPD0:41:1 "
        "HPD1:42:1 E0PD0:55:1 E0PD1:56:1 DS:59:1"
    ),
    "CPTR_EL2": "TZ:8:1 TFP:10:1 TSM:12:1 TTA:20:1 TAM:30:1 TCPAC:31:1",
    "MDCR_EL2": (
        "HPMN:0:5 TPMCR:5:1 TPM:6:1 HPME:7:1 TDE:8:1 TDA:9:1 TDOSA:10:1 TDRA:11:1 E2PB:12:2 TPMS:14:1 TTRF:19:1"
    ),
}


@cache
def fields(register: str) -> tuple[Field, ...]:
    """The fields of a register by its name, lowest first; KeyError: not one of `REGISTERS`."""
    found = []
    for text in _FIELDS[register].split():
        name, lsb, width = text.split(":")
        found.append(Field(name, int(lsb), int(width.rstrip("s")), width.endswith("s")))
    return tuple(found)


@cache
def field(register: str, name: str) -> Field:
    """One field; KeyError: no such register or field."""
    for candidate in fields(register):
        if candidate.name.lower() == name.lower():
            return candidate
    raise KeyError(f"{register} has no field {name}; it has {', '.join(f.name for f in fields(register))}")


def get(register: str | int, name: str, value: int) -> int:
    """The value of a field of a register, named or given by its encoding."""
    return field(sysregs.name_of(register) if isinstance(register, int) else register, name).get(value)


def describe(register: str, value: int) -> dict[str, int]:
    """Every field that is not 0, by name."""
    return {f.name: f.get(value) for f in fields(register) if f.get(value)}


REGISTERS: Final = tuple(_FIELDS)
"""The registers whose fields are known here."""

ESR_CLASSES: Final[Mapping[int, str]] = {
    0x00: "UNKNOWN",
    0x01: "WFx",
    0x03: "CP15_32",
    0x04: "CP15_64",
    0x05: "CP14_MR",
    0x06: "CP14_LS",
    0x07: "FP_ASIMD",
    0x08: "CP10_ID",
    0x09: "PAC",
    0x0C: "CP14_64",
    0x0D: "BTI",
    0x0E: "ILL",
    0x11: "SVC32",
    0x12: "HVC32",
    0x13: "SMC32",
    0x15: "SVC64",
    0x16: "HVC64",
    0x17: "SMC64",
    0x18: "SYS64",
    0x19: "SVE",
    0x1A: "ERET",
    0x1C: "FPAC",
    0x1D: "SME",
    0x1F: "IMP_DEF",
    0x20: "IABT_LOW",
    0x21: "IABT_CUR",
    0x22: "PC_ALIGN",
    0x24: "DABT_LOW",
    0x25: "DABT_CUR",
    0x26: "SP_ALIGN",
    0x27: "MOPS",
    0x28: "FP_EXC32",
    0x2C: "FP_EXC64",
    0x2F: "SERROR",
    0x30: "BREAKPT_LOW",
    0x31: "BREAKPT_CUR",
    0x32: "SOFTSTP_LOW",
    0x33: "SOFTSTP_CUR",
    0x34: "WATCHPT_LOW",
    0x35: "WATCHPT_CUR",
    0x38: "BKPT32",
    0x3A: "VECTOR32",
    0x3C: "BRK64",
}
"""ESR_ELx.EC -> the kernel's name of the class (ESR_ELx_EC_*)."""

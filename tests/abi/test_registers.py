"""ONE_REG ids, system registers and their fields, against the kernel's own tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm2.abi import onereg, sysreg_fields, sysregs
from kvm2.abi.lookup import lookup

PARTS = r"\s*\(?(\d+),\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\)?"


def kernel_encodings(kernel: Path) -> dict[str, int]:
    """Name -> encoding of every register that the kernel names with plain numbers."""
    text = (kernel / "arch/arm64/include/asm/sysreg.h").read_text()
    found = re.findall(rf"#define SYS_(\w+)\s+sys_reg{PARTS}", text)
    text = (kernel / "arch/arm64/tools/sysreg").read_text()
    found += re.findall(r"^Sysreg\s+(\w+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)", text, re.M)
    found = [row for row in found if not row[0].startswith("AARCH32_")]  # CP15 encodings
    return {name: sysregs.enc(*map(int, parts)) for name, *parts in found}


def test_names_have_the_kernels_encodings(kernel: Path) -> None:
    theirs = kernel_encodings(kernel)
    common = theirs.keys() & sysregs.SYSREGS.keys()
    assert len(common) > 250
    assert {name: theirs[name] for name in common} == {name: sysregs.SYSREGS[name] for name in common}


def described(kernel: Path) -> set[int]:
    """The encodings of sys_reg_descs, read from the C source."""
    text = (kernel / "arch/arm64/kvm/sys_regs.c").read_text()
    body = text[text.index("sys_reg_desc sys_reg_descs[] = {") : text.index("static bool handle_at_s1e01")]
    macro = r"(?:AA32_ID_WRITABLE|ID_HIDDEN|ID_WRITABLE|ID_SANITISED|MTE_REG|EL2_REG|EL2_REG_VNCR|EL2_REG_REDIR)"
    names = re.findall(rf"(?:SYS_DESC\(SYS_|PMU_SYS_REG\(|{macro}\()(\w+)", body)
    names += [f"{key}KEY{half}_EL1" for key in re.findall(r"PTRAUTH_KEY\((\w+)\)", body) for half in ("LO", "HI")]
    for what, n in re.findall(r"^\t(DBG_BCR_BVR_WCR_WVR_EL1|(?:AMU|PMU)_\w+_EL0)\((\d+)\)", body, re.M):
        if what.startswith("DBG"):
            names += [f"DBG{kind}{n}_EL1" for kind in ("BVR", "BCR", "WVR", "WCR")]
        else:
            names.append(what[4:].replace("_EL0", f"{n}_EL0"))
    reserved = re.findall(r"ID_UNALLOCATED\((\d),\s*(\d)\)", body)
    return {sysregs.SYSREGS[name] for name in names} | {sysregs.enc(3, 0, 0, int(m), int(p)) for m, p in reserved}


def test_every_register_of_kvms_table(kernel: Path) -> None:
    assert set(sysregs.SYS_REG_DESCS) == described(kernel)
    assert list(sysregs.SYS_REG_DESCS) == sorted(set(sysregs.SYS_REG_DESCS))


def kernel_fields(kernel: Path) -> dict[str, set[tuple[str, int, int, bool]]]:
    """Register -> (NAME, lsb, width, signed) from arch/arm64/tools/sysreg."""
    registers: dict[str, set[tuple[str, int, int, bool]]] = {}
    current: set[tuple[str, int, int, bool]] = set()
    for line in (kernel / "arch/arm64/tools/sysreg").read_text().splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["Sysreg"] or words[:1] == ["SysregFields"]:
            current = registers.setdefault(words[1], set())
        elif words and words[0] in ("Field", "Enum", "SignedEnum", "UnsignedEnum"):
            high, _, low = words[1].partition(":")
            lsb = int(low or high)
            current.add((words[2].upper(), lsb, int(high) - lsb + 1, words[0] == "SignedEnum"))
    return registers


def test_fields_are_the_kernels(kernel: Path) -> None:
    theirs = kernel_fields(kernel)
    compared = 0
    for register in sysreg_fields.REGISTERS:
        if not theirs.get(register):
            continue  # not in that file: checked below, or defined by a shared block
        compared += 1
        ours = {(f.name.upper(), f.lsb, f.width) for f in sysreg_fields.fields(register)}
        assert ours == {entry[:3] for entry in theirs[register]}, register
        signed = {f.name.upper() for f in sysreg_fields.fields(register) if f.signed}
        known = {entry[0] for entry in theirs[register] if entry[3]}
        # The kernel's table of features, not this file, says that these two count from -1.
        assert signed - known == ({"OUTERSHR", "INNERSHR"} if register == "ID_MMFR0_EL1" else set())
        assert known <= signed
    assert compared > 35


def test_fields_do_not_overlap() -> None:
    for register in sysreg_fields.REGISTERS:
        seen = 0
        for f in sysreg_fields.fields(register):
            assert not seen & f.mask, (register, f)
            seen |= f.mask
        assert seen < 1 << 64


def test_esr_classes(kernel: Path) -> None:
    text = (kernel / "arch/arm64/include/asm/esr.h").read_text()
    found = {int(v, 16): name for name, v in re.findall(r"#define ESR_ELx_EC_(\w+)\s+UL\((0x\w+)\)", text)}
    assert {0x3F: "MAX"} | dict(sysreg_fields.ESR_CLASSES) == found


def test_field_values() -> None:
    fp = sysreg_fields.field("ID_AA64PFR0_EL1", "FP")
    assert fp.get(0xF0000) == -1
    assert fp.set(0, -1) == 0xF0000
    assert fp.set((1 << 64) - 1, 0) == (1 << 64) - 1 - 0xF0000
    with pytest.raises(ValueError, match="-8 to 7 fit in 4 bits"):
        fp.set(0, 8)
    with pytest.raises(ValueError, match="0 to 15 fit in 4 bits"):
        sysreg_fields.field("ID_AA64MMFR0_EL1", "parange").set(0, 16)
    with pytest.raises(KeyError, match="has no field NIX"):
        sysreg_fields.field("VTCR_EL2", "NIX")
    assert sysreg_fields.get(sysregs.CTR_EL0, "DIC", 1 << 29) == 1
    assert sysreg_fields.describe("VTCR_EL2", 0x80023558)["PS"] == 2


@given(st.integers(0, 3), st.integers(0, 7), st.integers(0, 15), st.integers(0, 15), st.integers(0, 7))
def test_every_encoding_has_a_name_and_comes_back(op0: int, op1: int, crn: int, crm: int, op2: int) -> None:
    encoding = sysregs.enc(op0, op1, crn, crm, op2)
    assert sysregs.split(encoding) == (op0, op1, crn, crm, op2)
    assert sysregs.by_name(sysregs.name_of(encoding)) == encoding
    assert sysregs.by_name(f"s{op0}_{op1}_c{crn}_c{crm}_{op2}") == encoding
    reg = onereg.parse(onereg.sysreg(encoding))
    assert (reg.kind, reg.index, reg.size) == ("sysreg", encoding, 8)


@pytest.mark.parametrize(
    "parts", [(4, 0, 0, 0, 0), (3, 8, 0, 0, 0), (3, 0, 16, 0, 0), (3, 0, 0, 0, 8), (3, -1, 0, 0, 0)]
)
def test_parts_that_do_not_fit(parts: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no system register S"):
        sysregs.enc(*parts)
    with pytest.raises(KeyError, match="no system register is named"):
        sysregs.by_name("S3_0_C16_C0_0" if parts[2] == 16 else "NIX_EL1")


def test_ids() -> None:
    assert onereg.core("regs.regs[0]") == 0x6030000000100000
    assert onereg.core("fp_regs.vregs[31]") == 0x6040000000100054 + 31 * 4
    assert onereg.core("fp_regs.fpcr") == 0x60200000001000D5
    assert onereg.ccsidr(2) == 0x6020000000110002
    assert onereg.KVM_REG_ARM_PSCI_VERSION == 0x6030000000140000
    assert onereg.KVM_REG_ARM_VENDOR_HYP_BMAP == 0x6030000000160002
    assert onereg.KVM_REG_ARM64_SVE_VLS == 0x606000000015FFFF
    assert [onereg.sve_z(31, 1), onereg.sve_p(15), onereg.sve_ffr()] == [
        0x60800000001503E1,
        0x60500000001505E0,
        0x6050000000150600,
    ]
    for make, limit in ((onereg.sve_z, 32), (onereg.sve_p, 16), (onereg.sve_ffr, 32), (onereg.fw, 1 << 16)):
        with pytest.raises(ValueError, match=f"0 to {limit - 1} are possible"):
            make(limit)
    assert len(onereg.CORE_REGS) == 31 + 3 + 2 + 5 + 32 + 2


def test_parse_names_what_there_is() -> None:
    for reg in onereg.CORE_REGS:
        parsed = onereg.parse(reg.id)
        assert (parsed.kind, parsed.name, parsed.size) == ("core", reg.name, reg.size)
    names = {
        onereg.sve_z(3): "Z3",
        onereg.sve_p(15, 2): "P15[2]",
        onereg.sve_ffr(): "FFR",
        onereg.ccsidr(3): "CCSIDR_EL1[3]",
    }
    assert {reg_id: onereg.parse(reg_id).name for reg_id in names} == names
    assert onereg.parse(onereg.KVM_REG_ARM_TIMER_CVAL).name == "KVM_REG_ARM_TIMER_CVAL"
    # An x86 id, one with a bit between size and class, and a class that does not exist.
    for wrong in (0x2030000000000000, 0x6030000100100040, 0x6030000000170000):
        assert onereg.parse(wrong).kind == "unknown"
    assert onereg.parse(0x6030000000100041).name == "0x6030000000100041"


def test_lookup() -> None:
    assert [(m.kind, m.name) for m in lookup("9")][-1] == ("attribute", "KVM_CREATE_VM_ATTR_MAX_VCPUS")
    assert {m.name for m in lookup("0xae80")} == {"KVM_RUN"}
    assert [m.name for m in lookup("sve")] == ["KVM_CAP_ARM_SVE"]
    assert lookup("0x6030000000130000")[0].name == "S0_0_C0_C0_0"
    assert lookup("sve_vls")[0].name == "KVM_REG_ARM64_SVE_VLS"
    assert lookup("nothing of the kind") == lookup("0x123456789") == []

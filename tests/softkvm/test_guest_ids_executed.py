"""What guests are shown under the policy "core", against the core itself: an instruction of every feature is tried."""

from __future__ import annotations

import struct

import pytest

from kvm2.abi import sysreg_fields
from kvm2.abi import sysregs as sr
from kvm2.softkvm import guest_ids
from kvm2.softkvm.cpu import registers as reg

from .cpu.machine import Machine

# register.field, the value that stands for the feature, one of its instructions
FEATURES = [
    ("ID_AA64ISAR0_EL1.AES", 1, 0x4E284820, "aese v0.16b, v1.16b"),
    ("ID_AA64ISAR0_EL1.AES", 2, 0x0EE2E020, "pmull v0.1q, v1.1d, v2.1d"),
    ("ID_AA64ISAR0_EL1.SHA1", 1, 0x5E280820, "sha1h s0, s1"),
    ("ID_AA64ISAR0_EL1.SHA2", 1, 0x5E024020, "sha256h q0, q1, v2.4s"),
    ("ID_AA64ISAR0_EL1.SHA2", 2, 0xCE628020, "sha512h q0, q1, v2.2d"),
    ("ID_AA64ISAR0_EL1.CRC32", 1, 0x1AC24820, "crc32w w0, w1, w2"),
    ("ID_AA64ISAR0_EL1.Atomic", 2, 0xF8210122, "ldadd x1, x2, [x9]"),
    ("ID_AA64ISAR0_EL1.RDM", 1, 0x6E828420, "sqrdmlah v0.4s, v1.4s, v2.4s"),
    ("ID_AA64ISAR0_EL1.SHA3", 1, 0xCE020C20, "eor3 v0.16b, v1.16b, v2.16b, v3.16b"),
    ("ID_AA64ISAR0_EL1.SM3", 1, 0xCE420C20, "sm3ss1 v0.4s, v1.4s, v2.4s, v3.4s"),
    ("ID_AA64ISAR0_EL1.SM4", 1, 0xCEC08420, "sm4e v0.4s, v1.4s"),
    ("ID_AA64ISAR0_EL1.DP", 1, 0x6E829420, "udot v0.4s, v1.16b, v2.16b"),
    ("ID_AA64ISAR0_EL1.FHM", 1, 0x4E22EC20, "fmlal v0.4s, v1.4h, v2.4h"),
    ("ID_AA64ISAR0_EL1.TS", 1, 0xD500401F, "cfinv"),
    ("ID_AA64ISAR0_EL1.TS", 2, 0xD500405F, "axflag"),
    ("ID_AA64ISAR0_EL1.RNDR", 1, 0xD53B2400, "mrs x0, rndr"),
    ("ID_AA64ISAR1_EL1.DPB", 1, 0xD50B7C29, "dc cvap, x9"),
    ("ID_AA64ISAR1_EL1.DPB", 2, 0xD50B7D29, "dc cvadp, x9"),
    ("ID_AA64ISAR1_EL1.APA", 1, 0xDAC10020, "pacia x0, x1"),
    ("ID_AA64ISAR1_EL1.JSCVT", 1, 0x1E7E0020, "fjcvtzs w0, d1"),
    ("ID_AA64ISAR1_EL1.FCMA", 1, 0x6E82E420, "fcadd v0.4s, v1.4s, v2.4s, #90"),
    ("ID_AA64ISAR1_EL1.LRCPC", 1, 0xF8BFC120, "ldapr x0, [x9]"),
    ("ID_AA64ISAR1_EL1.LRCPC", 2, 0xD9408120, "ldapur x0, [x9, #8]"),
    ("ID_AA64ISAR1_EL1.FRINTTS", 1, 0x1E684020, "frint32z d0, d1"),
    ("ID_AA64ISAR1_EL1.SB", 1, 0xD50330FF, "sb"),
    ("ID_AA64ISAR1_EL1.SPECRES", 1, 0xD50B7380, "cfp rctx, x0"),
    ("ID_AA64ISAR1_EL1.I8MM", 1, 0x4E82A420, "smmla v0.4s, v1.16b, v2.16b"),
    ("ID_AA64ISAR1_EL1.BF16", 1, 0x6E42FC20, "bfdot v0.4s, v1.8h, v2.8h"),
    ("ID_AA64ISAR1_EL1.LS64", 1, 0xF83F9120, "st64b x0, [x9]"),
    ("ID_AA64ISAR2_EL1.WFxT", 2, 0xD5031000, "wfet x0"),
    ("ID_AA64ISAR2_EL1.MOPS", 1, 0x19000440, "cpyfp"),
    ("ID_AA64ISAR2_EL1.CSSC", 1, 0xDAC02020, "abs x0, x1"),
    ("ID_AA64PFR0_EL1.FP", 1, 0x1EE22820, "fadd h0, h1, h2"),
    ("ID_AA64PFR0_EL1.AdvSIMD", 1, 0x4E421420, "fadd v0.8h, v1.8h, v2.8h"),
    ("ID_AA64PFR0_EL1.SVE", 1, 0x04220020, "add z0.b, z1.b, z2.b"),
    ("ID_AA64PFR0_EL1.RAS", 1, 0xD5385300, "mrs x0, erridr_el1"),
    ("ID_AA64PFR0_EL1.AMU", 1, 0xD53BD200, "mrs x0, amcr_el0"),
    ("ID_AA64PFR0_EL1.DIT", 1, 0xD503415F, "msr dit, #1"),
    ("ID_AA64PFR1_EL1.SSBS", 2, 0xD503413F, "msr ssbs, #1"),
    ("ID_AA64PFR1_EL1.MTE", 1, 0x9ADF1020, "irg x0, x1"),
    ("ID_AA64PFR1_EL1.SME", 1, 0xD503437F, "smstart sm"),
    ("ID_AA64ZFR0_EL1.SVEver", 1, 0x45029420, "eortb z0.b, z1.b, z2.b"),
    ("ID_AA64ZFR0_EL1.I8MM", 1, 0x45029820, "smmla z0.s, z1.b, z2.b"),
    ("ID_AA64MMFR1_EL1.PAN", 1, 0xD500409F, "msr pan, #0"),
    ("ID_AA64MMFR2_EL1.UAO", 1, 0xD500407F, "msr uao, #0"),
    ("ID_AA64DFR0_EL1.PMSVer", 1, 0xD5389900, "mrs x0, pmscr_el1"),
    ("ID_AA64DFR0_EL1.TraceFilt", 1, 0xD5381220, "mrs x0, trfcr_el1"),
]
VECTORS, DATA = 0x8000, 0x20000
EXECUTED, UNDEFINED = 7, 0xDEAD


def hvc(immediate: int) -> int:
    return 0xD4000002 | immediate << 5


@pytest.fixture(params=["a72", "max"], scope="module")
def machine(request: pytest.FixtureRequest):
    model = request.param
    machine = Machine(model, pauth=model == "max")
    if model == "max":
        machine.core.set_sve((1, 2, 4))
    machine.arena.write(machine.arena.base + VECTORS + 0x200, struct.pack("<I", hvc(UNDEFINED)))
    machine.state.sys[reg.VBAR_EL1] = machine.arena.base + VECTORS
    yield machine
    machine.close()


@pytest.mark.parametrize(("path", "value", "word", "text"), FEATURES, ids=[row[3] for row in FEATURES])
def test_shown_is_executed_and_hidden_is_undefined(
    machine: Machine, path: str, value: int, word: int, text: str
) -> None:
    register, name = path.split(".")
    field = sysreg_fields.field(register, name)
    shown = field.get(guest_ids.lower(sr.by_name(register), field.set(0, value), machine.core.model))
    base = machine.arena.base
    machine.arena.write(base, struct.pack("<2I", word, hvc(EXECUTED)))
    machine.start(base, CPACR_EL1=0x330000, x9=base + DATA)
    trap = machine.go()
    assert trap.ec == 0x16
    assert trap.esr & 0xFFFF == (EXECUTED if shown >= value else UNDEFINED)

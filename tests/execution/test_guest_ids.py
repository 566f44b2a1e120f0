"""Policy "core": what a guest reads of its ID registers, each feature tried by an instruction of it."""

from __future__ import annotations

import pytest

import kvm2
from kvm2.abi import sysreg_fields, sysregs
from kvm2.errors import UsageError
from kvm2.softkvm.profile import load
from kvm2.spec import VmSpec

from .rig import RAM, Bench

ARCH = ".arch armv8.6-a+crypto+sha3+sm4+fp16+fp16fml+rng+bf16+i8mm+ls64+sb+predres\n"
VECTORS, DATA, MMIO = 0x8000, 0x10000, 0x1000_0000
UNDEFINED = 1 << 25

# (register, field, value from which the instruction is there, the instruction); x10 points to memory.
FEATURES = (
    ("ISAR0", "AES", 1, "aese v0.16b, v1.16b"),
    ("ISAR0", "AES", 2, "pmull v0.1q, v1.1d, v2.1d"),
    ("ISAR0", "SHA1", 1, "sha1h s0, s1"),
    ("ISAR0", "SHA2", 1, "sha256h q0, q1, v2.4s"),
    ("ISAR0", "SHA2", 2, "sha512h q0, q1, v2.2d"),
    ("ISAR0", "CRC32", 1, "crc32b w0, w1, w2"),
    ("ISAR0", "Atomic", 2, "ldadd x0, x1, [x10]"),
    ("ISAR0", "RDM", 1, "sqrdmlah v0.4h, v1.4h, v2.4h"),
    ("ISAR0", "SHA3", 1, "eor3 v0.16b, v1.16b, v2.16b, v3.16b"),
    ("ISAR0", "SM3", 1, "sm3ss1 v0.4s, v1.4s, v2.4s, v3.4s"),
    ("ISAR0", "SM4", 1, "sm4e v0.4s, v1.4s"),
    ("ISAR0", "DP", 1, "udot v0.2s, v1.8b, v2.8b"),
    ("ISAR0", "FHM", 1, "fmlal v0.2s, v1.2h, v2.2h"),
    ("ISAR0", "TS", 1, "rmif x0, #0, #0"),
    ("ISAR0", "TS", 2, "axflag"),
    ("ISAR0", "TLB", 1, "tlbi vae1os, x9"),
    ("ISAR0", "TLB", 2, "tlbi rvae1is, x9"),
    ("ISAR0", "RNDR", 1, "mrs x0, s3_3_c2_c4_0"),
    ("ISAR1", "DPB", 1, "dc cvap, x10"),
    ("ISAR1", "DPB", 2, "dc cvadp, x10"),
    ("ISAR1", "JSCVT", 1, "fjcvtzs w0, d0"),
    ("ISAR1", "FCMA", 1, "fcadd v0.4s, v1.4s, v2.4s, #90"),
    ("ISAR1", "LRCPC", 1, "ldapr x0, [x10]"),
    ("ISAR1", "LRCPC", 2, "ldapur x0, [x10]"),
    ("ISAR1", "FRINTTS", 1, "frint32x s0, s1"),
    ("ISAR1", "SB", 1, "sb"),
    ("ISAR1", "SPECRES", 1, "cfp rctx, x9"),
    ("ISAR1", "BF16", 1, "bfdot v0.2s, v1.4h, v2.4h"),
    ("ISAR1", "I8MM", 1, "smmla v0.4s, v1.16b, v2.16b"),
    ("ISAR1", "LS64", 1, "ld64b x0, [x10]"),
    ("ISAR2", "WFxT", 2, ".inst 0xd5031000 // wfet x0"),
    ("ISAR2", "MOPS", 1, ".inst 0x19010400 // cpyfp"),
    ("PFR0", "FP", 1, "fadd h0, h1, h2"),
    ("PFR0", "AdvSIMD", 1, "fadd v0.4h, v1.4h, v2.4h"),
    ("PFR0", "DIT", 1, "mrs x0, s3_3_c4_c2_5"),
    ("PFR1", "SSBS", 2, "mrs x0, s3_3_c4_c2_6"),
    ("PFR1", "MTE", 1, ".inst 0x9ac11400 // irg"),
    ("MMFR1", "PAN", 1, "mrs x0, s3_0_c4_c2_3"),
    ("MMFR2", "UAO", 1, "mrs x0, s3_0_c4_c2_4"),
)
HOSTS = ("cortex-a72", "neoverse-n1-4k", "graviton3", "armv9-56")


def guest_reads(bench: Bench, register: str) -> int:
    """ID_AA64<register>_EL1 as the guest reads it."""
    bench.run(f"nop\n mrs x0, ID_AA64{register}_EL1\n str x0, [x3]", x3=MMIO)
    return bench.vcpu.regs.x0


def undefined(bench: Bench, text: str) -> bool:
    """Whether the guest takes an undefined instruction exception from `text`."""
    bench.load("mrs x11, esr_el1\n str x11, [x3]", VECTORS + 0x200)
    bench.run(f"{ARCH} nop\n {text}\n mov x11, #0\n str x11, [x3]", x3=MMIO, x10=RAM + DATA, x9=0)
    esr = bench.vcpu.regs.x[11]
    assert esr in (0, UNDEFINED), hex(esr)
    return esr != 0


def machine(host: str, policy: str) -> Bench:
    kvm = kvm2.open(host, guest_ids=policy)
    made = Bench(kvm, kvm.create_vm2(VmSpec(physaddr_bits=36)), RAM, 1 << 20)
    made.vcpu.set_reg("CPACR_EL1", 3 << 20)
    made.vcpu.set_reg("VBAR_EL1", RAM + VECTORS)
    return made


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_shown_works_and_what_is_hidden_the_core_has_not(host: str) -> None:
    bench = machine(host, "core")
    host_registers = load(host).registers
    tried = 0
    for register, field, least, text in FEATURES:
        name = f"ID_AA64{register}_EL1"
        shown = sysreg_fields.get(name, field, guest_reads(bench, register))
        announced = sysreg_fields.get(name, field, host_registers.get(sysregs.by_name(name), 0))
        if shown >= least:
            assert not undefined(bench, text), f"{name}.{field} = {shown}, and {text!r} is undefined"
            tried += 1
        elif announced >= least:
            assert undefined(bench, text), f"{name}.{field} is hidden ({announced} -> {shown}), and {text!r} works"
            tried += 1
    assert tried >= 5


def test_userspace_reads_the_host_under_either_policy() -> None:
    for policy in ("profile", "core"):
        bench = machine("graviton3", policy)
        for register in ("ISAR1", "MMFR0", "MMFR2", "PFR0", "PFR1", "ZFR0"):
            name = f"ID_AA64{register}_EL1"
            reads, shown = bench.vcpu.regs[name], guest_reads(bench, register)
            assert shown == reads or policy == "core"
        assert (guest_reads(bench, "ISAR1") != bench.vcpu.regs["ID_AA64ISAR1_EL1"]) == (policy == "core")


def test_a_52_bit_host_shows_48_bits_and_no_lpa2() -> None:
    shown = guest_reads(machine("armv9-4k-52cap", "core"), "MMFR0")
    assert [sysreg_fields.get("ID_AA64MMFR0_EL1", f, shown) for f in ("PARange", "TGran4", "TGran16")] == [5, 0, 1]


def test_instruction_caches_always_need_maintenance() -> None:
    bench = machine("graviton3", "core")
    bench.run("nop\n mrs x0, ctr_el0\n str x0, [x3]", x3=MMIO)
    assert not bench.vcpu.regs.x0 >> 29 & 1


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError) as raised:
        kvm2.open("graviton3", guest_ids="all")  # type: ignore[arg-type]
    assert "profile" in str(raised.value) and "core" in str(raised.value)

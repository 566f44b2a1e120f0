"""KVM_GET/SET_ONE_REG and KVM_GET_REG_LIST: core, system, firmware, timer and cache registers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm2.abi import onereg
from kvm2.abi import sysregs as sr
from kvm2.softkvm import registers

from .vcpus import AARCH32, PMU, PSCI, PTRAUTH, SVE, Client, make_vm, name_of

NEW, OLD, A57 = "max-4k-6.12", "max-4k-6.1", "cortex-a57-4k"
X0, PC, PSTATE, V0, FPCR = (
    0x6030000000100000,
    0x6030000000100040,
    0x6030000000100042,
    0x6040000000100054,
    0x60200000001000D5,
)
DUMPS = json.loads((Path(__file__).parents[1] / "data" / "registers" / "dumps.json").read_text())
FEATURES = {"none": 0, "PSCI_0_2+PMU_V3": PSCI | PMU, "PSCI_0_2+SVE+PTRAUTH_ADDRESS+PTRAUTH_GENERIC+PMU_V3": 0x7C}
COUNTERS = {"603000000013df1a", "603000000013df01"}


def client(host=NEW, features=PSCI, **config):
    vcpu = Client(make_vm(host, **config))
    vcpu.init(features)
    if features & SVE and not config.get("sve_vls"):
        vcpu.finalize()
    return vcpu


@pytest.mark.parametrize("key", DUMPS)
def test_ids_order_and_reset_values_are_those_of_real_kernels(key):
    host, features = key.split()
    vcpu = client(host, FEATURES[features])
    assert [f"{id_:016x}" for id_ in vcpu.reg_list()] == list(DUMPS[key])
    for text, expected in DUMPS[key].items():
        if text not in COUNTERS:
            got = vcpu.get_bytes(int(text, 16)).hex()
            cut = expected.endswith("~")
            assert got == (expected[:-1].ljust(len(got), "0") if cut else expected), text


@pytest.mark.parametrize(
    ("host", "features", "count"),
    [
        *((NEW, 0, 259), (NEW, PMU, 333), (NEW, SVE, 278), (NEW, PTRAUTH, 269), ("max-4k-gicv2", 0, 259)),
        *((OLD, 0, 242), (OLD, PMU, 316), (OLD, SVE, 261), ("a57-4k-6.1", 0, 242)),
    ],
)
def test_lengths_of_the_list(host, features, count):
    vcpu = client(host, features)
    assert len(vcpu.reg_list()) == count
    assert name_of(vcpu.reg_list, count - 1) == "E2BIG"
    assert int.from_bytes(vcpu.memory.read(0x10000, 8), "little") == count
    # Only the low word of n counts, as in the kernel.
    assert name_of(vcpu.reg_list, 1 << 32 | 5) == "E2BIG"
    assert name_of(vcpu.reg_list, count) == ""


@pytest.mark.parametrize(
    ("id_", "expected"),
    [
        (0x6020000000100000, "EINVAL"),
        (0x6040000000100000, "EINVAL"),
        (0x6030000000100001, "EINVAL"),
        (0x60300000001000D8, "ENOENT"),
        (0x60400000001000D6, "ENOENT"),
        (0x603000000010FFFF, "ENOENT"),
        (0x6030000010100000, "ENOENT"),  # bits 31:28 are part of the offset
        (0x2030000000100000, "EINVAL"),
        (0x6030000100100000, "EINVAL"),
        (0x6030000000110000, "ENOENT"),
        (0x603000000013FFFF, "ENOENT"),
        (0x602000000013C080, "ENOENT"),
        (0x6030000000140004, "ENOENT"),
        (0x6020000000140000, "ENOENT"),
        (0x6030000000160003, "ENOENT"),
        (0x602000000011000E, "ENOENT"),
        (0x6020000000110100, "ENOENT"),
        (0x6030000000110001, "ENOENT"),
        (0x6030000010110001, "ENOENT"),
        (0x60300000001200C0, "ENOENT"),
        (0x6030000000100052, "EINVAL"),  # the hole before the V registers
        (0x6020000000100054, "EINVAL"),
    ],
)
def test_ids_that_are_none(id_, expected):
    vcpu = client()
    assert name_of(vcpu.get, id_) == expected
    assert name_of(vcpu.set, id_, bytes(256)) == expected


def test_an_invariant_register_answers_in_any_class_as_in_the_kernel():
    vcpu = client()
    midr = vcpu.sys(sr.MIDR_EL1)
    assert vcpu.get(0x603000000012C000) == midr
    assert name_of(vcpu.set, 0x603000000012C000, midr ^ 1) == "EINVAL"


@pytest.mark.parametrize(
    ("host", "features", "mode", "allowed"),
    [
        (NEW, PSCI, 0x5, True),
        (NEW, PSCI, 0x4, True),
        (NEW, PSCI, 0x0, True),
        (NEW, PSCI, 0x10, True),
        ("neoverse-n1-4k", PSCI, 0x10, True),
        ("a64fx-4k", PSCI, 0x10, False),
        *((NEW, PSCI, mode, False) for mode in (0x1, 0x2, 0x8, 0x9, 0xC, 0xD, 0x11, 0x13, 0x16, 0x17, 0x1B, 0x1F)),
        *((A57, AARCH32, mode, True) for mode in (0x10, 0x11, 0x12, 0x13, 0x17, 0x1B, 0x1F)),
        *((A57, AARCH32, mode, False) for mode in (0x0, 0x4, 0x5, 0x16, 0x1A)),
    ],
)
def test_pstate_takes_modes_that_the_vcpu_can_be_in(host, features, mode, allowed):
    vcpu = client(host, features)
    before = vcpu.get(PSTATE)
    assert name_of(vcpu.set, PSTATE, 0xF0000000 | mode) == ("" if allowed else "EINVAL")
    assert vcpu.get(PSTATE) == (0xF0000000 | mode if allowed else before)


def test_aarch32_modes_narrow_registers():
    vcpu = client(A57, AARCH32)
    for id_ in (X0 + 28, X0 + 30, PC):
        vcpu.set(id_, 0xFFFFFFFF_00000007)
    # Supervisor mode sees all; user mode X0 to X14.
    assert [vcpu.get(id_) for id_ in (X0 + 28, X0 + 30, PC)] == [7, 7, 7]
    vcpu.set(PSTATE, 0x10)
    vcpu.set(X0 + 30, 0xFFFFFFFF_00000007)
    vcpu.set(X0 + 28, 0xFFFFFFFF_00000007)
    assert (vcpu.get(X0 + 28), vcpu.get(X0 + 30)) == (7, 0xFFFFFFFF_00000007)


def test_v_registers_belong_to_z_on_an_sve_vcpu():
    vcpu = client(features=PSCI | SVE)
    assert name_of(vcpu.get, V0) == name_of(vcpu.set, V0, 1) == "EINVAL"
    vcpu.set(FPCR, 0x1000000)
    plain = client()
    plain.set(V0, 1 << 127 | 5)
    assert (vcpu.get(FPCR), plain.get(V0)) == (0x1000000, 1 << 127 | 5)


def test_unwritable_memory_comes_after_the_id():
    vcpu = client()
    assert name_of(vcpu.get_bytes, X0, 16) == "EFAULT"
    assert name_of(vcpu.set, X0, b"", 16) == "EFAULT"
    assert name_of(vcpu.get_bytes, 0x603000000013FFFF, 16) == "ENOENT"
    # The value of a system register is read before the register is looked up.
    assert name_of(vcpu.set, 0x603000000013FFFF, b"", 16) == "EFAULT"
    assert name_of(vcpu.set, 0x6020000000140000, b"", 16) == "ENOENT"
    assert name_of(vcpu.set, onereg.ccsidr(13), b"", 16) == "EFAULT"


@pytest.mark.parametrize(
    ("host", "features", "enc", "present"),
    [
        (NEW, PSCI, sr.ZCR_EL1, False),
        (NEW, PSCI | SVE, sr.ZCR_EL1, True),
        (NEW, PSCI, sr.APIAKEYLO_EL1, False),
        (NEW, PSCI | PTRAUTH, sr.APIAKEYLO_EL1, True),
        (NEW, PSCI, sr.PMCR_EL0, False),
        (NEW, PSCI | PMU, sr.PMCR_EL0, True),
        (NEW, PSCI | PMU, sr.PMCEID0_EL0, False),
        (NEW, PSCI, sr.TFSR_EL1, False),
        (NEW, PSCI, sr.TCR2_EL1, True),
        (OLD, PSCI, sr.TCR2_EL1, False),
        (OLD, PSCI, sr.CNTP_CTL_EL0, False),
        (NEW, PSCI, sr.CNTP_CTL_EL0, True),
        (NEW, PSCI, sr.HCR_EL2, False),
        (NEW, PSCI, sr.SP_EL1, False),
        (NEW, PSCI, sr.ICC_SRE_EL1, False),
    ],
)
def test_registers_come_with_their_feature(host, features, enc, present):
    vcpu = client(host, features)
    assert name_of(vcpu.sys, enc) == ("" if present else "ENOENT")
    assert (onereg.sysreg(enc) in vcpu.reg_list()) == present


def test_mpidr_counts_sixteen_to_a_cluster():
    vm = make_vm(NEW)
    for number, expected in ((0, 0x80000000), (15, 0x8000000F), (16, 0x80000100), (300, 0x8000120C)):
        vcpu = Client(vm, number)
        vcpu.init(PSCI)
        assert vcpu.sys(sr.MPIDR_EL1) == expected


def test_oslsr_has_one_bit_to_change():
    vcpu = client()
    for value, expected in ((8, ""), (10, ""), (0, "EINVAL"), (9, "EINVAL"), (12, "EINVAL")):
        assert name_of(vcpu.set_sys, sr.OSLSR_EL1, value) == expected
    assert vcpu.sys(sr.OSLSR_EL1) == 10


def test_counts_move_the_offset_of_the_vm():
    vm = make_vm(NEW)
    first, second = Client(vm, 0), Client(vm, 1)
    first.init(PSCI)
    second.init(PSCI)
    first.set(onereg.KVM_REG_ARM_TIMER_CNT, 1 << 40)
    assert 0 <= second.get(onereg.KVM_REG_ARM_TIMER_CNT) - (1 << 40) < 1 << 32
    first.set(onereg.KVM_REG_ARM_TIMER_CVAL, 1 << 50)
    first.set(onereg.KVM_REG_ARM_TIMER_CTL, 7)
    assert first.get(onereg.KVM_REG_ARM_TIMER_CTL) == 3
    first.set(onereg.KVM_REG_ARM_TIMER_CVAL, 5)
    assert first.get(onereg.KVM_REG_ARM_TIMER_CTL) == 7
    assert second.get(onereg.KVM_REG_ARM_TIMER_CVAL) == 0
    vm.arm.counter_offset_set = True
    first.set(onereg.KVM_REG_ARM_TIMER_CNT, 0)
    assert first.get(onereg.KVM_REG_ARM_TIMER_CNT) > 1 << 40


def test_the_ids_of_two_timer_registers_are_swapped():
    assert onereg.sysreg(sr.CNTVCT_EL0) == onereg.KVM_REG_ARM_TIMER_CVAL
    vcpu = client()
    vcpu.set(onereg.sysreg(sr.CNTVCT_EL0), 77)
    assert vcpu.vcpu.state.sys[sr.CNTV_CVAL_EL0] == 77


def test_caches_are_made_up_now_and_were_the_machines():
    vcpu = client()
    assert vcpu.sys(sr.CLIDR_EL1) == 0x2000021
    assert vcpu.get(onereg.ccsidr(13)) == 2
    vcpu.set(onereg.ccsidr(0), 0x700FE01A)
    assert (vcpu.get(onereg.ccsidr(0)), vcpu.get(onereg.ccsidr(1))) == (0x700FE01A, 2)
    assert name_of(vcpu.set, onereg.ccsidr(0), 1) == "EINVAL"  # lines of 32 bytes; the host's have 64
    assert name_of(vcpu.set_sys, sr.CLIDR_EL1, 1 << 47) == "EINVAL"
    vcpu.set_sys(sr.CLIDR_EL1, 0x2000023)
    old = client(OLD)
    assert name_of(old.set, onereg.ccsidr(0), 0x701FE00A) == ""
    assert name_of(old.set, onereg.ccsidr(0), 0x700FE01A) == "EINVAL"
    assert name_of(old.get, onereg.ccsidr(13)) == "ENOENT"
    assert name_of(old.set_sys, sr.CLIDR_EL1, 0x2000023 ^ 1) == "EINVAL"


def test_clidr_must_clean_where_the_host_needs_it():
    vcpu = client(A57)
    clidr = vcpu.sys(sr.CLIDR_EL1)
    assert name_of(vcpu.set_sys, sr.CLIDR_EL1, clidr) == ""
    assert name_of(vcpu.set_sys, sr.CLIDR_EL1, clidr & ~(7 << 21 | 7 << 27)) == "EINVAL"


FW = (onereg.KVM_REG_ARM_PSCI_VERSION, onereg.KVM_REG_ARM_STD_BMAP, onereg.KVM_REG_ARM_VENDOR_HYP_BMAP)


def test_psci_versions():
    modern, ancient = client(), client(features=0)
    assert (modern.get(FW[0]), ancient.get(FW[0])) == (0x10001, 1)
    for value, new, old in (
        (1, "EINVAL", ""),
        (2, "", "EINVAL"),
        (0x10000, "", "EINVAL"),
        (0x10003, "EINVAL", "EINVAL"),
    ):
        assert (name_of(modern.set, FW[0], value), name_of(ancient.set, FW[0], value)) == (new, old)
    assert modern.get(FW[0]) == 0x10000


def test_services_can_be_taken_away_until_the_first_run():
    vcpu = client()
    for id_, everything in ((FW[1], 1), (FW[2], 3)):
        assert vcpu.get(id_) == everything
        assert name_of(vcpu.set, id_, everything + 1) == "EINVAL"
        vcpu.set(id_, 0)
        vcpu.run_once()
        assert name_of(vcpu.set, id_, 0) == ""
        assert name_of(vcpu.set, id_, 1) == "EBUSY"
        assert name_of(vcpu.set, id_, 4) == "EINVAL"
        vcpu.vm.ran = False


@pytest.mark.parametrize("host", [NEW, A57, "neoverse-n1-4k", OLD])
def test_workaround_levels_can_be_lowered_only(host):
    vcpu = client(host)
    for id_, levels in (
        (onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1, 3),
        (onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3, 3),
    ):
        have = vcpu.get(id_)
        for level in range(levels):
            assert name_of(vcpu.set, id_, level) == ("" if level <= have else "EINVAL")
        assert name_of(vcpu.set, id_, 0x10) == "EINVAL"
    id_, enabled = onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2, 0x10
    protected = vcpu.get(id_) == 3
    for value in range(5):
        assert name_of(vcpu.set, id_, value) == ("" if value < 2 or (value < 4 and protected) else "EINVAL")
    assert name_of(vcpu.set, id_, 2 | enabled) == ("" if protected else "EINVAL")
    assert name_of(vcpu.set, id_, 3 | enabled) == "EINVAL"


def test_a_guest_without_ssbs_needs_no_firmware_against_spectre_v4():
    vcpu = client()
    assert vcpu.get(onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2) == 0
    vcpu.set_sys(sr.ID_AA64PFR1_EL1, vcpu.sys(sr.ID_AA64PFR1_EL1) & ~0xF0)
    assert vcpu.get(onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2) == 3


@settings(max_examples=400, deadline=None)
@given(st.integers(0, (1 << 64) - 1), st.sampled_from((0, 0x6030000000130000, 0x6030000000100000, 0x6080000000150000)))
def test_no_id_makes_more_than_a_refusal(low, base):
    id_ = base | low & 0xFFFFFFFFFFFF if base else low
    vcpu = _SHARED
    known = set(_IDS)
    refusal = name_of(registers.get, vcpu.vcpu, id_)
    assert refusal in ("", "ENOENT", "EINVAL")
    if id_ in known:
        assert refusal == ""
    assert name_of(registers.put, vcpu.vcpu, id_, lambda size: bytes(size)) in ("", "ENOENT", "EINVAL", "EPERM")


_SHARED = client(features=PSCI | SVE | PMU | PTRAUTH)
_IDS = _SHARED.reg_list()

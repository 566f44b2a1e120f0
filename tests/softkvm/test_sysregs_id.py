"""ID registers: which fields can be lowered, by the kernel's rule for each, and until when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm2.abi import sysregs as sr
from kvm2.softkvm import profile, sysregs_fields
from kvm2.softkvm.sysregs_table import invariants, table

from .vcpus import PMU, PSCI, PTRAUTH, SVE, Client, enable_cap, give_vgic, make_vm, name_of

NEW, OLD, A57 = "max-4k-6.12", "max-4k-6.1", "cortex-a57-4k"


def client(host=NEW, features=PSCI, **config):
    vcpu = Client(make_vm(host, **config))
    vcpu.init(features)
    return vcpu


def attempt(vcpu, enc, lsb, value):
    """The errno of putting `value` in a 4-bit field, whose old value comes back."""
    before = vcpu.sys(enc)
    refusal = name_of(vcpu.set_sys, enc, before & ~(0xF << lsb) | value << lsb)
    if not refusal:
        vcpu.set_sys(enc, before)
    return refusal


def accepted(vcpu, enc, lsb):
    return {value for value in range(16) if not attempt(vcpu, enc, lsb, value)}


@pytest.mark.parametrize(
    ("host", "features", "enc", "lsb", "values"),
    [
        (NEW, PSCI, sr.ID_AA64MMFR0_EL1, 0, range(7)),  # PARange
        (A57, PSCI, sr.ID_AA64MMFR0_EL1, 0, range(5)),
        (NEW, PSCI, sr.ID_AA64MMFR0_EL1, 28, {0, 1, *range(8, 16)}),  # TGRAN4 is signed
        (NEW, PSCI, sr.ID_AA64MMFR0_EL1, 20, range(3)),  # TGRAN16 is not
        (NEW, PSCI, sr.ID_AA64MMFR0_EL1, 4, {2}),  # ASIDBits is fixed
        (NEW, PSCI, sr.ID_AA64MMFR0_EL1, 40, {3}),  # and so is TGRAN4_2
        (NEW, PSCI, sr.ID_AA64PFR0_EL1, 0, {0, 1, 2}),
        (NEW, PSCI, sr.ID_AA64PFR0_EL1, 24, {0, 1}),  # GIC
        (NEW, PSCI, sr.ID_AA64PFR0_EL1, 16, {1}),  # FP
        (NEW, PSCI, sr.ID_AA64PFR0_EL1, 28, {2}),  # RAS
        (NEW, PSCI, sr.ID_AA64PFR0_EL1, 32, {0}),  # SVE of a vCPU without
        (NEW, PSCI | SVE, sr.ID_AA64PFR0_EL1, 32, {1}),  # and with
        (NEW, PSCI, sr.ID_AA64PFR1_EL1, 4, {0, 1, 2}),  # SSBS
        (NEW, PSCI, sr.ID_AA64ISAR1_EL1, 4, {0}),  # APA
        (NEW, PSCI | PTRAUTH, sr.ID_AA64ISAR1_EL1, 4, {1}),
        (NEW, PSCI, sr.ID_AA64DFR0_EL1, 0, {6, 7, 8, 9}),  # DebugVer starts at 6
        (NEW, PSCI, sr.ID_AA64DFR0_EL1, 8, {0, 15}),  # PMUVer; 0xf counts as none
        (NEW, PSCI | PMU, sr.ID_AA64DFR0_EL1, 8, {0, 1, 2, 3, 4, 5, 6, 15}),
        (NEW, PSCI, sr.ID_AA64DFR0_EL1, 12, {5}),  # BRPs
        (NEW, PSCI, sr.ID_AA64DFR0_EL1, 20, {0, 1, 2, 3}),  # WRPs
        (NEW, PSCI, sr.ID_AA64DFR0_EL1, 36, {0, *range(8, 16)}),  # DoubleLock is signed
        (NEW, PSCI, sr.ID_AA64ISAR0_EL1, 4, {0, 1, 2}),
        (NEW, PSCI, sr.ID_AA64ISAR0_EL1, 0, {0}),  # no field there
        (NEW, PSCI | PMU, sr.ID_DFR0_EL1, 24, {0, 3, 4, 5, 6, 15}),  # PerfMon
        (NEW, PSCI, sr.CTR_EL0, 16, range(5)),  # DminLine
        (NEW, PSCI, sr.CTR_EL0, 20, {4}),  # ERG is fixed
        (NEW, PSCI, sr.ID_AA64MMFR1_EL1, 8, {0, 1}),
        (NEW, PSCI, sr.ID_AA64AFR0_EL1, 0, {0}),
    ],
)
def test_values_of_a_field(host, features, enc, lsb, values):
    vcpu = client(host, features)
    if (enc, lsb) == (sr.ID_AA64DFR0_EL1, 8):
        # 0xf is taken and stored as 0, so it does not read back as written.
        assert accepted(vcpu, enc, lsb) == set(values)
        return
    expected = set(values)
    if (enc, lsb) == (sr.ID_AA64MMFR1_EL1, 8):
        expected = {vcpu.sys(enc) >> 8 & 0xF}  # VH is fixed
    assert accepted(vcpu, enc, lsb) == expected


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sr.ID_SPACE), st.integers(0, (1 << 64) - 1))
def test_every_register_takes_exactly_the_safe_values(enc, value):
    vcpu = client(features=PSCI | SVE | PMU | PTRAUTH)
    limit, mask = vcpu.sys(enc), vcpu.vm.profile.writable_masks.get(enc, 0)
    value = limit & ~mask | value & mask if value & 1 else value & limit
    refused = name_of(vcpu.set_sys, enc, value)
    known = sysregs_fields.fields(enc) or ()
    safe = all(
        field.value(value) == field.value(limit)
        or (not field.mask & ~mask and field.safe_value(field.value(value), field.value(limit)) == field.value(value))
        for field in known
    )
    rest = (1 << 64) - 1 & ~sum(field.mask for field in known)
    safe = safe and value & rest == limit & rest
    special = enc in (sr.ID_AA64DFR0_EL1, sr.ID_DFR0_EL1)
    assert refused in ("", "EINVAL")
    if not special:
        assert (refused == "") == safe
    assert vcpu.sys(enc) == (value if not refused and not special else vcpu.sys(enc))


def test_a_lowered_register_can_be_raised_again_until_the_vm_runs():
    vcpu = client()
    full = vcpu.sys(sr.ID_AA64MMFR0_EL1)
    vcpu.set_sys(sr.ID_AA64MMFR0_EL1, full & ~0xF)
    vcpu.set_sys(sr.ID_AA64MMFR0_EL1, full)
    vcpu.set_sys(sr.ID_AA64MMFR0_EL1, full & ~0xF | 1)
    vcpu.run_once()
    assert name_of(vcpu.set_sys, sr.ID_AA64MMFR0_EL1, full) == "EBUSY"
    assert name_of(vcpu.set_sys, sr.ID_AA64MMFR0_EL1, full | 0xF) == "EBUSY"
    assert name_of(vcpu.set_sys, sr.ID_AA64MMFR0_EL1, full & ~0xF | 1) == ""
    assert vcpu.vcpu.guest_read(sr.ID_AA64MMFR0_EL1) & 0xF == 1


def test_all_vcpus_of_a_vm_share_the_registers_and_reinit_keeps_them():
    vm = make_vm(NEW)
    first, second = Client(vm, 0), Client(vm, 1)
    first.init(PSCI)
    value = first.sys(sr.ID_AA64ISAR0_EL1) & ~0xF0
    first.set_sys(sr.ID_AA64ISAR0_EL1, value)
    second.init(PSCI)
    first.init(PSCI)
    assert first.sys(sr.ID_AA64ISAR0_EL1) == second.sys(sr.ID_AA64ISAR0_EL1) == value


def test_features_decide_what_is_shown():
    for host in (NEW, OLD):
        plain, full = client(host), client(host, PSCI | SVE | PMU | PTRAUTH)
        for enc, lsb in (
            (sr.ID_AA64PFR0_EL1, 32),
            (sr.ID_AA64ISAR1_EL1, 4),
            (sr.ID_AA64DFR0_EL1, 8),
            (sr.ID_DFR0_EL1, 24),
        ):
            assert plain.sys(enc) >> lsb & 0xF == 0
            assert full.sys(enc) >> lsb & 0xF > 0
        assert plain.sys(sr.ID_AA64ZFR0_EL1) == 0 < full.sys(sr.ID_AA64ZFR0_EL1)
        assert name_of(plain.set_sys, sr.ID_AA64ZFR0_EL1, 1) == "EINVAL"


def test_memory_tagging_shows_once_it_is_enabled():
    vm = make_vm("max-4k-mte")
    assert Client(make_vm("max-4k-mte")).vm.arm.mte is False
    enable_cap(vm, 205)
    vcpu = Client(vm)
    vcpu.init(PSCI)
    assert vcpu.sys(sr.ID_AA64PFR1_EL1) >> 8 & 0xF >= 2
    assert vcpu.sys(sr.TFSR_EL1) == 0x1DE7EC7EDBADC0DE
    assert vcpu.sys(sr.CLIDR_EL1) >> 33


def test_no_gic_in_the_id_registers_of_a_vm_without_one():
    for chip, expected in (("", 0), ("v2", 0), ("v3", 1)):
        vcpu = client()
        give_vgic(vcpu.vm, chip)
        if vcpu.vm.vgic is not None:
            vcpu.vm.vgic.init()
        assert vcpu.sys(sr.ID_AA64PFR0_EL1) >> 24 & 0xF == 1
        vcpu.run_once()
        assert vcpu.sys(sr.ID_AA64PFR0_EL1) >> 24 & 0xF == expected


def test_aarch32_registers_of_a_host_without_aarch32():
    vcpu = client("a64fx-4k", PSCI | PMU)
    assert vcpu.sys(sr.ID_PFR0_EL1) == 0
    assert name_of(vcpu.set_sys, sr.ID_PFR0_EL1, 0xFFFF) == ""
    assert vcpu.sys(sr.ID_PFR0_EL1) == 0
    # The PMU's version is there even so, a slip of the kernel.
    assert vcpu.sys(sr.ID_DFR0_EL1) == 4 << 24


def test_the_old_kernel_changes_two_fields_only():
    vcpu = client(OLD)
    pfr0 = vcpu.sys(sr.ID_AA64PFR0_EL1)
    for enc in (sr.ID_AA64MMFR0_EL1, sr.ID_AA64DFR0_EL1, sr.ID_AA64ISAR0_EL1):
        assert name_of(vcpu.set_sys, enc, vcpu.sys(enc)) == ""
        assert name_of(vcpu.set_sys, enc, vcpu.sys(enc) & ~0xF0F) == "EINVAL"
    for lsb in (56, 60):
        have = pfr0 >> lsb & 0xF
        assert accepted(vcpu, sr.ID_AA64PFR0_EL1, lsb) == set(range(min(have, 1) + 1))
    lower = pfr0 & ~(0xFF << 56)
    vcpu.set_sys(sr.ID_AA64PFR0_EL1, lower)
    assert vcpu.sys(sr.ID_AA64PFR0_EL1) == lower == vcpu.vcpu.guest_read(sr.ID_AA64PFR0_EL1)
    assert name_of(vcpu.set_sys, sr.ID_AA64PFR0_EL1, lower & ~0xF) == "EINVAL"


def test_the_tables_are_the_kernels():
    new = table("6.12")
    assert list(new) == sorted(new)
    assert set(new) | {sr.SPSR_EL1, sr.ELR_EL1, sr.SP_EL1, sr.CNTKCTL_EL12} <= set(sr.SYS_REG_DESCS)
    # What KVM's table has and this one has not: registers of EL2, and what is only trapped from there.
    missing = {sr.name_of(enc) for enc in sr.SYS_REG_DESCS if enc not in new}
    assert {name for name in missing if not name.endswith("_EL2")} == {
        *("SPSR_EL1", "ELR_EL1", "SP_EL1", "CNTKCTL_EL12", "SPSR_irq", "SPSR_abt", "SPSR_und", "SPSR_fiq")
    }
    assert [sr.name_of(enc) for enc in invariants("6.1")] == [
        "MIDR_EL1",
        "REVIDR_EL1",
        "CLIDR_EL1",
        "AIDR_EL1",
        "CTR_EL0",
    ]
    assert len(invariants("6.12")) == 3


@pytest.mark.parametrize("host", [name for name in profile.names() if profile.load(name).arch == "arm64"])
def test_hosts_describe_what_their_kernel_shows(host):
    """Nothing that KVM hides from every guest shows on any host."""
    vcpu = client(host, sum(1 << bit for bit in profile.load(host).features if bit > 1))
    pfr0, pfr1, dfr0 = (vcpu.sys(enc) for enc in (sr.ID_AA64PFR0_EL1, sr.ID_AA64PFR1_EL1, sr.ID_AA64DFR0_EL1))
    assert pfr0 >> 44 & 0xF == 0
    assert pfr1 >> 24 & 0xF == 0
    assert dfr0 >> 32 & 0xF == 0
    assert 6 <= dfr0 & 0xF <= 10

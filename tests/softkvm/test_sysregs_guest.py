"""What a guest's trapped accesses to system registers do; the PMU's registers; SVE registers."""

import pytest

from kvm2.abi import onereg
from kvm2.abi import sysregs as sr

from .vcpus import PMU, PSCI, PTRAUTH, SVE, Client, give_vgic, make_vm, name_of

NEW, OLD, A57 = "max-4k-6.12", "max-4k-6.1", "cortex-a57-4k"
PSTATE = 0x6030000000100042


def client(host=NEW, features=PSCI, **config):
    vcpu = Client(make_vm(host, **config))
    vcpu.init(features)
    return vcpu


def read(vcpu, enc):
    return vcpu.vcpu.guest_read(enc)


def write(vcpu, enc, value):
    return vcpu.vcpu.guest_sysreg(enc, True, value)


@pytest.mark.parametrize("host", [NEW, A57, OLD])
def test_id_registers_read_as_userspace_sees_them_and_cannot_be_written(host):
    vcpu = client(host)
    for enc in (*sr.ID_SPACE, sr.MIDR_EL1, sr.REVIDR_EL1, sr.CTR_EL0, sr.CLIDR_EL1):
        if (host, enc) != (OLD, sr.CTR_EL0):  # there the guest reads the machine's, without IDC made up by Linux
            assert read(vcpu, enc) == vcpu.sys(enc), sr.name_of(enc)
        assert write(vcpu, enc, 0) is None
    assert read(vcpu, sr.MPIDR_EL1) == 0x80000000


@pytest.mark.parametrize("enc", [sr.AMCR_EL0, sr.TRFCR_EL1, sr.PMSCR_EL1, sr.ICC_IAR1_EL1, sr.SCXTNUM_EL1])
def test_what_a_guest_has_not_is_undefined(enc):
    assert read(client(), enc) is None
    assert write(client(), enc, 1) is None


@pytest.mark.parametrize(
    ("features", "enc", "there"),
    [
        (PSCI, sr.PMCR_EL0, False),
        (PSCI | PMU, sr.PMCR_EL0, True),
        (PSCI, sr.ZCR_EL1, False),
        (PSCI, sr.APIAKEYLO_EL1, False),
        (PSCI | PTRAUTH, sr.APIAKEYLO_EL1, False),  # a trap there means that something is wrong
        (PSCI, sr.TFSR_EL1, False),
        (PSCI, sr.enc(3, 0, 15, 0, 0), False),
        (PSCI, sr.HCR_EL2, False),
    ],
)
def test_registers_of_features(features, enc, there):
    assert (read(client(features=features), enc) is not None) == there


def test_debug_registers_and_the_os_lock():
    vcpu = client()
    for enc in (sr.MDRAR_EL1, sr.OSDLR_EL1, sr.DBGPRCR_EL1, sr.ERRIDR_EL1, sr.PMMIR_EL1):
        assert (write(vcpu, enc, 5), read(vcpu, enc)) == (0, 0)
    assert write(vcpu, sr.MDSCR_EL1, 0x8000) == 0
    assert read(vcpu, sr.MDSCR_EL1) == vcpu.sys(sr.MDSCR_EL1) == 0x8000
    assert read(vcpu, sr.OSLAR_EL1) is None
    for lock, expected in ((1, 10), (0, 8), (3, 10)):
        assert write(vcpu, sr.OSLAR_EL1, lock) == 0
        assert read(vcpu, sr.OSLSR_EL1) == expected
    assert write(vcpu, sr.OSLSR_EL1, 0) is None


def test_limited_ordering_regions_came_with_armv8_1():
    new, old = client(), client(A57)
    assert (read(new, sr.LORC_EL1), write(new, sr.LORC_EL1, 1), read(new, sr.LORID_EL1)) == (0, 0, 0)
    assert write(new, sr.LORID_EL1, 1) is None
    assert read(old, sr.LORC_EL1) is None


def test_cache_registers_follow_csselr():
    vcpu = client()
    vcpu.set(onereg.ccsidr(1), 0x703FE01A)
    for select, expected in ((0, 2), (1, 0x703FE01A), (0xFFF1, 0x703FE01A), (15, 0)):
        write(vcpu, sr.CSSELR_EL1, select)
        assert read(vcpu, sr.CCSIDR_EL1) == expected
    old = client(OLD)
    write(old, sr.CSSELR_EL1, 0)
    assert read(old, sr.CCSIDR_EL1) == old.get(onereg.ccsidr(0)) & ~0xFFFFFF8
    write(old, sr.CSSELR_EL1, 1)
    assert read(old, sr.CCSIDR_EL1) == old.get(onereg.ccsidr(1))


def test_actlr_and_set_way_maintenance():
    vcpu = client()
    before = read(vcpu, sr.ACTLR_EL1)
    assert write(vcpu, sr.ACTLR_EL1, before + 1) == 0
    assert read(vcpu, sr.ACTLR_EL1) == before
    for crm in (6, 10, 14):
        assert write(vcpu, sr.enc(1, 0, 7, crm, 2), 0) == 0
        assert write(vcpu, sr.enc(1, 0, 7, crm, 4), 0) is None
        assert read(vcpu, sr.enc(1, 0, 7, crm, 2)) is None


def test_the_gics_system_registers():
    vcpu = client()
    assert (read(vcpu, sr.ICC_SRE_EL1), read(client("max-4k-gicv2"), sr.ICC_SRE_EL1)) == (7, None)  # the host's own
    give_vgic(vcpu.vm, "v3")
    assert (read(vcpu, sr.ICC_SRE_EL1), write(vcpu, sr.ICC_SRE_EL1, 0), write(vcpu, sr.ICC_SGI1R_EL1, 1)) == (7, 0, 0)
    assert read(vcpu, sr.ICC_SGI1R_EL1) is None


def test_the_physical_timer():
    vcpu = client()
    now = read(vcpu, sr.CNTPCT_EL0)
    assert write(vcpu, sr.CNTPCT_EL0, 0) is None
    write(vcpu, sr.CNTP_TVAL_EL0, 1 << 30)
    assert 0 <= read(vcpu, sr.CNTP_CVAL_EL0) - now - (1 << 30) < 1 << 29
    assert 0 < read(vcpu, sr.CNTP_TVAL_EL0) <= 1 << 30
    write(vcpu, sr.CNTP_CTL_EL0, 7)
    assert read(vcpu, sr.CNTP_CTL_EL0) == 3
    write(vcpu, sr.CNTP_TVAL_EL0, 0xFFFFFFFF)  # -1
    assert read(vcpu, sr.CNTP_CTL_EL0) == 7


def test_pmcr_has_the_vms_number_of_counters():
    vcpu = client(features=PSCI | PMU)
    assert vcpu.sys(sr.PMCR_EL0) >> 11 & 31 == 6
    vcpu.set_sys(sr.PMCR_EL0, 3 << 11 | 0xFFFF0001)
    assert vcpu.sys(sr.PMCR_EL0) == 3 << 11 | 1
    vcpu.set_sys(sr.PMCR_EL0, 7 << 11)  # more than the host has: not taken
    assert vcpu.sys(sr.PMCR_EL0) == 3 << 11
    vcpu.set_sys(sr.PMCNTENSET_EL0, 0xFFFFFFFF)
    assert vcpu.sys(sr.PMCNTENCLR_EL0) == 0x80000007
    vcpu.set_sys(sr.PMCNTENCLR_EL0, 1)
    assert vcpu.sys(sr.PMCNTENSET_EL0) == 0x80000006
    vcpu.vm.ran = True
    vcpu.set_sys(sr.PMCR_EL0, 2 << 11)
    assert vcpu.sys(sr.PMCR_EL0) >> 11 == 3


def test_pmcr_without_aarch32_counts_long_cycles():
    assert client("a64fx-4k", PSCI | PMU).sys(sr.PMCR_EL0) & 0x40
    assert not client(features=PSCI | PMU).sys(sr.PMCR_EL0) & 0x40


def test_the_guests_pmu():
    vcpu = client(features=PSCI | PMU)
    vcpu.run_once()
    assert write(vcpu, sr.PMCR_EL0, 0xFF) == 0
    assert read(vcpu, sr.PMCR_EL0) & 0xFF == 0xF9  # P and C act, and read as zero
    assert read(vcpu, sr.PMCCNTR_EL0) == read(vcpu, sr.ARRAYS["PMEVCNTR5_EL0"]) == 0
    event_counter, event_type = sr.ARRAYS["PMEVCNTR2_EL0"], sr.ARRAYS["PMEVTYPER2_EL0"]
    assert write(vcpu, event_type, 0xFFFFFFFF) == 0
    assert read(vcpu, event_type) == 0xC800FFFF
    write(vcpu, sr.PMSELR_EL0, 2)
    assert read(vcpu, sr.PMXEVTYPER_EL0) == 0xC800FFFF
    assert read(vcpu, sr.ARRAYS["PMEVCNTR6_EL0"]) is None  # there are six
    write(vcpu, sr.PMSELR_EL0, 31)
    assert read(vcpu, sr.PMXEVTYPER_EL0) == vcpu.sys(sr.PMCCFILTR_EL0)
    write(vcpu, event_counter, 0xFFFFFFFF)
    write(vcpu, event_type, 0)
    write(vcpu, sr.PMCNTENSET_EL0, 4)
    write(vcpu, sr.PMCR_EL0, 1)
    assert write(vcpu, sr.PMSWINC_EL0, 4) == 0
    assert read(vcpu, sr.PMSWINC_EL0) is None
    assert read(vcpu, sr.PMOVSSET_EL0) & 4


def test_el0_uses_the_pmu_as_far_as_el1_lets_it():
    vcpu = client(features=PSCI | PMU)
    write(vcpu, sr.PMUSERENR_EL0, 0)
    vcpu.set(PSTATE, 0)
    for enc in (sr.PMCR_EL0, sr.PMCCNTR_EL0, sr.PMSELR_EL0, sr.PMINTENSET_EL1, sr.PMCEID0_EL0):
        assert read(vcpu, enc) is None
    assert write(vcpu, sr.PMUSERENR_EL0, 15) is None
    vcpu.vcpu.state.sys[sr.PMUSERENR_EL0] = 4
    assert read(vcpu, sr.PMCCNTR_EL0) is not None
    assert write(vcpu, sr.PMCCNTR_EL0, 0) is None
    vcpu.vcpu.state.sys[sr.PMUSERENR_EL0] = 1
    assert read(vcpu, sr.PMCR_EL0) is not None
    assert read(vcpu, sr.PMINTENSET_EL1) is None


def test_the_old_kernels_pmu_is_plain():
    vcpu = client(OLD, PSCI | PMU)
    assert vcpu.sys(sr.PMCR_EL0) == 0x410130AC
    vcpu.set_sys(sr.PMCNTENCLR_EL0, 0xFFFF)
    assert vcpu.sys(sr.PMCNTENSET_EL0) == 0xFFFF
    vcpu.set_sys(sr.PMCR_EL0, 5)
    assert vcpu.sys(sr.PMCR_EL0) == 5


def test_sve_registers_are_as_wide_as_the_set():
    vcpu = client(features=PSCI | SVE)
    vcpu.set(onereg.KVM_REG_ARM64_SVE_VLS, 0b111)
    vcpu.finalize()
    vcpu.set(onereg.sve_z(31), b"\xaa" * 256)
    vcpu.set(onereg.sve_p(15), b"\xbb" * 32)
    vcpu.set(onereg.sve_ffr(), b"\xcc" * 32)
    assert vcpu.get_bytes(onereg.sve_z(31)) == b"\xaa" * 48 + bytes(208)
    assert vcpu.get_bytes(onereg.sve_p(15)) == b"\xbb" * 6 + bytes(26)
    assert vcpu.get_bytes(onereg.sve_ffr()) == b"\xcc" * 6 + bytes(26)
    vcpu.init(PSCI | SVE)
    assert vcpu.get(onereg.KVM_REG_ARM64_SVE_VLS) == 0b111
    assert vcpu.get_bytes(onereg.sve_z(31)) == vcpu.get_bytes(onereg.sve_z(0)) == bytes(256)
    for id_, expected in (
        (onereg.sve_z(0, 1), "ENOENT"),
        (0x6080000000150400, "EINVAL"),
        (0x6060000000150000, "EINVAL"),
        (0x607000000015FFFF, "EINVAL"),
        (onereg.sve_ffr(1), "ENOENT"),
        (0x6050000000150620, "EINVAL"),
    ):
        assert name_of(vcpu.get, id_) == expected


def test_a_vm_with_a_set_of_its_own_finalises_at_init():
    vcpu = client(features=PSCI | SVE, sve_vls=(0b11, *(0,) * 7), made_by_vm2=True)
    assert vcpu.get(onereg.KVM_REG_ARM64_SVE_VLS) == 0b11
    assert name_of(vcpu.set, onereg.KVM_REG_ARM64_SVE_VLS, 0b11) == name_of(vcpu.finalize) == "EPERM"
    vcpu.vcpu.check_runnable()
    vcpu.set(onereg.sve_z(0), b"\1" * 256)
    vcpu.init(PSCI | SVE)
    assert vcpu.get_bytes(onereg.sve_z(0)) == bytes(256)
    plain = client(sve_vls=(0b11, *(0,) * 7), made_by_vm2=True)
    assert name_of(plain.get, onereg.KVM_REG_ARM64_SVE_VLS) == "ENOENT"


def test_a_reinit_forgets_a_vls_that_was_written():
    vcpu = client(features=PSCI | SVE, needs_set_sve_vls=True, made_by_vm2=True)
    assert name_of(vcpu.finalize) == "EPERM"
    vcpu.set(onereg.KVM_REG_ARM64_SVE_VLS, 1)
    vcpu.init(PSCI | SVE)
    assert vcpu.get(onereg.KVM_REG_ARM64_SVE_VLS) == 0xFFFF
    assert name_of(vcpu.finalize) == "EPERM"
    vcpu.set(onereg.KVM_REG_ARM64_SVE_VLS, 0xFFFF)
    vcpu.finalize()


def test_vcpus_of_a_vm_may_have_different_sets():
    vm = make_vm(NEW)
    first, second = Client(vm, 0), Client(vm, 1)
    first.init(PSCI | SVE)
    second.init(PSCI | SVE)
    first.set(onereg.KVM_REG_ARM64_SVE_VLS, 1)
    assert second.get(onereg.KVM_REG_ARM64_SVE_VLS) == 0xFFFF

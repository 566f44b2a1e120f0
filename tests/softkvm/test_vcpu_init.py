"""KVM_ARM_VCPU_INIT: order of checks, features of a VM and of a vCPU, what a reset keeps."""

import errno

import pytest

from kvm2.abi import sysregs as sr
from kvm2.errors import KvmError
from kvm2.softkvm import profile

from .vcpus import AARCH32, BASE, PMU, POWER_OFF, PSCI, PTRAUTH, SVE, Client, enable_cap, make_vm, name_of

NEW, OLD = "max-4k-6.12", "max-4k-6.1"


def client(host=NEW, **config):
    return Client(make_vm(host, **config))


@pytest.mark.parametrize(
    ("host", "target", "features", "expected"),
    [
        (NEW, 5, 0, ""),
        (NEW, 6, 0, "EINVAL"),
        (NEW, 2, 0, "EINVAL"),
        (NEW, 6, 1 << 31, "EINVAL"),  # the target is looked at first
        (NEW, 5, 1 << 7, "ENOENT"),
        (NEW, 5, 1 << 31, "ENOENT"),
        (NEW, 5, 1 << 7 | 1 << 5, "ENOENT"),  # unknown before unpaired
        (NEW, 5, 1 << 5, "EINVAL"),
        (NEW, 5, 1 << 6, "EINVAL"),
        (NEW, 5, 3 << 5, ""),
        ("neoverse-n1-4k", 5, AARCH32, "EINVAL"),
        (NEW, 5, POWER_OFF, ""),
        ("cortex-a57-4k", 2, PSCI, ""),
        ("cortex-a57-4k", 5, AARCH32, ""),
        ("cortex-a57-4k", 5, SVE, "EINVAL"),
        ("cortex-a57-4k", 4, PSCI, "EINVAL"),
        ("a57-4k-6.1", 5, PSCI, "EINVAL"),
        ("a57-4k-6.1", 2, PSCI, ""),
        (OLD, 5, 1 << 7, "ENOENT"),
        (OLD, 5, 1 << 5, "EINVAL"),
    ],
)
def test_checks_in_the_kernels_order(host, target, features, expected):
    vcpu = client(host)
    assert name_of(vcpu.init, features, target) == expected
    assert vcpu.vcpu.initialized == (expected == "")


@pytest.mark.parametrize("host", [NEW, OLD])
@pytest.mark.parametrize("word", range(1, 7))
def test_a_bit_in_another_word_is_unknown(host, word):
    words = [0] * 6
    words[word - 1] = 1
    assert name_of(client(host).init, PSCI, None, words) == "ENOENT"


def test_a_failed_first_init_can_be_tried_again():
    for host in (NEW, OLD):
        vcpu = client(host)
        assert name_of(vcpu.init, 1 << 5) == "EINVAL"
        assert name_of(vcpu.get, 0x6030000000100000) == "ENOEXEC"
        vcpu.init(PSCI)
        assert vcpu.vcpu.features == PSCI


def test_the_old_kernel_keeps_bits_before_an_unknown_one():
    vcpu = client(OLD)
    assert name_of(vcpu.init, PSCI | 1 << 8) == "ENOENT"
    vcpu.init(0)
    assert vcpu.vcpu.features == PSCI


def test_features_are_the_vms_now_and_were_the_vcpus():
    for host, expected in ((NEW, "EINVAL"), (OLD, "")):
        vm = make_vm(host)
        first, second = Client(vm, 0), Client(vm, 1)
        first.init(PSCI | SVE)
        assert name_of(second.init, PSCI) == expected
        assert name_of(first.init, PSCI) == "EINVAL"
        second.init(PSCI | SVE if expected else PSCI)


def test_power_off_is_not_a_feature_now_and_was_one():
    for host, expected in ((NEW, ""), (OLD, "EINVAL")):
        vcpu = client(host)
        vcpu.init(PSCI | POWER_OFF)
        assert vcpu.mp_state() == 5
        assert name_of(vcpu.init, PSCI) == expected
        assert vcpu.mp_state() == (5 if expected else 0)


def test_aarch32_and_memory_tagging_exclude_each_other():
    vm = make_vm("max-4k-mte")
    enable_cap(vm, 205)
    vcpu = Client(vm)
    Client(make_vm("max-4k-mte")).init(AARCH32)
    assert name_of(vcpu.init, AARCH32) == "EINVAL"
    vcpu.init(PSCI)
    assert vcpu.sys(sr.ID_AA64PFR1_EL1) >> 8 & 0xF == 3


def test_all_vcpus_of_an_old_vm_have_one_register_width():
    vm = make_vm("a57-4k-6.1")
    Client(vm, 0).init(PSCI)
    assert name_of(Client(vm, 1).init, PSCI | AARCH32) == "EINVAL"


def test_a_reset_keeps_what_the_kernel_keeps():
    vcpu = client()
    vcpu.init(PSCI)
    core = 0x6030000000100000
    kept = {core | 68: 1, core | 70: 2, core | 72: 3}  # SP_EL1, ELR_EL1, SPSR_EL1
    lost = {core: 4, core | 64: 5, core | 74: 6, 0x60400000001000D0: 7, 0x60200000001000D5: 8}
    for id_, value in (kept | lost).items():
        vcpu.set(id_, value)
    vcpu.set_sys(sr.MPIDR_EL1, 0x80000005)
    vcpu.set_sys(sr.TTBR0_EL1, 9)
    vcpu.init(PSCI)
    assert [vcpu.get(id_) for id_ in kept] == list(kept.values())
    assert [vcpu.get(id_) for id_ in lost] == [0] * len(lost)
    assert vcpu.sys(sr.MPIDR_EL1) == 0x80000005
    assert vcpu.sys(sr.TTBR0_EL1) == 0x1DE7EC7EDBADC0DE
    assert vcpu.get(core | 66) == 0x3C5


def test_the_old_kernel_resets_mpidr_each_time():
    vcpu = client(OLD)
    vcpu.init(PSCI)
    vcpu.set_sys(sr.MPIDR_EL1, 0x80000005)
    vcpu.init(PSCI)
    assert vcpu.sys(sr.MPIDR_EL1) == 0x80000000


def test_an_aarch32_vcpu_starts_in_supervisor_mode():
    vcpu = client("cortex-a57-4k")
    vcpu.init(PSCI | AARCH32)
    assert vcpu.get(0x6030000000100042) == 0x1D3


def test_a_vm2_without_sve_refuses_the_feature_and_says_what_to_do():
    vcpu = client(made_by_vm2=True, sve_allowed=False)
    with pytest.raises(KvmError, match="VCPU_NEEDS_SET_SVE_VLS") as refusal:
        vcpu.init(PSCI | SVE)
    assert refusal.value.errno == errno.EINVAL
    vcpu.init(PSCI)


@pytest.mark.parametrize(("bits", "code"), [(32, 0), (35, 0), (36, 1), (41, 2), (47, 4), (48, 5), (51, 5), (52, 6)])
def test_parange_follows_the_ipa_size_where_creation_says_so(bits, code):
    for follows in (True, False):
        vcpu = client(ipa_bits=bits, parange_follows_ipa=follows)
        vcpu.init(PSCI)
        assert vcpu.sys(sr.ID_AA64MMFR0_EL1) & 0xF == (code if follows else 6)
        assert vcpu.vcpu.guest_read(sr.ID_AA64MMFR0_EL1) == vcpu.sys(sr.ID_AA64MMFR0_EL1)


def test_parange_never_follows_above_the_hosts():
    vcpu = client("cortex-a53-4k", ipa_bits=40, parange_follows_ipa=True)
    vcpu.init(PSCI)
    assert vcpu.sys(sr.ID_AA64MMFR0_EL1) & 0xF == 2


def test_unreadable_arguments_are_efault():
    vcpu = client()
    assert name_of(vcpu.vcpu.vcpu_init, 16) == "EFAULT"
    assert name_of(vcpu.vcpu.finalize, 16) == "ENOEXEC"
    assert name_of(vcpu.vcpu.get_one_reg, 16) == "ENOEXEC"
    vcpu.init(PSCI)
    for call in (vcpu.vcpu.finalize, vcpu.vcpu.get_one_reg, vcpu.vcpu.set_one_reg, vcpu.vcpu.get_reg_list):
        assert name_of(call, 16) == "EFAULT"
    assert name_of(vcpu.vcpu.get_mp_state, 16) == name_of(vcpu.vcpu.set_mp_state, 16) == "EFAULT"


def test_mp_state_takes_three_values():
    vcpu = client()
    for value in (0, 5, 10):
        vcpu.set_mp_state(value)
        assert vcpu.mp_state() == value
    for value in (1, 3, 9, 11, 0xFFFFFFFF):
        assert name_of(vcpu.set_mp_state, value) == "EINVAL"


def test_a_vcpu_has_no_capabilities_to_enable():
    assert name_of(client().vcpu.enable_cap, BASE) == "EINVAL"


@pytest.mark.parametrize("host", [name for name in profile.names() if profile.load(name).arch == "arm64"])
def test_every_described_host_initialises_a_vcpu_with_all_it_has(host):
    features = sum(1 << bit for bit in profile.load(host).features if bit > 1)
    vcpu = client(host)
    vcpu.init(features)
    if features & SVE:
        vcpu.finalize()
    count = 259 + 64 * bool(features & PMU) + 10 * bool(features & PTRAUTH)
    ids = vcpu.reg_list()
    assert len(set(ids)) == len(ids)
    if profile.load(host).kernel == "6.12":
        sve = 19 if features & SVE else 0  # 50 SVE registers and ZCR_EL1, and 32 V registers less
        assert len(ids) == count + sve + 10 * bool(features & PMU)
    for id_ in ids:
        value = vcpu.get_bytes(id_)
        if id_ not in (0x606000000015FFFF, 0x6030000000140000):
            vcpu.set(id_, value)

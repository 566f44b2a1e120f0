"""KVM_CREATE_VM2 on described hosts: what a VM becomes, and every reason why it does not."""

import errno
from dataclasses import replace

import pytest

from kvm2.abi import vm2
from kvm2.abi.findings import NO_ATTR, Finding
from kvm2.errors import KvmError
from kvm2.softkvm import creation, profile
from kvm2.softkvm.vmconfig import Configuring, VmConfig

from ..memory_image import LIST, list_image

SET_LENGTHS, FOLLOW = 1, 2
SKIP_UNKNOWN, SKIP_UNSUPPORTED = 1, 2
BIG, M1, PROTECTED = "max-4k-6.12", "apple-m1", "max-4k-protected"


def host(name):
    return profile.load(name) if isinstance(name, str) else name


def create(name, *attrs):
    return creation.create_vm2(host(name), list_image(*(a.pack() for a in attrs)), LIST)


def refused(name, *attrs):
    with pytest.raises(KvmError) as caught:
        create(name, *attrs)
    return caught.value


def errors(error):
    assert error.errno == next(f.error for f in error.findings if f.error)
    return [(f.attr_index, f.attr_type, f.name, f.offset) for f in error.findings]


def bits(n):
    return vm2.Arm64PhysaddrSize(physaddr_bits=n)


def shift(n, flags=0):
    return vm2.Arm64Granule(page_shift=n, flags=flags)


def caps(word, flags=0):
    return vm2.ArchCapabilities(capabilities=(word,), flags=flags)


def lengths(*words, flags=0):
    return vm2.Arm64SveVls(vls=words + (0,) * (8 - len(words)), flags=flags)


# ---- what a VM becomes


def test_defaults():
    assert create(BIG) == VmConfig(40, 12, max_vcpus=512, max_vcpu_id=512, made_by_vm2=True)


def test_everything_at_once():
    config = create(BIG, shift(14), vm2.MaxVcpus(max_vcpus=3), bits(47), lengths(0xFF), caps(FOLLOW), vm2.MachineType())
    vls = (0xFF, 0, 0, 0, 0, 0, 0, 0)
    assert config == VmConfig(47, 14, 0, False, True, vls, 3, 3, True, True)


def test_vcpus_that_set_their_lengths():
    config = create(BIG, caps(SET_LENGTHS))
    assert config.needs_set_sve_vls and config.sve_allowed and config.sve_vls is None


def test_without_a_word_there_is_no_sve():
    assert not create(BIG, bits(48)).sve_allowed


@pytest.mark.parametrize("attr", [bits(0), shift(0), vm2.MaxVcpus(), vm2.MachineType(), caps(0)])
def test_zero_is_the_default(attr):
    assert create(BIG, attr) == create(BIG)


@pytest.mark.parametrize("name", ["max-4k-6.12", "max-16k-6.12", "max-4k-nolpa2", "neoverse-n1-64k", M1, "armv8-32"])
def test_every_size_up_to_the_limit_and_none_beyond(name):
    limit = host(name).ipa_limit
    for n in range(32, 65):
        if n <= limit:
            assert create(name, bits(n)).ipa_bits == n
        else:
            assert refused(name, bits(n)).errno == errno.EOPNOTSUPP


# ---- attribute 2


def test_the_default_on_a_36_bit_host():
    error = refused(M1)
    assert errors(error) == [(NO_ATTR, 2, "EOPNOTSUPP", 4)]
    assert str(error.findings[0]) == (
        "physaddr_bits = 40 (default): this host allows 32..36 (PARange 0b0001); ask for 36 or fewer, or use 'auto'"
    )
    assert error.findings[0].path == "physaddr_bits"


def test_the_default_asked_for_on_a_36_bit_host():
    error = refused(M1, bits(0))
    assert errors(error) == [(0, 2, "EOPNOTSUPP", 4)]
    assert error.findings[0].path == "attrs[0].physaddr_bits"
    assert error.findings[0].value == 40


def test_48_bits_on_a_36_bit_host():
    (finding,) = refused(M1, bits(48)).findings
    assert (finding.value, finding.min, finding.max) == (48, 32, 36)
    assert finding.mask == 0b11111 << 32


def test_more_than_48_bits_needs_lpa2_or_64k():
    assert errors(refused("max-4k-nolpa2", bits(49))) == [(0, 2, "EOPNOTSUPP", 4)]
    assert "4K granule without LPA2" in str(refused("max-4k-nolpa2", bits(49)))
    assert create("max-4k-nolpa2", bits(52), shift(16)).page_shift == 16
    assert errors(refused("max-4k-nolpa2", bits(52), shift(14))) == [(0, 2, "EOPNOTSUPP", 4)]
    assert create("armv9-64k-52", bits(52)).ipa_bits == 52
    assert errors(refused("armv9-64k-52", shift(12), bits(52))) == [(1, 2, "EOPNOTSUPP", 4)]


def test_more_than_any_granule_reaches_is_the_values_own_fault():
    """It stands where the entry stands, before a cross-check of another attribute would."""
    error = refused("max-4k-nolpa2", bits(53), shift(13))
    assert errors(error) == [(0, 2, "EOPNOTSUPP", 4), (1, 8, "EINVAL", 8)]
    error = refused("max-4k-nolpa2", bits(52), shift(13))
    assert errors(error) == [(1, 8, "EINVAL", 8)]


def test_a_refused_size_is_not_refused_again_as_a_default():
    assert errors(refused(M1, bits(7))) == [(0, 2, "EINVAL", 4)]
    assert errors(refused(M1, bits(37))) == [(0, 2, "EOPNOTSUPP", 4)]
    assert errors(refused(M1, bits(36), bits(37))) == [(1, 2, "EEXIST", 0)]


@pytest.mark.parametrize("n", [32, 36, 40, 48, 51])
def test_a_protected_host_takes_its_limit_only(n):
    (finding,) = refused(PROTECTED, bits(n)).findings
    assert (finding.error, finding.min, finding.max, finding.mask) == (errno.EOPNOTSUPP, 52, 52, 1 << 52)
    assert finding.hint == "ask for 52, or use 'auto'"


def test_a_protected_host_and_its_limit():
    assert create(PROTECTED, bits(52)).ipa_bits == 52
    assert errors(refused(PROTECTED)) == [(NO_ATTR, 2, "EOPNOTSUPP", 4)]


# ---- attribute 8


def test_a_granule_that_the_mmu_has_not():
    (finding,) = refused("cortex-a57-4k", shift(14)).findings
    assert (finding.error, finding.offset, finding.value) == (errno.EOPNOTSUPP, 8, 14)
    assert (finding.min, finding.max, finding.mask) == (12, 16, 1 << 12 | 1 << 16)


def test_an_optional_granule():
    assert create("cortex-a57-4k", shift(14, SKIP_UNSUPPORTED)).page_shift == 12


def test_an_optional_granule_yields_to_the_size():
    config = create("armv9-64k-52", bits(52), shift(12, SKIP_UNSUPPORTED))
    assert (config.ipa_bits, config.page_shift) == (52, 16)


def test_an_optional_granule_cannot_help_a_size_that_is_too_large():
    assert errors(refused("armv9-64k-52", bits(53), shift(12, SKIP_UNSUPPORTED))) == [(0, 2, "EOPNOTSUPP", 4)]


# ---- attributes 1 and 7


@pytest.mark.parametrize("word", [4, 1 << 63, 7])
def test_unknown_capabilities(word):
    (finding,) = refused(BIG, caps(word)).findings
    assert (finding.error, finding.offset, finding.value, finding.mask) == (errno.EOPNOTSUPP, 8, word, 3)


def test_setting_lengths_without_sve():
    (finding,) = refused("max-4k-nosve", caps(SET_LENGTHS)).findings
    assert (finding.error, finding.mask) == (errno.EOPNOTSUPP, 2)
    assert "no SVE" in finding.message


def test_an_optional_capability_word_is_dropped_as_a_whole():
    config = create("max-4k-nosve", caps(SET_LENGTHS | FOLLOW, SKIP_UNSUPPORTED))
    assert not config.needs_set_sve_vls and not config.parange_follows_ipa


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("max-4k-6.12", [(1 << n) - 1 for n in range(1, 17)]),
        ("max-4k-pow2vl", [1, 3, 0xB]),
        ("a64fx-4k", [1, 3, 0xB]),
        ("max-4k-vl128", [1]),
        ("max-4k-nosve", []),
    ],
)
def test_sets_of_lengths_that_can_be_had(name, sets):
    for word in range(1, 1 << 9):
        if word in sets:
            assert create(name, lengths(word)).sve_vls[0] == word
        else:
            (finding,) = refused(name, lengths(word)).findings
            assert (finding.error, finding.offset, finding.value) == (errno.EOPNOTSUPP, 8, word)
            assert finding.mask == (sets[-1] if sets else 0)
    for word in sets:
        assert create(name, lengths(word)).sve_vls[0] == word


def test_the_finding_lists_the_sets():
    (finding,) = refused("a64fx-4k", lengths(7)).findings
    assert finding.message == "vls[0] = 0x7: vls[0] can be 0x1, 0x3, 0xb"
    assert len(refused(BIG, lengths(2)).findings[0].message) < 144


@pytest.mark.parametrize("word", range(1, 8))
def test_lengths_beyond_the_first_word(word):
    words = [1] + [0] * 7
    words[word] = 1
    (finding,) = refused(BIG, lengths(*words)).findings
    assert (finding.error, finding.offset) == (errno.EOPNOTSUPP, 8 + 8 * word)


def test_optional_lengths():
    config = create("max-4k-nosve", lengths(1, flags=SKIP_UNSUPPORTED))
    assert config.sve_vls is None and not config.sve_allowed


def test_no_lengths_are_never_skipped():
    assert errors(refused("max-4k-nosve", lengths(0, flags=3))) == [(0, 7, "EINVAL", 8)]


def test_one_set_for_all_and_each_its_own():
    error = refused(BIG, lengths(1), caps(SET_LENGTHS))
    assert errors(error) == [(1, 1, "EINVAL", 8)]
    assert create(BIG, lengths(1), caps(FOLLOW)).sve_vls


# ---- attributes 6 and 9


@pytest.mark.parametrize("value", [1, 2, 3, 40, 64, 1 << 63])
def test_machine_types_of_arm64(value):
    (finding,) = refused(BIG, vm2.MachineType(machine_type=value)).findings
    assert (finding.error, finding.offset, finding.value, finding.mask) == (errno.EOPNOTSUPP, 8, value, 1)


def test_an_optional_machine_type():
    assert create(BIG, vm2.MachineType(machine_type=1, flags=SKIP_UNSUPPORTED)).machine_type == 0


@pytest.mark.parametrize(("name", "most"), [(BIG, 512), ("max-4k-gicv2", 8)])
def test_vcpus(name, most):
    for number in (1, 2, most):
        config = create(name, vm2.MaxVcpus(max_vcpus=number))
        assert (config.max_vcpus, config.max_vcpu_id) == (number, number)
    for number in (most + 1, 0xFFFFFFFF):
        (finding,) = refused(name, vm2.MaxVcpus(max_vcpus=number)).findings
        assert (finding.error, finding.offset, finding.min, finding.max) == (errno.EOPNOTSUPP, 8, 1, most)


# ---- attributes 4 and 5


def test_dry_run():
    assert create(BIG, vm2.DryRun()) == 0
    assert refused(M1, vm2.DryRun()).errno == errno.EOPNOTSUPP


def test_negotiate():
    state = create(M1, vm2.Negotiate())
    assert isinstance(state, Configuring)
    assert state.config.ipa_bits == 40  # which COMMIT will refuse


def test_dry_run_with_negotiate():
    error = refused(BIG, vm2.Negotiate(), vm2.DryRun())
    assert errors(error) == [(1, 4, "EINVAL", 0)]


def test_negotiate_checks_values_alone():
    assert errors(refused(M1, vm2.Negotiate(), bits(37))) == [(1, 2, "EOPNOTSUPP", 4)]
    assert isinstance(create(BIG, vm2.Negotiate(), lengths(1), caps(SET_LENGTHS)), Configuring)
    assert isinstance(create("max-4k-nolpa2", vm2.Negotiate(), bits(52), shift(12)), Configuring)


# ---- order


def test_findings_in_the_order_of_the_interface():
    error = refused(M1, shift(16), vm2.MaxVcpus(max_vcpus=9999, pad=1), caps(SET_LENGTHS), bits(48))
    assert errors(error) == [
        (0, 8, "EOPNOTSUPP", 8),
        (1, 9, "EINVAL", 12),
        (2, 1, "EOPNOTSUPP", 8),
        (3, 2, "EOPNOTSUPP", 4),
    ]


def test_cross_checks_come_last_by_type():
    error = refused(BIG, vm2.Negotiate(), vm2.DryRun(), vm2.MaxVcpus(max_vcpus=9999))
    assert errors(error) == [(2, 9, "EOPNOTSUPP", 8), (1, 4, "EINVAL", 0)]
    error = refused(M1, caps(SET_LENGTHS, 0), vm2.MaxVcpus(max_vcpus=9999))
    assert errors(error)[-1] == (NO_ATTR, 2, "EOPNOTSUPP", 4)


def test_a_note_is_no_reason():
    unknown = vm2.AttrHdr(type=77, size=8, flags=SKIP_UNKNOWN)
    assert create(BIG, unknown) == create(BIG)


# ---- hosts of other architectures, hosts without the call


@pytest.mark.parametrize("name", ["x86-64", "s390x", "powerpc"])
def test_other_architectures(name):
    config = create(name, vm2.MaxVcpus(max_vcpus=2), caps(0))
    assert (config.ipa_bits, config.max_vcpus, config.max_vcpu_id, config.arch) == (0, 2, 2, host(name).arch)
    default = create(name)
    assert (default.max_vcpus, default.max_vcpu_id) == (host(name).max_vcpus, host(name).max_vcpu_id)
    for attr in (bits(40), lengths(1), shift(12)):
        assert errors(refused(name, attr)) == [(0, attr.type, "ENOENT", 0)]
    assert errors(refused(name, caps(1))) == [(0, 1, "EOPNOTSUPP", 8)]


@pytest.mark.parametrize(
    ("name", "fine", "wrong"),
    [
        ("x86-64", [0, 1], [2, 4, 31, 32, 64, 1 << 63]),
        ("x86-64-snp", [0, 2, 3, 4], [1, 5, 64]),
        ("s390x", [0, 1], [2, 3, 1 << 63]),
        ("powerpc", [0, 1, 2], [3, 64]),
    ],
)
def test_their_machine_types(name, fine, wrong):
    for value in fine:
        assert create(name, vm2.MachineType(machine_type=value)).machine_type == value
    for value in wrong:
        assert errors(refused(name, vm2.MachineType(machine_type=value))) == [(0, 6, "EOPNOTSUPP", 8)]


@pytest.mark.parametrize("name", ["mainline-6.12", "mainline-m1", "vm2-fixed-only"])
def test_hosts_without_the_call_answer_a_bare_einval(name):
    with pytest.raises(KvmError) as caught:
        creation.create_vm2(host(name), list_image(), LIST)
    assert (caught.value.errno, caught.value.findings) == (errno.EINVAL, ())


def test_negotiate_is_unknown_to_a_host_without_negotiation():
    assert errors(refused("vm2-list-only", vm2.Negotiate())) == [(0, 5, "ENOENT", 0)]


def test_a_host_that_is_made_up():
    odd = replace(host(BIG), name="odd", sve_vqs=(2, 3, 16), max_vcpus=1)
    assert create(odd, lengths(0b110)).sve_vls[0] == 0b110
    assert refused(odd, lengths(0b111)).findings == (
        Finding(0, 7, errno.EOPNOTSUPP, 8, 7, 2, 0x8006, 0x8006, "vls[0] = 0x7: vls[0] can be 0x2, 0x6, 0x8006"),
    )
    assert refused(odd, vm2.MaxVcpus(max_vcpus=2)).errno == errno.EOPNOTSUPP

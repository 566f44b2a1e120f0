"""KVM_CREATE_VM2_FIXED: every field by itself, and that it is the same as the list."""

import errno
import struct

import pytest

from kvm2.abi import vm2
from kvm2.abi.findings import NO_ATTR
from kvm2.errors import KvmError
from kvm2.softkvm import creation, profile
from kvm2.softkvm.vmconfig import VmConfig

from ..memory_image import LIST, MemoryImage, list_image

BIG, M1 = "max-4k-6.12", "apple-m1"
SVE, IPA = vm2.KVM_ARM_SVE_CAPABLE, vm2.KVM_ARM_SELECT_IPA


def raw(capabilities=0, sve_vlen=0, ipa_size=0, version=0, pad=bytes(5), rest=bytes(104)):
    return struct.pack("=QQHB", version, capabilities, sve_vlen, ipa_size) + pad + rest


def create(name, data):
    return creation.create_vm2_fixed(profile.load(name), MemoryImage({LIST: data}), LIST)


def refused(name, data):
    with pytest.raises(KvmError) as caught:
        create(name, data)
    error = caught.value
    assert all(f.attr_index == NO_ATTR for f in error.findings)
    assert error.errno == error.findings[0].error
    return [(f.attr_type, f.name, f.offset, f.path) for f in error.findings]


def by_list(name, *attrs):
    return creation.create_vm2(profile.load(name), list_image(*(a.pack() for a in attrs)), LIST)


def test_nothing_asked_for():
    assert create(BIG, raw()) == by_list(BIG)


@pytest.mark.parametrize("bits", [0, *range(32, 53)])
def test_the_size_is_attribute_2(bits):
    assert create(BIG, raw(IPA, ipa_size=bits)) == by_list(BIG, vm2.Arm64PhysaddrSize(physaddr_bits=bits))


@pytest.mark.parametrize("vq", range(1, 17))
def test_a_length_is_attribute_7(vq):
    vls = vm2.Arm64SveVls(vls=((1 << vq) - 1,) + (0,) * 7)
    assert create(BIG, raw(SVE, sve_vlen=128 * vq)) == by_list(BIG, vls)


def test_no_length_is_attribute_1():
    assert create(BIG, raw(SVE)) == by_list(BIG, vm2.ArchCapabilities(capabilities=(1,)))


def test_sets_with_gaps():
    assert create("a64fx-4k", raw(SVE, sve_vlen=512)).sve_vls[0] == 0xB
    assert create("a64fx-4k", raw(SVE, sve_vlen=256)).sve_vls[0] == 0x3


@pytest.mark.parametrize("vlen", [1, 100, 127, 129, 384, 640, 1024, 4096, 65535])
def test_a_length_that_the_host_has_not_is_not_rounded(vlen):
    assert refused("a64fx-4k", raw(SVE, sve_vlen=vlen)) == [(7, "EOPNOTSUPP", 16, "arm64.sve_vlen")]


def test_sve_on_a_host_without():
    assert refused("max-4k-nosve", raw(SVE, sve_vlen=128)) == [(7, "EOPNOTSUPP", 16, "arm64.sve_vlen")]
    assert refused("max-4k-nosve", raw(SVE)) == [(1, "EOPNOTSUPP", 8, "arm64.capabilities")]


def test_the_default_on_a_36_bit_host():
    assert refused(M1, raw()) == [(2, "EOPNOTSUPP", 18, "arm64.ipa_size")]
    assert refused(M1, raw(IPA)) == [(2, "EOPNOTSUPP", 18, "arm64.ipa_size")]
    assert refused(M1, raw(IPA, ipa_size=37)) == [(2, "EOPNOTSUPP", 18, "arm64.ipa_size")]
    assert create(M1, raw(IPA, ipa_size=36)).ipa_bits == 36


@pytest.mark.parametrize("bits", [1, 31, 65, 255])
def test_sizes_that_no_host_could_have(bits):
    assert refused(BIG, raw(IPA, ipa_size=bits)) == [(2, "EINVAL", 18, "arm64.ipa_size")]
    assert refused(M1, raw(IPA, ipa_size=bits)) == [(2, "EINVAL", 18, "arm64.ipa_size")]


def test_a_size_without_its_bit():
    assert refused(BIG, raw(0, ipa_size=40)) == [(2, "EINVAL", 18, "arm64.ipa_size")]


def test_a_length_without_its_bit():
    assert refused(BIG, raw(0, sve_vlen=128)) == [(7, "EINVAL", 16, "arm64.sve_vlen")]


@pytest.mark.parametrize("bit", [2, 63])
def test_unknown_capabilities(bit):
    assert refused(BIG, raw(1 << bit)) == [(1, "EOPNOTSUPP", 8, "arm64.capabilities")]


@pytest.mark.parametrize("at", range(5))
def test_pad(at):
    pad = bytearray(5)
    pad[at] = 1
    assert refused(BIG, raw(pad=bytes(pad))) == [(0, "E2BIG", 19, "arm64.pad")]


@pytest.mark.parametrize("at", [0, 7, 8, 103])
def test_the_rest_must_be_zero(at):
    rest = bytearray(104)
    rest[at] = 0x80
    word = 2 + at // 8
    assert refused(BIG, raw(rest=bytes(rest))) == [(0, "E2BIG", 24 + at // 8 * 8, f"dummy[{word}]")]


@pytest.mark.parametrize("version", [1, 1 << 32, 1 << 63])
def test_other_version_and_nothing_else(version):
    data = raw(0xFF, 3, 3, version=version)
    assert refused(BIG, data) == [(0, "EOPNOTSUPP", 0, "version")]
    assert refused(BIG, data[:8]) == [(0, "EOPNOTSUPP", 0, "version")]


@pytest.mark.parametrize("size", [0, 7, 127])
def test_cut_short(size):
    assert refused(BIG, raw()[:size])[0][:3] == (0, "EFAULT", 0)


def test_all_findings_by_offset():
    data = raw(1 << 9, sve_vlen=128, ipa_size=7, pad=b"\1" * 5, rest=bytes(103) + b"\1")
    assert [(name, offset) for _, name, offset, _ in refused(BIG, data)] == [
        ("EOPNOTSUPP", 8),
        ("EINVAL", 16),
        ("EINVAL", 18),
        ("E2BIG", 19),
        ("E2BIG", 120),
    ]


@pytest.mark.parametrize("name", ["x86-64", "s390x", "powerpc"])
def test_other_architectures_take_zeros_only(name):
    assert create(name, raw()).arch == profile.load(name).arch
    assert refused(name, raw(IPA, ipa_size=40)) == [(0, "E2BIG", 8, "dummy[0]")]


@pytest.mark.parametrize("name", ["mainline-6.12", "vm2-list-only"])
def test_hosts_without_the_call(name):
    with pytest.raises(KvmError) as caught:
        creation.create_vm2_fixed(profile.load(name), MemoryImage({LIST: raw()}), LIST)
    assert (caught.value.errno, caught.value.findings) == (errno.EINVAL, ())


def test_a_host_with_the_fixed_structure_only():
    assert create("vm2-fixed-only", raw(IPA, ipa_size=48)) == VmConfig(
        48, 12, max_vcpus=512, max_vcpu_id=512, made_by_vm2=True
    )

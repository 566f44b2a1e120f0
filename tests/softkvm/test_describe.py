"""KVM_DESCRIBE_VM2: what a host says of itself, and that creation agrees with it."""

import errno
import struct

import pytest

from kvm2.abi import vm2
from kvm2.errors import KvmError
from kvm2.softkvm import creation, profile
from kvm2.softkvm.describe import attr_infos, describe_vm2
from kvm2.softkvm.limits import limits_of

from ..memory_image import LIST, MemoryImage, list_image

ARG, ENTRIES = 0x1000, 0x8000
HOSTS = ["max-4k-6.12", "apple-m1", "max-4k-protected", "max-4k-nolpa2", "a64fx-4k", "max-4k-gicv2", "armv9-64k-52",
         "armv8-32", "x86-64", "x86-64-snp", "s390x", "powerpc", "vm2-list-only"]  # fmt: skip


def infos(name):
    return {info.type: info for info in attr_infos(limits_of(profile.load(name)))}


def call(name, room, version=0, space=9):
    memory = MemoryImage({ARG: struct.pack("=IIQ", version, room, ENTRIES), ENTRIES: bytes(48 * space)})
    error = 0
    try:
        assert describe_vm2(profile.load(name), memory, ARG) == 0
    except KvmError as refusal:
        error = refusal.errno
    return error, struct.unpack_from("=I", memory.ranges[ARG], 4)[0], memory


def test_the_entries_as_bytes():
    error, count, memory = call("apple-m1", 9)
    assert (error, count) == (0, 9)
    read = [vm2.Vm2AttrInfo.unpack(memory.ranges[ENTRIES], 48 * i) for i in range(9)]
    assert [info.type for info in read] == list(range(1, 10))
    assert read[1] == vm2.Vm2AttrInfo(2, 3, 40, 32, 36, 0b11111 << 32, 0)


def test_more_room_than_there_is():
    assert call("apple-m1", 100)[:2] == (0, 9)


@pytest.mark.parametrize("room", [0, 1, 8])
def test_less_room_only_the_count_is_written(room):
    error, count, memory = call("apple-m1", room)
    assert (error, count) == (errno.E2BIG, 9)
    assert memory.writes == [(ARG + 4, 4)]


def test_other_version():
    assert call("apple-m1", 9, version=1)[0] == errno.EOPNOTSUPP


def test_other_version_of_a_structure_that_is_shorter():
    with pytest.raises(KvmError) as caught:
        describe_vm2(profile.load("apple-m1"), MemoryImage({ARG: bytes([1, 0, 0, 0])}), ARG)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_argument_cut_short():
    with pytest.raises(KvmError) as caught:
        describe_vm2(profile.load("apple-m1"), MemoryImage({ARG: bytes(15)}), ARG)
    assert caught.value.errno == errno.EFAULT


def test_entries_that_cannot_be_written():
    assert call("apple-m1", 9, space=8)[0] == errno.EFAULT


def test_unreadable_argument():
    with pytest.raises(KvmError) as caught:
        describe_vm2(profile.load("apple-m1"), MemoryImage({}), ARG)
    assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("name", ["mainline-6.12", "vm2-list-only", "vm2-fixed-only"])
def test_hosts_without_the_call(name):
    assert call(name, 9)[0] == errno.EINVAL


def test_flags():
    assert {kind: info.flags for kind, info in infos("max-4k-6.12").items()} == {
        1: 3, 2: 3, 3: 2, 4: 2, 5: 0, 6: 3, 7: 3, 8: 3, 9: 3,
    }  # fmt: skip
    assert {kind: info.flags for kind, info in infos("vm2-list-only").items()} == {
        1: 1, 2: 1, 3: 0, 4: 0, 6: 1, 7: 1, 8: 1, 9: 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["x86-64", "s390x", "powerpc"])
def test_other_architectures(name):
    assert sorted(infos(name)) == [1, 3, 4, 5, 6, 9]


def attribute(kind, value):
    if kind == 1:
        return vm2.ArchCapabilities(capabilities=(value,))
    if kind == 7:
        return vm2.Arm64SveVls(vls=(value,) + (0,) * 7)
    cls = vm2.ATTRIBUTES[kind].cls
    name = next(field.name for field in cls.LAYOUT.fields if field.name not in ("type", "size", "flags"))
    return cls(**{name: value})


def refused(name, *attrs):
    """The types with an error, when these attributes are asked for."""
    memory = list_image(vm2.DryRun().pack(), *(a.pack() for a in attrs))
    try:
        creation.create_vm2(profile.load(name), memory, LIST)
    except KvmError as error:
        return {f.attr_type for f in error.findings if f.error}
    return set()


@pytest.mark.parametrize("name", HOSTS)
def test_creation_takes_what_the_mask_says_and_nothing_else(name):
    for kind, info in infos(name).items():
        if not info.flags & vm2.KVM_VM2_ATTR_INFO_VALUE:
            continue
        values = range(1, 64)
        for value in values:
            taken = kind not in refused(name, attribute(kind, value))
            if kind in (1, 7) or (kind == 6 and name == "s390x"):
                assert not taken or not value & ~info.mask, (kind, value)
            else:
                assert taken == bool(info.mask >> value & 1), (kind, value)


@pytest.mark.parametrize("name", HOSTS)
def test_the_default_is_what_a_vm_without_the_attribute_gets(name):
    for kind, info in infos(name).items():
        if not info.flags & vm2.KVM_VM2_ATTR_INFO_VALUE or kind == 7:
            continue
        inside = bool(info.mask >> info.default & 1) or info.default == 0 or kind == 9
        assert (kind in refused(name)) != inside, kind


@pytest.mark.parametrize("name", HOSTS)
def test_min_and_max_are_ends_that_can_be_had(name):
    for kind, info in infos(name).items():
        for value in {info.min, info.max}:
            if value and info.flags & vm2.KVM_VM2_ATTR_INFO_VALUE:
                assert kind not in refused(name, attribute(kind, value)), (kind, value)


def test_the_default_may_lie_outside():
    assert infos("apple-m1")[2].default == 40 > infos("apple-m1")[2].max == 36
    protected = infos("max-4k-protected")[2]
    assert (protected.default, protected.min, protected.max, protected.mask) == (40, 52, 52, 1 << 52)


def test_sets():
    assert infos("a64fx-4k")[7].mask == 0xB
    assert infos("apple-m1")[7].mask == infos("apple-m1")[7].max == 0
    assert infos("apple-m1")[1].mask == 2
    assert infos("max-4k-6.12")[1].mask == 3
    assert infos("x86-64")[1].mask == 0

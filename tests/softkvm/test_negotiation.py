"""The negotiation phase as a state machine, and GET_ATTR on every kind of VM."""

import errno
import struct
from types import SimpleNamespace

import pytest

from kvm2.abi import vm2
from kvm2.abi.attrs import make_plans
from kvm2.abi.findings import NO_ATTR
from kvm2.abi.layout import Structure, field, u16, u32, u64
from kvm2.errors import KvmError
from kvm2.softkvm import creation, negotiation, profile

from ..memory_image import LIST, MemoryImage, list_image

BIG, M1 = "max-4k-6.12", "apple-m1"
OUT, HEAD = 0x900000, 0x800000
ALL_ONES = b"\xff"


def packed(attrs):
    return list_image(*(a.pack() for a in attrs))


def begin(name, *attrs):
    return creation.create_vm2(profile.load(name), packed((vm2.Negotiate(), *attrs)), LIST)


def set_attrs(state, *attrs):
    return negotiation.set_attrs(state.limits.profile, state, packed(attrs), LIST)


def commit(state, *attrs):
    return negotiation.commit(state.limits.profile, state, packed(attrs), LIST)


def refused(call, *args):
    with pytest.raises(KvmError) as caught:
        call(*args)
    return caught.value


def bits(n):
    return vm2.Arm64PhysaddrSize(physaddr_bits=n)


def caps(word):
    return vm2.ArchCapabilities(capabilities=(word,))


def lengths(word, flags=0):
    return vm2.Arm64SveVls(vls=(word,) + (0,) * 7, flags=flags)


# ---- SET_ATTRS and COMMIT


def test_a_negotiated_vm_is_the_same_as_one_made_at_once():
    state = begin(BIG, bits(44))
    assert set_attrs(state, caps(2), vm2.MaxVcpus(max_vcpus=4)) == 0
    at_once = packed((bits(44), caps(2), vm2.MaxVcpus(max_vcpus=4)))
    assert commit(state) == creation.create_vm2(profile.load(BIG), at_once, LIST)


def test_setting_again_replaces():
    state = begin(BIG, bits(44))
    set_attrs(state, bits(36))
    set_attrs(state, bits(0))
    assert commit(state).ipa_bits == 40


def test_a_value_that_only_the_whole_refuses():
    state = begin(BIG, caps(1))
    set_attrs(state, lengths(1))
    error = refused(commit, state)
    assert [(f.attr_index, f.attr_type, f.error) for f in error.findings] == [(NO_ATTR, 1, errno.EINVAL)]
    set_attrs(state, caps(0))
    assert commit(state).sve_vls[0] == 1


def test_a_value_that_no_combination_could_give():
    state = begin("max-4k-nolpa2")
    assert set_attrs(state, bits(52)) == 0  # with 64K it could be had
    assert refused(set_attrs, state, bits(53)).errno == errno.EOPNOTSUPP
    assert refused(commit, state).findings[0].attr_type == 2
    assert commit(state, vm2.Arm64Granule(page_shift=16)).page_shift == 16


def test_what_the_first_list_asked_for_has_no_place_in_the_next():
    state = begin("max-4k-nolpa2", bits(52))
    error = refused(commit, state)
    assert [(f.attr_index, f.path) for f in error.findings] == [(NO_ATTR, "physaddr_bits")]


def test_the_default_counts_at_commit():
    state = begin(M1)
    set_attrs(state, vm2.MaxVcpus(max_vcpus=2))
    error = refused(commit, state)
    assert [(f.attr_index, f.attr_type, f.offset) for f in error.findings] == [(NO_ATTR, 2, 4)]
    assert commit(state, bits(36)).ipa_bits == 36


def test_set_attrs_is_all_or_nothing():
    state = begin(BIG, bits(44))
    error = refused(set_attrs, state, bits(48), vm2.MaxVcpus(max_vcpus=9999))
    assert [(f.attr_index, f.attr_type) for f in error.findings] == [(1, 9)]
    assert state.config.ipa_bits == 44


def test_commit_is_all_or_nothing():
    state = begin(BIG, bits(44))
    refused(commit, state, bits(48), vm2.MaxVcpus(pad=1))
    assert state.committed is None
    assert state.config.ipa_bits == 44
    assert commit(state).ipa_bits == 44


def test_dry_runs_change_nothing():
    state = begin(BIG, bits(44))
    assert set_attrs(state, bits(48), vm2.DryRun()) == 0
    assert state.config.ipa_bits == 44
    assert commit(state, bits(48), vm2.DryRun()) == 0
    assert state.committed is None and state.config.ipa_bits == 44
    assert refused(set_attrs, state, bits(60), vm2.DryRun()).errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("call", [set_attrs, commit])
def test_negotiate_within(call):
    error = refused(call, begin(BIG), vm2.Negotiate())
    assert [(f.attr_index, f.attr_type, f.error, f.offset) for f in error.findings] == [(0, 5, errno.EINVAL, 0)]


@pytest.mark.parametrize("call", [set_attrs, commit])
def test_the_report_works_within(call):
    state = begin(BIG)
    memory = packed((vm2.Report(records=OUT, capacity=1), bits(7)))
    memory.ranges[OUT] = bytearray(192)
    with pytest.raises(KvmError):
        getattr(negotiation, call.__name__)(state.limits.profile, state, memory, LIST)
    assert any(memory.ranges[OUT])


@pytest.mark.parametrize("call", [set_attrs, commit])
def test_after_commit(call):
    state = begin(BIG)
    commit(state)
    assert refused(call, state).errno == errno.EBUSY


@pytest.mark.parametrize("call", [negotiation.set_attrs, negotiation.commit])
def test_a_vm_that_never_negotiated(call):
    assert refused(call, profile.load(BIG), None, MemoryImage({}), LIST).errno == errno.EBUSY


@pytest.mark.parametrize(("name", "error"), [("mainline-6.12", "EINVAL"), ("vm2-list-only", "EINVAL")])
@pytest.mark.parametrize("call", [negotiation.set_attrs, negotiation.commit])
def test_hosts_without_negotiation(call, name, error):
    assert refused(call, profile.load(name), None, MemoryImage({}), LIST).name == error


def test_an_optional_value_replaces_with_the_default():
    state = begin("max-4k-nosve", caps(2))
    set_attrs(state, vm2.ArchCapabilities(capabilities=(1,), flags=2))
    assert not state.config.parange_follows_ipa


def test_an_optional_granule_yields_at_commit():
    state = begin("armv9-64k-52", vm2.Arm64Granule(page_shift=12, flags=2))
    assert commit(state, bits(52)).page_shift == 16


# ---- GET_ATTR


def get(name, config, kind, room, out=None):
    """(errno, size written back, bytes at attr) of a GET_ATTR with a buffer of `room` bytes of 0xff."""
    memory = MemoryImage({HEAD: struct.pack("=IIQ", kind, room, OUT), OUT: out or ALL_ONES * (room + 16)})
    error = 0
    try:
        assert negotiation.get_attr(profile.load(name), config, memory, HEAD) == 0
    except KvmError as refusal:
        error = refusal.errno
    return error, struct.unpack_from("=I", memory.ranges[HEAD], 4)[0], bytes(memory.ranges[OUT])


def whole():
    attrs = (bits(47), caps(2), lengths(3), vm2.Arm64Granule(page_shift=16), vm2.MaxVcpus(max_vcpus=7))
    return creation.create_vm2(profile.load(BIG), packed(attrs), LIST), {a.type: a for a in (*attrs, vm2.MachineType())}


@pytest.mark.parametrize("kind", [1, 2, 6, 7, 8, 9])
def test_what_was_asked_for_is_read_back(kind):
    config, asked = whole()
    size = asked[kind].SIZE
    assert get(BIG, config, kind, size) == (0, size, asked[kind].pack() + ALL_ONES * 16)


@pytest.mark.parametrize("kind", [1, 2, 6, 7, 8, 9])
@pytest.mark.parametrize("more", [1, 8, 100])
def test_a_larger_buffer_is_cleared(kind, more):
    config, asked = whole()
    size = asked[kind].SIZE
    assert get(BIG, config, kind, size + more) == (0, size, asked[kind].pack() + bytes(more) + ALL_ONES * 16)


@pytest.mark.parametrize("kind", [1, 2, 6, 7, 8, 9])
def test_a_smaller_buffer_learns_the_size(kind):
    config, asked = whole()
    for room in (0, 7, asked[kind].SIZE - 1):
        assert get(BIG, config, kind, room) == (errno.E2BIG, asked[kind].SIZE, ALL_ONES * (room + 16))


def test_a_very_large_buffer_is_cleared_to_its_end():
    config, _ = whole()
    error, size, data = get(BIG, config, 2, 3 << 20)
    assert (error, size) == (0, 8)
    assert not any(data[8 : 3 << 20]) and data[3 << 20 :] == ALL_ONES * 16


@pytest.mark.parametrize("kind", [3, 4, 5])
def test_requests_have_no_value(kind):
    assert get(BIG, whole()[0], kind, 64)[0] == errno.EOPNOTSUPP
    assert get("vm2-list-only", whole()[0], kind, 64)[0] == errno.EOPNOTSUPP


@pytest.mark.parametrize("kind", [0, 10, 0xFFFFFFFF])
def test_unknown_types(kind):
    assert get(BIG, whole()[0], kind, 64)[0] == errno.ENOENT


@pytest.mark.parametrize("kind", [2, 7, 8])
def test_arm64_types_elsewhere(kind):
    config = creation.create_vm2(profile.load("x86-64"), packed(()), LIST)
    assert get("x86-64", config, kind, 128)[0] == errno.ENOENT
    assert get("x86-64", config, 9, 16)[2][:16] == vm2.MaxVcpus(max_vcpus=1024).pack()


def test_defaults_of_a_vm_made_by_the_old_call():
    config = creation.create_vm(profile.load(M1), MemoryImage({}), 36)
    expected = {2: bits(36), 8: vm2.Arm64Granule(page_shift=14), 9: vm2.MaxVcpus(max_vcpus=512)}
    expected |= {1: caps(0), 7: lengths(0), 6: vm2.MachineType()}
    for kind, attr in expected.items():
        assert get(M1, config, kind, attr.SIZE)[2][: attr.SIZE] == attr.pack()


def test_a_configuring_vm_reads_as_configured():
    state = begin(M1)
    assert get(M1, state.config, 2, 8)[2][:8] == bits(40).pack()
    set_attrs(state, bits(33))
    assert get(M1, state.config, 2, 8)[2][:8] == bits(33).pack()


class GrownMaxVcpus(Structure, c_name="kvm_create_vm_attr_max_vcpus"):
    """What attribute 9 may become: two more words."""

    type: u32 = field(default=9)
    size: u16 = field(default=32)
    flags: u16 = 0
    max_vcpus: u32 = 0
    pad: u32 = 0
    max_vcpu_id: u64 = 0
    hotplug: u64 = 0


@pytest.mark.parametrize(
    ("values", "room", "size"),
    [
        ((7, 0, 0, 0), 15, None),
        ((7, 0, 0, 0), 16, 16),
        ((7, 0, 0, 0), 23, 16),
        ((7, 0, 0, 0), 31, 24),
        ((7, 0, 0, 0), 99, 32),
        ((7, 0, 0, 9), 24, None),
        ((7, 0, 0, 9), 31, None),
        ((7, 0, 9, 0), 24, 24),
        ((7, 0, 9, 0), 16, None),
        ((7, 0, 9, 9), 32, 32),
    ],
)
def test_an_attribute_that_grew_since_the_caller_was_built(values, room, size):
    (plan,) = make_plans([vm2.ATTRIBUTES[9]._replace(cls=GrownMaxVcpus, known=32, published=16)]).values()
    data = negotiation.attribute_bytes(plan, SimpleNamespace(values=lambda kind: values), room)
    if size is None:
        assert data is None
    else:
        assert data == (struct.pack("=IHH", 9, size, 0) + struct.pack("=IIQQ", *values))[:size]


def test_unreadable_argument_and_unwritable_buffer():
    config, _ = whole()
    assert refused(negotiation.get_attr, profile.load(BIG), config, MemoryImage({}), HEAD).errno == errno.EFAULT
    memory = MemoryImage({HEAD: struct.pack("=IIQ", 2, 8, OUT)})
    assert refused(negotiation.get_attr, profile.load(BIG), config, memory, HEAD).errno == errno.EFAULT
    assert memory.writes == []


@pytest.mark.parametrize("name", ["mainline-6.12", "mainline-m1"])
def test_hosts_without_the_call(name):
    assert refused(negotiation.get_attr, profile.load(name), whole()[0], MemoryImage({}), HEAD).errno == errno.EINVAL

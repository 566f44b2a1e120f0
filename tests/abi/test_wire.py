"""Reading a list: every size rule, every malformed field by itself, the order of findings."""

import struct

import pytest

from kvm2.abi import vm2
from kvm2.abi.findings import NO_ATTR
from kvm2.abi.wire import Buffer, decode, encode

from ..memory_image import LIST as BASE
from ..memory_image import MemoryImage, list_image

ARRAY = 0x2000
ONE_OF_EACH = (
    vm2.ArchCapabilities(capabilities=(2,)),
    vm2.Arm64PhysaddrSize(physaddr_bits=44),
    vm2.Report(records=0xDEAD0000, capacity=7, count=9),
    vm2.DryRun(),
    vm2.Negotiate(),
    vm2.MachineType(machine_type=1 << 40),
    vm2.Arm64SveVls(vls=(0xF, 0, 0, 0, 0, 0, 0, 1)),
    vm2.Arm64Granule(page_shift=16),
    vm2.MaxVcpus(max_vcpus=3),
)


def header(kind, size, flags=0):
    return struct.pack("=IHH", kind, size, flags)


def read(*attrs, plans=None, **how):
    memory = list_image(*attrs, **how)
    return decode(memory, BASE, plans) if plans is not None else decode(memory, BASE)


def errors(decoded):
    return [(f.attr_index, f.attr_type, f.name, f.offset) for f in decoded.findings]


# ---- what is fine


@pytest.mark.parametrize("terminated", [False, True])
def test_decode_of_encode_is_the_same(terminated):
    data = encode(ONE_OF_EACH, BASE, terminated=terminated)
    decoded = decode(Buffer(BASE, data), BASE)
    assert decoded.attributes == ONE_OF_EACH
    assert decoded.findings == ()
    assert decoded.report[1:] == (0xDEAD0000, 7)


@pytest.mark.parametrize("order", range(5))
def test_order_does_not_matter(order):
    attrs = ONE_OF_EACH[order:] + ONE_OF_EACH[:order]
    assert decode(Buffer(BASE, encode(attrs, BASE)), BASE).attributes == attrs


def test_an_empty_list():
    decoded = read(nr_attrs=0, array=0)
    assert (decoded.attributes, decoded.findings, decoded.report) == ((), (), None)


def test_a_terminated_list_of_nothing():
    assert read(terminated=True).findings == ()


@pytest.mark.parametrize("misaligned", range(1, 8))
def test_pointers_of_any_alignment(misaligned):
    decoded = read(*(attr.pack() for attr in ONE_OF_EACH), misaligned=misaligned)
    assert decoded.attributes == ONE_OF_EACH


def test_nothing_beyond_nr_attrs_is_read():
    memory = list_image(vm2.MaxVcpus(max_vcpus=2).pack(), b"", nr_attrs=1)
    assert decode(memory, BASE).findings == ()
    assert (ARRAY, 8) in memory.reads


def test_sixty_four_entries_are_not_too_many():
    unknown = [header(1000 + i, 8, vm2.KVM_CREATE_VM_ATTR_SKIP_UNKNOWN) for i in range(64)]
    assert {f.error for f in read(*unknown).findings} == {0}
    assert {f.error for f in read(*unknown, terminated=True).findings} == {0}


@pytest.mark.parametrize("attr", ONE_OF_EACH, ids=lambda a: type(a).__name__)
def test_each_byte_is_read_once(attr):
    memory = list_image(attr.pack(), vm2.MaxVcpus().pack() if attr.type != 9 else vm2.DryRun().pack())
    assert decode(memory, BASE).findings == ()
    seen = [at for start, size in memory.reads for at in range(start, start + size)]
    assert len(seen) == len(set(seen))
    assert not memory.writes


def test_bytes_of_a_wrong_value_are_read_once_too():
    memory = list_image(vm2.Arm64Granule(page_shift=13, pad=1).pack())
    assert len(decode(memory, BASE).findings) == 2
    seen = [at for start, size in memory.reads for at in range(start, start + size)]
    assert len(seen) == len(set(seen))


# ---- the list itself, one error path per test


def test_unreadable_list():
    decoded = decode(MemoryImage({}), BASE)
    assert errors(decoded) == [(NO_ATTR, 0, "EFAULT", 0)]


def test_list_cut_short():
    assert errors(decode(MemoryImage({BASE: bytes(15)}), BASE)) == [(NO_ATTR, 0, "EFAULT", 0)]


def test_other_version_and_nothing_else_is_read():
    memory = list_image(header(99, 3), version=1, pad=1)
    assert errors(decode(memory, BASE)) == [(NO_ATTR, 0, "EOPNOTSUPP", 0)]
    assert all(start < ARRAY for start, _ in memory.reads)


def test_other_version_of_a_structure_that_is_shorter():
    assert errors(decode(MemoryImage({BASE: b"\1\0\0\0"}), BASE)) == [(NO_ATTR, 0, "EOPNOTSUPP", 0)]


def test_pad():
    assert errors(read(vm2.DryRun().pack(), pad=0x100)) == [(NO_ATTR, 0, "EINVAL", 6)]


def test_too_many_by_number():
    decoded = read(*([vm2.DryRun().pack()] + [header(1000 + i, 8, 1) for i in range(64)]))
    assert errors(decoded)[0] == (NO_ATTR, 0, "E2BIG", 4)
    assert [e for e in errors(decoded) if e[2] != "note"] == [(NO_ATTR, 0, "E2BIG", 4)]


def test_too_many_before_the_null():
    decoded = read(*[header(1000 + i, 8, 1) for i in range(65)], terminated=True)
    assert [e for e in errors(decoded) if e[2] != "note"] == [(64, 0, "E2BIG", 0)]


def test_unreadable_array():
    assert errors(read(vm2.DryRun().pack(), array=0x666000)) == [(NO_ATTR, 0, "EFAULT", 8)]


def test_null_array_with_a_number():
    assert errors(read(vm2.DryRun().pack(), array=0)) == [(NO_ATTR, 0, "EFAULT", 8)]


def test_an_array_that_ends_early_ends_the_walk():
    decoded = read(header(99, 8), vm2.DryRun().pack(), nr_attrs=4)
    assert errors(decoded) == [(0, 99, "ENOENT", 0), (NO_ATTR, 0, "EFAULT", 8)]
    assert 4 in decoded.entries


def test_a_terminated_array_without_its_null():
    memory = list_image(vm2.DryRun().pack(), nr_attrs=0)
    assert errors(decode(memory, BASE)) == [(NO_ATTR, 0, "EFAULT", 8)]


def test_null_entry():
    assert errors(read(None, vm2.DryRun().pack())) == [(0, 0, "EFAULT", 0)]


def test_unreadable_attribute_does_not_end_the_walk():
    decoded = read(b"", header(99, 8), vm2.DryRun().pack())
    assert errors(decoded) == [(0, 0, "EFAULT", 0), (1, 99, "ENOENT", 0)]
    assert set(decoded.entries) == {4}
    assert not decoded.complete


def test_attribute_cut_inside_its_header():
    assert errors(read(header(9, 16)[:7])) == [(0, 0, "EFAULT", 0)]


def test_attribute_cut_inside_its_fields():
    assert errors(read(vm2.MaxVcpus().pack()[:15])) == [(0, 9, "EFAULT", 8)]

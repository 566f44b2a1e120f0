"""Reading attributes: header, fields, what other architectures know, where the report goes."""

import struct

import pytest

from kvm2.abi import vm2
from kvm2.abi.attrs import plans_for
from kvm2.abi.findings import NO_ATTR
from kvm2.abi.wire import decode

from ..memory_image import FIRST, list_image
from ..memory_image import LIST as BASE

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


# ---- the header of an attribute


@pytest.mark.parametrize("kind", [0, 10, 99, 0xFFFFFFFF])
def test_unknown_type(kind):
    decoded = read(header(kind, 8))
    assert errors(decoded) == [(0, kind, "ENOENT", 0)]


def test_of_an_unknown_type_only_the_header_is_read():
    memory = list_image(header(99, 4096))
    assert errors(decode(memory, BASE)) == [(0, 99, "ENOENT", 0)]


def test_skip_unknown():
    decoded = read(header(99, 64, vm2.KVM_CREATE_VM_ATTR_SKIP_UNKNOWN))
    assert errors(decoded) == [(0, 99, "note", 0)]


def test_skip_unsupported_does_not_skip_the_unknown():
    assert errors(read(header(99, 8, vm2.KVM_CREATE_VM_ATTR_SKIP_UNSUPPORTED))) == [(0, 99, "ENOENT", 0)]


@pytest.mark.parametrize(("size", "error"), [(0, "EINVAL"), (4, "EINVAL"), (12, "EINVAL"), (4104, "E2BIG")])
def test_malformed_is_never_skipped(size, error):
    decoded = read(header(99, size, vm2.KVM_CREATE_VM_ATTR_SKIP_UNKNOWN))
    assert errors(decoded) == [(0, 99, "note", 0), (0, 99, error, 4)]


def test_type_0_cannot_be_skipped():
    assert errors(read(header(0, 8, vm2.KVM_CREATE_VM_ATTR_SKIP_UNKNOWN))) == [(0, 0, "ENOENT", 0)]


def test_other_flags():
    assert errors(read(header(4, 8, 4))) == [(0, 4, "EINVAL", 6)]
    assert errors(read(header(99, 8, 0x8001))) == [(0, 99, "note", 0), (0, 99, "EINVAL", 6)]


@pytest.mark.parametrize("kind", [4, 5])
@pytest.mark.parametrize("flag", [1, 2, 3])
def test_dry_run_and_negotiate_are_never_skipped(kind, flag):
    assert errors(read(header(kind, 8, flag))) == [(0, kind, "EINVAL", 6)]


@pytest.mark.parametrize("kind", [1, 3, 6, 7, 8, 9])
@pytest.mark.parametrize("flag", [1, 2, 3])
def test_flags_that_are_allowed(kind, flag):
    attr = bytearray(next(a for a in ONE_OF_EACH if a.type == kind).pack())
    attr[6:8] = struct.pack("=H", flag)
    decoded = read(bytes(attr))
    assert decoded.findings == ()
    assert decoded.attributes[0].flags == flag


def test_the_same_type_twice():
    assert errors(read(vm2.MaxVcpus().pack(), vm2.MaxVcpus().pack())) == [(1, 9, "EEXIST", 0)]


def test_the_same_type_three_times():
    assert errors(read(*[vm2.DryRun().pack()] * 3)) == [(1, 4, "EEXIST", 0), (2, 4, "EEXIST", 0)]


def test_the_same_unknown_type_twice():
    decoded = read(header(99, 8, 1), header(99, 8, 1))
    assert errors(decoded) == [(0, 99, "note", 0), (1, 99, "EEXIST", 0), (1, 99, "note", 0)]


def test_the_second_of_two_is_checked_too():
    second = vm2.Arm64Granule(page_shift=13).pack()
    decoded = read(vm2.Arm64Granule(page_shift=12).pack(), second)
    assert errors(decoded) == [(1, 8, "EEXIST", 0), (1, 8, "EINVAL", 8)]
    assert decoded.entries[8].values[0] == 12


# ---- fields


@pytest.mark.parametrize("bits", [0, *range(32, 65)])
def test_sizes_that_some_host_could_have(bits):
    assert read(vm2.Arm64PhysaddrSize(physaddr_bits=bits).pack()).findings == ()


@pytest.mark.parametrize("bits", [*range(1, 32), *range(65, 140), 255, 256, 0x10028, 0xFFFFFFFF])
def test_sizes_that_no_host_could_have(bits):
    decoded = read(vm2.Arm64PhysaddrSize(physaddr_bits=bits).pack())
    assert errors(decoded) == [(0, 2, "EINVAL", 4)]
    assert decoded.findings[0].value == bits
    assert (decoded.findings[0].min, decoded.findings[0].max) == (32, 64)


@pytest.mark.parametrize("shift", [1, 11, 13, 15, 17, 64, 0xFFFFFFFF])
def test_page_shifts_that_no_host_has(shift):
    assert errors(read(vm2.Arm64Granule(page_shift=shift).pack())) == [(0, 8, "EINVAL", 8)]


@pytest.mark.parametrize("attr", [vm2.Arm64Granule(pad=1), vm2.MaxVcpus(pad=0x80000000)])
def test_named_pads(attr):
    assert errors(read(attr.pack())) == [(0, attr.type, "EINVAL", 12)]


def test_empty_set_of_lengths():
    assert errors(read(vm2.Arm64SveVls().pack())) == [(0, 7, "EINVAL", 8)]


def test_two_fields_of_one_attribute():
    assert errors(read(vm2.Arm64Granule(page_shift=13, pad=1).pack())) == [(0, 8, "EINVAL", 8), (0, 8, "EINVAL", 12)]


def test_everything_that_is_wrong_in_one_attribute_by_offset():
    data = bytearray(vm2.Arm64Granule(page_shift=13, pad=1, flags=0x10, size=32).pack() + bytes(15) + b"\1")
    again = vm2.Arm64Granule(page_shift=12).pack()
    decoded = read(again, bytes(data))
    assert errors(decoded) == [
        (1, 8, "EEXIST", 0),
        (1, 8, "EINVAL", 6),
        (1, 8, "EINVAL", 8),
        (1, 8, "EINVAL", 12),
        (1, 8, "E2BIG", 24),
    ]


def test_findings_come_in_the_order_of_the_list():
    decoded = read(
        vm2.MaxVcpus(pad=1).pack(), header(99, 8), None, vm2.Arm64PhysaddrSize(physaddr_bits=7).pack(), pad=1
    )
    assert errors(decoded) == [
        (NO_ATTR, 0, "EINVAL", 6),
        (0, 9, "EINVAL", 12),
        (1, 99, "ENOENT", 0),
        (2, 0, "EFAULT", 0),
        (3, 2, "EINVAL", 4),
    ]


# ---- what a host of another architecture knows


@pytest.mark.parametrize("arch", ["x86_64", "s390x", "powerpc"])
def test_arm64_attributes_elsewhere(arch):
    attrs = [vm2.Arm64PhysaddrSize(physaddr_bits=3), vm2.Arm64SveVls(flags=1), vm2.Arm64Granule(page_shift=13)]
    decoded = read(*(a.pack() for a in attrs), plans=plans_for(arch))
    assert errors(decoded) == [(0, 2, "ENOENT", 0), (1, 7, "note", 0), (2, 8, "ENOENT", 0)]


def test_a_size_is_no_flag_where_attribute_2_is_unknown():
    skip_in_the_size = struct.pack("=II", 2, 1 << 16 | 8)
    assert errors(read(skip_in_the_size, plans=plans_for("x86_64"))) == [(0, 2, "ENOENT", 0)]


# ---- the report's place


def test_the_report_is_found_although_its_header_is_wrong():
    for size, flags in ((24, 0x100), (25, 0), (4104, 0)):
        attr = vm2.Report(size=size, flags=flags, records=0x7000, capacity=2).pack()
        decoded = read(attr.ljust(max(size, 24), b"\0"))
        assert decoded.report == (FIRST, 0x7000, 2), (size, flags)
        assert len(decoded.findings) == 1


def test_a_report_that_is_too_short_is_none():
    decoded = read(vm2.Report(size=16, records=0x7000, capacity=2).pack())
    assert decoded.report is None


def test_of_two_reports_the_first_is_used():
    first, second = vm2.Report(records=0x7000, capacity=2), vm2.Report(records=0x8000, capacity=3)
    decoded = read(first.pack(), second.pack())
    assert decoded.report[1:] == (0x7000, 2)
    assert errors(decoded) == [(1, 3, "EEXIST", 0)]


def test_a_report_behind_a_wrong_attribute_is_found():
    decoded = read(header(99, 8), vm2.Report(records=0x7000, capacity=2).pack())
    assert decoded.report[1:] == (0x7000, 2)

"""Every size rule: older, newer and wrong sizes of an attribute."""

import struct

import pytest

from kvm2.abi import vm2
from kvm2.abi.attrs import make_plans
from kvm2.abi.layout import Structure, field, u16, u32, u64
from kvm2.abi.wire import decode

from ..memory_image import LIST as BASE
from ..memory_image import list_image

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


# ---- sizes


@pytest.mark.parametrize("size", [*range(16), 17, 20, 23, 25, 4095, 4097])
def test_sizes_that_no_attribute_has(size):
    attr = header(9, size).ljust(max(size, 8), b"\0")
    assert errors(read(attr)) == [(0, 9, "EINVAL", 4)]


@pytest.mark.parametrize("size", [4104, 8192, 0xFFF8])
def test_an_attribute_that_is_too_long(size):
    assert errors(read(header(9, size).ljust(size, b"\0"))) == [(0, 9, "E2BIG", 4)]


@pytest.mark.parametrize("size", [0, 1, 8, 63, 65, 127, 1023, 1025, 0xFFFF])
def test_bits_of_capabilities_that_are_not_words(size):
    assert errors(read(header(1, size).ljust(2048, b"\0"))) == [(0, 1, "EINVAL", 4)]


@pytest.mark.parametrize("size", [1088, 2048, 0xFFC0])
def test_too_many_bits_of_capabilities(size):
    assert errors(read(header(1, size).ljust(0x3000, b"\0"))) == [(0, 1, "E2BIG", 4)]


@pytest.mark.parametrize("words", range(1, 17))
def test_more_words_of_capabilities(words):
    attr = header(1, 64 * words) + struct.pack("=Q", 3) + bytes(8 * (words - 1))
    decoded = read(attr)
    assert decoded.findings == ()
    assert decoded.entries[1].values == (3,)


@pytest.mark.parametrize("word", range(1, 16))
def test_a_later_word_of_capabilities(word):
    payload = bytearray(8 * 16)
    payload[8 * word + 5] = 0x80
    decoded = read(header(1, 1024) + bytes(payload))
    assert errors(decoded) == [(0, 1, "E2BIG", 8 + 8 * word)]
    assert decoded.findings[0].path == f"attrs[0].capabilities[{word}]"
    assert decoded.findings[0].value == 0x80 << 40


@pytest.mark.parametrize("attr", [a for a in ONE_OF_EACH if a.type > 2], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("words", range(1, 9))
def test_grown_by_zeros(attr, words):
    data = bytearray(attr.pack() + bytes(8 * words))
    data[4:6] = struct.pack("=H", len(data))
    decoded = read(bytes(data))
    assert decoded.findings == ()
    assert decoded.attributes == (attr,)


@pytest.mark.parametrize("attr", [a for a in ONE_OF_EACH if a.type > 2], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("words", range(1, 9))
def test_grown_by_something_else(attr, words):
    data = bytearray(attr.pack() + bytes(8 * words))
    data[4:6] = struct.pack("=H", len(data))
    data[-1] = 1
    decoded = read(bytes(data))
    assert errors(decoded) == [(0, attr.type, "E2BIG", attr.SIZE + 8 * (words - 1))]


def test_the_longest_attribute():
    assert read(header(4, 4096).ljust(4096, b"\0")).findings == ()
    assert errors(read(header(4, 4096).ljust(4095, b"\0") + b"\1")) == [(0, 4, "E2BIG", 4088)]


class GrownMaxVcpus(Structure, c_name="kvm_create_vm_attr_max_vcpus"):
    """What attribute 9 may become: two more words."""

    type: u32 = field(default=9)
    size: u16 = field(default=32)
    flags: u16 = 0
    max_vcpus: u32 = 0
    pad: u32 = 0
    max_vcpu_id: u64 = 0
    hotplug: u64 = 0


def grown_plans():
    row = vm2.ATTRIBUTES[9]._replace(cls=GrownMaxVcpus, known=32, published=16)
    return make_plans([row])


@pytest.mark.parametrize(("size", "values"), [(16, (5, 0, 0, 0)), (24, (5, 0, 6, 0)), (32, (5, 0, 6, 7))])
def test_an_older_caller_is_filled_up_with_zeros(size, values):
    data = header(9, size) + struct.pack("=IIQQ", 5, 0, 6, 7)[: size - 8]
    decoded = read(data, plans=grown_plans())
    assert decoded.findings == ()
    assert decoded.entries[9].values == values


@pytest.mark.parametrize("size", [8])
def test_below_the_first_published_size(size):
    assert errors(read(header(9, size).ljust(32, b"\0"), plans=grown_plans())) == [(0, 9, "EINVAL", 4)]


@pytest.mark.parametrize(("last", "expected"), [(0, []), (1, [(0, 9, "E2BIG", 32)])])
def test_a_caller_newer_than_the_grown_host(last, expected):
    data = header(9, 40) + bytes(24) + bytes([last]) + bytes(7)
    assert errors(read(data, plans=grown_plans())) == expected

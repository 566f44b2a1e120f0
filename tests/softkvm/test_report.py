"""The REPORT attribute: what is written, when, and what happens when it cannot be."""

import errno
import struct

import pytest

from kvm2.abi import vm2
from kvm2.abi.findings import read_records
from kvm2.errors import KvmError
from kvm2.softkvm import creation, profile

from ..memory_image import FIRST, LIST, STEP, list_image

RECORDS = 0x700000
BIG, M1 = "max-4k-6.12", "apple-m1"
COUNT = 20


def setup(*attrs, room=8, read_only=False, records=RECORDS, capacity=None, size=24, flags=0):
    """A list whose first attribute is a REPORT with `room` records of memory."""
    report = vm2.Report(records=records, capacity=room if capacity is None else capacity, size=size, flags=flags)
    raw = [report.pack().ljust(size, b"\0"), *(a if isinstance(a, bytes) else a.pack() for a in attrs)]
    memory = list_image(*raw)
    if room:
        memory.ranges[RECORDS] = bytearray(b"\xaa" * (192 * room))
    if read_only:
        memory.read_only = frozenset({RECORDS})
    return memory


def create(name, memory):
    return creation.create_vm2(profile.load(name), memory, LIST)


def refused(name, memory):
    with pytest.raises(KvmError) as caught:
        create(name, memory)
    return caught.value


def count(memory):
    return struct.unpack_from("=I", memory.ranges[FIRST], COUNT)[0]


def test_nothing_to_report():
    memory = setup()
    create(BIG, memory)
    assert count(memory) == 0
    assert set(memory.ranges[RECORDS]) == {0xAA}


def test_every_finding_is_written():
    memory = setup(vm2.Arm64PhysaddrSize(physaddr_bits=48), vm2.MaxVcpus(pad=1), vm2.Arm64Granule(page_shift=16))
    error = refused(M1, memory)
    assert count(memory) == 3
    assert read_records(memory.ranges[RECORDS], 3, 8) == error.findings
    assert set(memory.ranges[RECORDS][3 * 192 :]) == {0xAA}
    assert error.errno == errno.EOPNOTSUPP


def test_the_count_goes_on_beyond_the_room():
    memory = setup(vm2.Arm64PhysaddrSize(physaddr_bits=48), vm2.MaxVcpus(pad=1), room=1)
    error = refused(M1, memory)
    assert count(memory) == 2
    assert read_records(memory.ranges[RECORDS], 2, 1) == error.findings[:1]


def test_no_room_at_all():
    memory = setup(vm2.MaxVcpus(pad=1), vm2.Arm64PhysaddrSize(physaddr_bits=36), room=0, records=0)
    assert refused(M1, memory).errno == errno.EINVAL
    assert count(memory) == 1


def test_nothing_but_the_report_is_written():
    memory = setup(vm2.MaxVcpus(pad=1))
    refused(BIG, memory)
    assert memory.writes == [(RECORDS, 192), (FIRST + COUNT, 4)]


def test_a_note_is_reported_on_success():
    memory = setup(vm2.AttrHdr(type=77, flags=1), vm2.Arm64SveVls(vls=(5,) + (0,) * 7, flags=2))
    create(BIG, memory)
    notes = read_records(memory.ranges[RECORDS], count(memory), 8)
    assert [(n.attr_index, n.attr_type, n.error) for n in notes] == [(1, 77, 0), (2, 7, 0)]
    assert "skipped" in notes[0].message and "skipped" in notes[1].message


def test_records_that_cannot_be_written():
    memory = setup(vm2.MaxVcpus(pad=1), read_only=True)
    error = refused(BIG, memory)
    assert error.errno == errno.EFAULT
    assert [(f.attr_type, f.error) for f in error.findings] == [(9, errno.EINVAL), (3, errno.EFAULT)]


def test_records_that_are_not_needed_may_be_anywhere():
    memory = setup(records=0xBAD0000)
    create(BIG, memory)
    assert count(memory) == 0


def test_a_count_that_cannot_be_written_refuses_a_vm_that_could_be_had():
    memory = setup()
    memory.read_only = frozenset({FIRST})
    assert refused(BIG, memory).errno == errno.EFAULT


def test_a_report_next_to_an_unreadable_attribute():
    memory = setup(b"", vm2.MaxVcpus(pad=1))
    assert refused(BIG, memory).errno == errno.EFAULT
    assert count(memory) == 2


def test_a_report_in_a_list_that_is_too_long():
    memory = setup(*[vm2.AttrHdr(type=1000 + i, flags=1) for i in range(64)], room=70)
    assert refused(BIG, memory).errno == errno.E2BIG
    assert read_records(memory.ranges[RECORDS], 1, 1)[0].path == "nr_attrs"


@pytest.mark.parametrize(("size", "flags", "error"), [(24, 4, errno.EINVAL), (28, 0, errno.EINVAL)])
def test_a_report_whose_header_is_wrong_is_written(size, flags, error):
    memory = setup(size=size, flags=flags)
    assert refused(BIG, memory).errno == error
    assert count(memory) == 1


def test_a_report_from_the_future_is_written():
    memory = setup(size=32)
    memory.ranges[FIRST][31] = 1
    assert refused(BIG, memory).errno == errno.E2BIG
    assert count(memory) == 1


def test_the_first_of_two_reports():
    second = vm2.Report(records=RECORDS + 192, capacity=1)
    memory = setup(second)
    assert refused(BIG, memory).errno == errno.EEXIST
    assert count(memory) == 1
    assert struct.unpack_from("=I", memory.ranges[FIRST + STEP], COUNT)[0] == 0


def test_reads_come_before_the_first_write():
    class Ordered(type(list_image())):
        def read(self, address, size):
            assert not self.writes
            return super().read(address, size)

    memory = setup(vm2.MaxVcpus(pad=1), vm2.Arm64Granule(page_shift=13))
    memory.__class__ = Ordered
    refused(BIG, memory)
    assert memory.writes


def test_the_input_value_of_count_does_not_matter():
    memory = setup()
    memory.ranges[FIRST][COUNT:24] = b"\xff" * 4
    create(BIG, memory)
    assert count(memory) == 0


def test_a_report_of_a_dry_run():
    memory = setup(vm2.DryRun(), vm2.Arm64PhysaddrSize(physaddr_bits=48))
    refused(M1, memory)
    assert count(memory) == 1

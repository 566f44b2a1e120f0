import pytest

from kvm2 import exits
from kvm2.abi import exits as abi
from kvm2.errors import UsageError


def area_with(reason: int, payload: bytes = b"") -> memoryview:
    area = bytearray(2 * 4096)
    area[abi.EXIT_REASON_OFFSET : abi.EXIT_REASON_OFFSET + 4] = reason.to_bytes(4, "little")
    area[abi.UNION_OFFSET : abi.UNION_OFFSET + len(payload)] = payload
    return memoryview(area)


def test_the_fast_unpacking_is_the_declared_layout():
    area = area_with(6, abi.Mmio(0x1122334455667788, b"abcdefgh", 4, 1).pack())
    assert exits.MMIO.unpack_from(area) == (0x1122334455667788, b"abcdefgh", 4, 1)
    area = area_with(2, abi.Io(1, 2, 0x3F8, 5, 4096).pack())
    area[4096:4104] = b"abcdefgh"
    assert exits.IO.unpack_from(area) == (1, 2, 0x3F8, 5, 4096, b"abcdefgh")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_read_takes_exactly_its_bytes(size):
    area = area_with(6, abi.Mmio(0x9000000, b"\xff" * 8, size, 0).pack())
    exit = exits.decode(area)
    assert (exit.address, exit.size, exit.is_write) == (0x9000000, size, False)
    exit.reply((1 << 8 * size) - 2)
    assert abi.Mmio.unpack(area, abi.UNION_OFFSET).data == (b"\xfe" + b"\xff" * 7)
    exit.reply(bytes(size))
    assert abi.Mmio.unpack(area, abi.UNION_OFFSET).data == bytes(size) + b"\xff" * (8 - size)
    for wrong in (1 << 8 * size, -1, bytes(size + 1), b"", None, "x" * size, 1.5, [0] * size):
        with pytest.raises(UsageError, match=str(size)):
            exit.reply(wrong)


def test_mmio_write_gives_only_its_bytes_and_takes_no_reply():
    exit = exits.decode(area_with(6, abi.Mmio(0x10, b"\x01\x02\x03\x04junk", 4, 1).pack()))
    assert exit.data == b"\1\2\3\4" and exit.value == 0x04030201
    with pytest.raises(UsageError, match="takes no reply"):
        exit.reply(0)
    match exit:
        case exits.Mmio(address, 4, True):
            assert address == 0x10
        case _:
            pytest.fail("Mmio does not match positionally")


@pytest.mark.parametrize(
    ("kind", "name", "ends"),
    [(1, "shutdown", True), (2, "reset", True), (3, "crash", True), (4, "wakeup", False), (5, "suspend", False)],
)
def test_system_events(kind, name, ends):
    exit = exits.decode(area_with(24, abi.SystemEvent(kind, 2, (7, 8) + (0,) * 14).pack()))
    assert (exit.type, exit.name, exit.ends, exit.data) == (kind, name, ends, (7, 8))


def test_a_count_beyond_the_array_is_not_believed():
    assert len(exits.decode(area_with(24, abi.SystemEvent(1, 0xFFFFFFFF).pack())).data) == 16
    assert len(exits.decode(area_with(17, abi.InternalError(1, 99).pack())).data) == 16


def test_the_other_exits_have_their_fields():
    nisv = exits.decode(area_with(28, abi.ArmNisv(0x45, 1 << 40).pack()))
    assert (nisv.esr_iss, nisv.fault_ipa) == (0x45, 1 << 40)
    fault = exits.decode(area_with(39, abi.MemoryFault(8, 0x1000, 0x2000).pack()))
    assert (fault.flags, fault.gpa, fault.size) == (8, 0x1000, 0x2000)
    call = exits.decode(area_with(3, abi.Hypercall(0x84000001, (1, 2, 3, 4, 5, 6), 0, 1).pack()))
    assert (call.nr, call.args, call.flags) == (0x84000001, (1, 2, 3, 4, 5, 6), 1)
    failure = exits.decode(area_with(9, abi.FailEntry(1, 3).pack()))
    assert (failure.reason, failure.cpu, failure.ends) == (1, 3, True)
    debug = exits.decode(area_with(4, abi.Debug(abi.DebugExitArch(0xF2000000, 1, 0x40)).pack()))
    assert (debug.hsr, debug.far) == (1 << 32 | 0xF2000000, 0x40)
    assert isinstance(exits.decode(area_with(10)), exits.Interrupted)


@pytest.mark.parametrize(("reason", "kind"), [(5, "hlt"), (31, "dirty_ring_full"), (200, "200")])
def test_an_exit_without_a_class_keeps_its_number_and_bytes(reason, kind):
    exit = exits.decode(area_with(reason, b"xyz"))
    assert (exit.reason, exit.kind, exit.payload[:3], len(exit.payload)) == (reason, kind, b"xyz", 256)

"""Exits of x86-64 from areas that were filled by hand; the real ones are in execution/test_x86.py."""

import pytest

from kvm2 import exits, x86_exits
from kvm2.abi import exits as abi
from kvm2.abi.structs_x86 import DebugExitArch
from kvm2.errors import UsageError
from kvm2.exits import decode

DATA = 4096


def area_with(reason, payload=b"", data=b""):
    area = bytearray(2 * 4096)
    area[abi.EXIT_REASON_OFFSET : abi.EXIT_REASON_OFFSET + 4] = reason.to_bytes(4, "little")
    area[abi.UNION_OFFSET : abi.UNION_OFFSET + len(payload)] = payload
    area[DATA : DATA + len(data)] = data
    return memoryview(area)


def io(direction, size, port, count, data=b"", at=DATA):
    return decode(area_with(abi.KVM_EXIT_IO, abi.Io(direction, size, port, count, at).pack(), data), "x86_64")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_port_write(size):
    exit = io(abi.KVM_EXIT_IO_OUT, size, 0x3F8, 1, b"\x11\x22\x33\x44junk")
    assert (exit.port, exit.size, exit.count, exit.is_write) == (0x3F8, size, 1, True)
    assert exit.data == b"\x11\x22\x33\x44"[:size]
    assert exit.value == int.from_bytes(exit.data, "little") and exit.values == (exit.value,)
    with pytest.raises(UsageError, match="takes no reply"):
        exit.reply(0)
    match exit:
        case exits.Io(port, s, True):
            assert (port, s) == (0x3F8, size)
        case _:
            pytest.fail("Io does not match positionally")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_port_read_takes_exactly_its_bytes(size):
    area = area_with(abi.KVM_EXIT_IO, abi.Io(abi.KVM_EXIT_IO_IN, size, 0xFFFF, 1, DATA).pack(), b"\xff" * 8)
    exit = decode(area, "x86_64")
    assert exit.is_write is False and exit.port == 0xFFFF
    exit.reply((1 << 8 * size) - 2)
    assert area[DATA : DATA + 8] == b"\xfe" + b"\xff" * 7
    exit.reply(bytes(size))
    assert area[DATA : DATA + 8] == bytes(size) + b"\xff" * (8 - size)
    for wrong in (None, "x", 1.5, 1 << 8 * size, -1, bytes(size + 1), b""):
        with pytest.raises(UsageError, match=str(size)):
            exit.reply(wrong)


def test_string_io_is_many_accesses_at_once():
    exit = io(abi.KVM_EXIT_IO_OUT, 2, 0x10, 5, b"aabbccddee")
    assert exit.data == b"aabbccddee" and exit.values[1] == 0x6262 and len(exit.values) == 5
    with pytest.raises(UsageError, match="5 accesses"):
        _ = exit.value
    area = area_with(abi.KVM_EXIT_IO, abi.Io(abi.KVM_EXIT_IO_IN, 1, 0x10, 20, DATA).pack())
    exit = decode(area, "x86_64")
    with pytest.raises(UsageError, match="reply with 20 bytes"):
        exit.reply(5)
    exit.reply(bytes(range(20)))
    assert area[DATA : DATA + 21] == bytes(range(20)) + b"\0"


def test_an_area_that_no_kvm_makes_is_not_guessed_at():
    with pytest.raises(ValueError, match="data_offset is 0x2000"):
        io(abi.KVM_EXIT_IO_OUT, 1, 0x10, 1, at=0x2000)


def test_what_an_exit_says_stays_when_the_area_changes():
    area = area_with(abi.KVM_EXIT_IO, abi.Io(abi.KVM_EXIT_IO_OUT, 1, 0x10, 1, DATA).pack(), b"A")
    exit = decode(area, "x86_64")
    area[DATA] = 66
    assert exit.data == b"A"


@pytest.mark.parametrize(
    ("reason", "payload", "kind", "fields", "ends"),
    [
        (abi.KVM_EXIT_HLT, b"", "Hlt", {}, False),
        (abi.KVM_EXIT_SHUTDOWN, b"", "Shutdown", {}, True),
        (abi.KVM_EXIT_IRQ_WINDOW_OPEN, b"", "IrqWindowOpen", {}, False),
        (abi.KVM_EXIT_SET_TPR, b"", "SetTpr", {"cr8": 5}, False),
        (
            abi.KVM_EXIT_TPR_ACCESS,
            abi.TprAccess(0x1000, 1).pack(),
            "TprAccess",
            {"rip": 0x1000, "is_write": True},
            False,
        ),
        (abi.KVM_EXIT_IOAPIC_EOI, abi.Eoi(0x31).pack(), "IoapicEoi", {"vector": 0x31}, False),
        (abi.KVM_EXIT_NOTIFY, abi.Notify(1).pack(), "Notify", {"flags": 1}, False),
        (abi.KVM_EXIT_X86_BUS_LOCK, b"", "BusLock", {}, False),
        (abi.KVM_EXIT_UNKNOWN, abi.Hw(0x21).pack(), "UnknownExit", {"reason": 0x21}, True),
        (
            abi.KVM_EXIT_DEBUG,
            DebugExitArch(1, pc=0x40, dr6=0xFFFF4FF0, dr7=0x400).pack(),
            "DebugException",
            {"exception": 1, "pc": 0x40, "dr6": 0xFFFF4FF0, "dr7": 0x400},
            False,
        ),
    ],
)
def test_the_other_exits_have_their_fields(reason, payload, kind, fields, ends):
    area = area_with(reason, payload)
    area[abi.Run.LAYOUT.at("cr8").offset] = 5
    exit = decode(area, "x86_64")
    assert type(exit) is getattr(x86_exits, kind) and exit.ends is ends
    assert {name: getattr(exit, name) for name in fields} == fields
    assert exit.kind == abi.name_of(reason).removeprefix("KVM_EXIT_").lower()


@pytest.mark.parametrize("reason", [abi.KVM_EXIT_HYPERV, abi.KVM_EXIT_DIRTY_RING_FULL, 200])
def test_an_exit_without_a_class_keeps_its_number(reason):
    assert decode(area_with(reason), "x86_64").reason == reason


def test_msr_accesses_are_answered_or_refused():
    read = area_with(abi.KVM_EXIT_X86_RDMSR, abi.Msr(0, reason=2, index=0x1234).pack())
    exit = decode(read, "x86_64")
    assert (exit.index, exit.is_write, exit.reason) == (0x1234, False, 2)
    exit.fault()
    assert abi.Msr.unpack(read, abi.UNION_OFFSET).error == 1
    exit.reply(1 << 63)
    answered = abi.Msr.unpack(read, abi.UNION_OFFSET)
    assert (answered.error, answered.data) == (0, 1 << 63)
    with pytest.raises(UsageError, match="64 bits"):
        exit.reply(1 << 64)
    with pytest.raises(UsageError, match="64 bits"):
        exit.reply(b"1234")
    write = decode(area_with(abi.KVM_EXIT_X86_WRMSR, abi.Msr(index=0x10, data=7).pack()), "x86_64")
    assert (write.index, write.value, write.is_write) == (0x10, 7, True)
    with pytest.raises(UsageError, match="takes no reply"):
        write.reply(0)


def test_the_instruction_that_could_not_be_emulated():
    said = abi.EmulationFailure(1, 4, flags=1, insn_size=2, insn_bytes=b"\x0f\x0b".ljust(15, b"\0"))
    assert decode(area_with(abi.KVM_EXIT_INTERNAL_ERROR, said.pack()), "x86_64").instruction == b"\x0f\x0b"
    for silent in (abi.InternalError(1, 0), abi.InternalError(3, 4, (1, 2, 3, 4) + (0,) * 12), abi.InternalError(1, 3)):
        assert decode(area_with(abi.KVM_EXIT_INTERNAL_ERROR, silent.pack()), "x86_64").instruction == b""

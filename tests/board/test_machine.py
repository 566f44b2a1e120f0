import errno
import struct
import threading

import pytest

from kvm2.abi import exits as abi
from kvm2.abi import ioctls, vm2
from kvm2.board import loop
from kvm2.board import machine as board
from kvm2.board.loader import Image, Segment
from kvm2.board.machine import Machine
from kvm2.errors import KvmError, UsageError
from kvm2.kvm import Kvm
from kvm2.spec import MemoryRange, VmSpec

RAM = (MemoryRange(1 << 30, 1 << 20),)


@pytest.fixture
def kvm(fake):
    def get_attr(fd, arg):
        import ctypes

        number, size, address = struct.unpack("=IIQ", ctypes.string_at(arg, 16))
        value = {2: vm2.Arm64PhysaddrSize(physaddr_bits=36), 8: vm2.Arm64Granule(page_shift=14)}[number]
        ctypes.memmove(address, value.pack(), size)
        return 0

    zero = lambda fd, arg: 0  # noqa: E731
    for call in ("KVM_ARM_PREFERRED_TARGET", "KVM_ARM_VCPU_INIT", "KVM_SET_ONE_REG", "KVM_GET_ONE_REG"):
        fake.answers[getattr(ioctls, call)] = zero
    fake.answers[ioctls.KVM_VM2_GET_ATTR] = get_attr
    fake.answers[ioctls.KVM_CREATE_VM2] = lambda fd, arg: fake.new()
    fake.answers[ioctls.KVM_CHECK_EXTENSION] = lambda fd, arg: 48
    with Kvm(fake, "fake") as kvm:
        yield kvm


@pytest.fixture
def machine(kvm):
    with Machine(kvm, VmSpec(memory=RAM)) as machine:
        yield machine


def image(*segments):
    return Image("guest", segments[0].address, segments)


def test_the_uart_and_everything_else(machine, fake, mmio):
    fake.play(
        [
            mmio(0x09000000, 4, b"H\0\0\0"),
            mmio(0x09000000, 1, b"i"),
            mmio(0x09000018, 4),
            mmio(0x0A000000, 8),
            mmio(0x0A000000, 8),
            mmio(0x0B000000, 2, b"xy"),
        ]
    )
    result = machine.run()
    assert result.ended == "shutdown" and result.ok and result.console == b"Hi"
    assert result.exits == {"mmio_read": 3, "mmio_write": 3, "system_event": 1}
    assert result.unclaimed_count == 3
    assert result.unclaimed == (
        board.Unclaimed(0x0A000000, 8, False, 2),
        board.Unclaimed(0x0B000000, 2, True, 1),
    )


def test_a_read_of_nothing_is_zero_whatever_lay_there(machine, fake):
    seen = []

    def read(area):
        payload = abi.Mmio(0x0A000000, b"\xff" * 8, 4, 0).pack()
        fake.exit(area, abi.KVM_EXIT_MMIO, payload)

    def look(area):
        seen.append(bytes(area[abi.UNION_OFFSET + 8 : abi.UNION_OFFSET + 16]))
        fake.exit(area, abi.KVM_EXIT_SYSTEM_EVENT, abi.SystemEvent(type=2).pack())

    fake.script = iter([read, look])
    assert machine.run().ended == "reset"
    assert seen == [b"\0\0\0\0\xff\xff\xff\xff"]


def test_the_table_of_unclaimed_addresses_is_bounded(machine, fake, mmio):
    fake.play([mmio(0x10000 + 8 * i, 8) for i in range(600)])
    result = machine.run()
    assert len(result.unclaimed) == loop.UNCLAIMED_KEPT and result.unclaimed_count == 600


def test_the_console_is_bounded_and_live(kvm, fake, mmio, monkeypatch):
    monkeypatch.setattr(loop, "CONSOLE_KEPT", 8)
    sent = []
    with Machine(kvm, VmSpec(memory=RAM), sink=sent.append) as machine:
        fake.play([mmio(0x09000000, 1, bytes([65 + i % 26])) for i in range(40)])
        result = machine.run()
    assert len(sent) == 40 and len(result.console) <= 16 and bytes(sent).endswith(result.console)


@pytest.mark.parametrize(
    ("reason", "payload", "ended"),
    [
        (abi.KVM_EXIT_SYSTEM_EVENT, abi.SystemEvent(type=1), "shutdown"),
        (abi.KVM_EXIT_SYSTEM_EVENT, abi.SystemEvent(type=2), "reset"),
        (abi.KVM_EXIT_SYSTEM_EVENT, abi.SystemEvent(type=3), "crash"),
        (abi.KVM_EXIT_SYSTEM_EVENT, abi.SystemEvent(type=5), "suspend"),
        (abi.KVM_EXIT_INTERNAL_ERROR, abi.InternalError(1, 1, (5,) * 16), "failed"),
        (abi.KVM_EXIT_ARM_NISV, abi.ArmNisv(1, 0x1000), "failed"),
        (99, abi.ArmNisv(), "failed"),
    ],
)
def test_how_a_run_ends(machine, fake, reason, payload, ended):
    fake.play([(reason, payload.pack())])
    result = machine.run()
    assert result.ended == ended and result.ok == (ended in ("shutdown", "reset"))
    assert bool(result.reason) == (not result.ok)


def test_a_refused_run_is_told_with_its_error(machine, fake):
    def refuse(area):
        raise KvmError(errno.ENOSYS, "no syndrome")

    fake.script = iter([refuse])
    result = machine.run()
    assert result.ended == "failed" and "ENOSYS: no syndrome" in result.reason and result.error.errno == errno.ENOSYS


def test_a_defect_of_ours_is_not_taken_for_the_guests(machine, fake):
    def break_down(area):
        raise ZeroDivisionError("ours")

    fake.script = iter([break_down])
    with pytest.raises(ZeroDivisionError):
        machine.run()


class Spin:
    """A guest that never exits, until it is kicked."""

    def __init__(self):
        self.entered = threading.Event()

    def __call__(self, area):
        self.entered.set()
        while not area[abi.IMMEDIATE_EXIT_OFFSET]:
            threading.Event().wait(0.001)
        raise KvmError(errno.EINTR)


def test_a_timeout_stops_a_guest_that_spins(machine, fake):
    fake.script = iter([Spin()])
    result = machine.run(timeout=0.05)
    assert result.ended == "timeout" and not result.ok and 0.05 <= result.seconds < 5


def test_an_interrupt_stops_the_vcpus_and_carries_the_result(machine, fake, monkeypatch):
    fake.script = iter([Spin()])

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        machine.run()
    assert caught.value.args[0].ended == "interrupted"
    assert not any(thread.name.startswith("vcpu") for thread in threading.enumerate())


def test_an_interrupt_while_the_vcpus_are_being_started(machine, fake, monkeypatch):
    """The guest may already have said something by which somebody presses Ctrl-C."""
    fake.script = iter([Spin()])
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        machine.run()
    assert caught.value.args[0].ended == "interrupted"
    assert not any(thread.name.startswith("vcpu") for thread in threading.enumerate())


def test_the_parameter_block_lies_in_the_last_page_that_is_free(machine):
    first = MemoryRange(1 << 30, 1 << 20)
    assert machine.load(image(Segment(first.base, b"code", 4))) == first.end - 4096
    block = machine.vm.read(first.end - 4096, 88)
    assert block[:8] == b"KVM2PARM" and struct.unpack_from("<IIII", block, 16) == (36, 48, 14, 1)
    assert machine.load(image(Segment(first.base, b"code", 1 << 20))) == 0
    assert machine.load(image(Segment(first.base, b"code", (1 << 20) - 4095))) == 0
    assert machine.load(image(Segment(first.base, b"code", (1 << 20) - 4096))) == first.end - 4096
    assert machine.load(image(Segment(first.base, b"code", 4)), params=False) == 0


def test_a_full_first_range_leaves_the_second(kvm):
    spec = VmSpec(memory=(MemoryRange(1 << 30, 1 << 16), MemoryRange(1 << 31, 1 << 16)))
    with Machine(kvm, spec) as machine:
        full = Segment(1 << 30, b"code", 1 << 16)
        assert machine.load(image(full)) == (1 << 31) + (1 << 16) - 4096


def test_the_top_slot_ends_at_the_limit_unless_ram_does(kvm, fake):
    with Machine(kvm, VmSpec(memory=RAM), top=True) as machine:
        assert machine.top == MemoryRange((1 << 36) - 65536, 65536)
        assert fake.slots[1][:2] == ((1 << 36) - 65536, 65536)
    reaching = MemoryRange((1 << 36) - (1 << 20), 1 << 20)
    with Machine(kvm, VmSpec(memory=(*RAM, reaching)), top=True) as machine:
        assert machine.top is None and len(machine.rams) == 2


@pytest.mark.parametrize(
    ("memory", "what"),
    [
        ((MemoryRange(0x08F00000, 1 << 21),), "covers the UART"),
        ((MemoryRange(0x09000FFF, 1),), "covers the UART"),
        ((MemoryRange(0, 1 << 20), MemoryRange((1 << 20) - 1, 1)), "overlap"),
        ((MemoryRange(0, 0),), "above 0"),
        ((MemoryRange((1 << 64) - 1, 2),), "within 64 bits"),
    ],
)
def test_memory_maps_that_cannot_be(memory, what):
    with pytest.raises(UsageError, match=what):
        board.check_memory(memory)


def test_secondaries_are_powered_off_and_vcpus_have_sve_when_asked(kvm, fake):
    import ctypes

    inits = []
    fake.answers[ioctls.KVM_ARM_VCPU_INIT] = lambda fd, arg: (
        inits.append(struct.unpack_from("=II", ctypes.string_at(arg, 32))[1]) or 0
    )
    finalized = []
    fake.answers[ioctls.KVM_ARM_VCPU_FINALIZE] = lambda fd, arg: finalized.append(arg) or 0
    with Machine(kvm, VmSpec(memory=RAM, sve="vcpu"), cpus=3):
        assert inits == [1 << 2 | 1 << 4, 1 << 0 | 1 << 2 | 1 << 4, 1 << 0 | 1 << 2 | 1 << 4]
        assert len(finalized) == 3

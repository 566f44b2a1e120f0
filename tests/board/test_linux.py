import ctypes
import errno
import struct

import pytest

import kvm2
from kvm2.abi import exits as abi
from kvm2.abi import ioctls, onereg, vm2
from kvm2.board import linux_layout as layout
from kvm2.board.fdt import read_fdt
from kvm2.board.kernel_image import parse_kernel
from kvm2.board.linux import LinuxMachine
from kvm2.board.loader import Image, Segment
from kvm2.board.pl011 import CR, DR, IMSC, RIS_RT
from kvm2.board.virtio.rng import Rng
from kvm2.errors import EnvironmentFault, KvmError, UsageError
from kvm2.kvm import Kvm
from kvm2.registers import register_id
from kvm2.spec import MemoryRange, VmSpec

GIB = 1 << 30
MPIDR = register_id("MPIDR_EL1")
HEADER = struct.pack("<2I3Q24s4sI", 0, 0, 0x1000, 0x20000, 0b1010, bytes(24), b"ARM\x64", 0)
KERNEL = parse_kernel("Image", HEADER + b"kernel" * 100)


@pytest.fixture
def lines():
    """KVM_IRQ_LINE: (irq, level), in order."""
    return []


@pytest.fixture
def written():
    """KVM_SET_ONE_REG of core registers: what went where."""
    return {}


@pytest.fixture
def kvm(fake, lines, written):
    """A host whose vCPUs are numbered by MPIDR, that makes any vGIC."""
    ids = {}

    def create_vcpu(fd, arg):
        ids[new := fake.new()] = arg
        return new

    def get_attr(fd, arg):
        _, size, address = struct.unpack("=IIQ", ctypes.string_at(arg, 16))
        ctypes.memmove(address, vm2.Arm64PhysaddrSize(physaddr_bits=48).pack(), size)
        return 0

    def get_reg(fd, arg):
        number, address = struct.unpack("=QQ", ctypes.string_at(arg, 16))
        value = 1 << 31 | ids[fd] if number == MPIDR else 0
        ctypes.memmove(address, value.to_bytes(onereg.size_of(number), "little"), onereg.size_of(number))
        return 0

    def set_reg(fd, arg):
        number, address = struct.unpack("=QQ", ctypes.string_at(arg, 16))
        written[ids[fd], number] = int.from_bytes(ctypes.string_at(address, 8), "little")
        return 0

    def create_device(fd, arg):
        if not struct.unpack("=III", ctypes.string_at(arg, 12))[2]:  # else KVM_CREATE_DEVICE_TEST
            ctypes.memmove(arg + 4, struct.pack("=I", fake.new()), 4)
        return 0

    def irq_line(fd, arg):
        lines.append(struct.unpack("=II", ctypes.string_at(arg, 8)))
        return 0

    zero = lambda fd, arg: 0  # noqa: E731
    for call in ("KVM_ARM_PREFERRED_TARGET", "KVM_ARM_VCPU_INIT", "KVM_SET_DEVICE_ATTR"):
        fake.answers[getattr(ioctls, call)] = zero
    fake.answers[ioctls.KVM_CREATE_VM2] = lambda fd, arg: fake.new()
    fake.answers[ioctls.KVM_VM2_GET_ATTR] = get_attr
    fake.answers[ioctls.KVM_CREATE_VCPU] = create_vcpu
    fake.answers[ioctls.KVM_GET_ONE_REG] = get_reg
    fake.answers[ioctls.KVM_SET_ONE_REG] = set_reg
    fake.answers[ioctls.KVM_CREATE_DEVICE] = create_device
    fake.answers[ioctls.KVM_IRQ_LINE] = irq_line
    with Kvm(fake, "fake") as kvm:
        yield kvm


def machine_with(kvm, *pieces, **options):
    return LinuxMachine(kvm, VmSpec(memory=pieces or (MemoryRange(GIB, 64 << 20),)), **options)


@pytest.fixture
def machine(kvm):
    with machine_with(kvm, cpus=2, virtio=[Rng()]) as machine:
        yield machine


def test_its_devices_and_tree_are_there_before_a_kernel_is(machine):
    assert list(machine.devices) == ["uart", "rtc", "virtio0"]
    tree = read_fdt(machine.dtb)
    assert list(tree.node("/cpus").children) == ["cpu@0", "cpu@1"]
    assert tree.node("/virtio_mmio@a000000").numbers("interrupts") == (0, 16, 4)
    assert tree.root.texts("model") == ("kvm2 fake",)


@pytest.mark.parametrize("base", [GIB, 1 << 40, 1 << 47])
def test_a_kernel_is_loaded_as_it_wants_it(kvm, written, base):
    with machine_with(kvm, MemoryRange(base, 64 << 20)) as machine:
        placed = machine.load_linux(KERNEL, b"initrd" * 1000, "console=ttyAMA0", kaslr=True)
        assert placed.kernel == base + 0x1000 and machine.vm.read(placed.kernel, len(KERNEL.data)) == KERNEL.data
        assert machine.vm.read(placed.initrd, 6000) == b"initrd" * 1000
        assert machine.vm.read(placed.dtb, len(machine.dtb)) == machine.dtb
    chosen = read_fdt(machine.dtb).node("/chosen")
    assert chosen.texts("bootargs") == ("console=ttyAMA0",)
    assert chosen.numbers("linux,initrd-end", 8) == (placed.initrd + 6000,)
    assert any(chosen.properties["kaslr-seed"]) and len(chosen.properties["rng-seed"]) == 64
    assert written[0, register_id("pc")] == placed.kernel and written[0, register_id("x0")] == placed.dtb


def test_without_seeds_two_trees_are_the_same(kvm):
    trees = []
    for _ in range(2):
        with machine_with(kvm) as machine:
            machine.load_linux(KERNEL, seed=False)
            trees.append(machine.dtb)
    assert trees[0] == trees[1] and not {"kaslr-seed", "rng-seed"} & set(read_fdt(trees[0]).node("/chosen").properties)


def test_a_flat_guest_finds_the_tree_too(machine, written):
    guest = Image("guest", GIB, (Segment(GIB, b"code", 4),))
    at = machine.load(guest)
    assert at and machine.vm.read(at, len(machine.dtb)) == machine.dtb and written[0, register_id("x0")] == at
    assert machine.load(guest, params=False) == 0 and written[0, register_id("x0")] == 0
    whole = Image("guest", GIB, (Segment(GIB, b"code", 64 << 20),))
    assert machine.load(whole) == 0


def test_what_does_not_fit_is_refused(kvm, machine):
    with pytest.raises(UsageError, match="command line of 2048"):
        machine.load_linux(KERNEL, append="x" * 2048)
    with pytest.raises(UsageError, match="need a range"):
        machine.load_linux(KERNEL, bytes(64 << 20))
    with pytest.raises(UsageError, match="leave that free"):
        machine_with(kvm, MemoryRange(0, GIB))
    with pytest.raises(UsageError, match="room for 32"):
        machine_with(kvm, virtio=[Rng() for _ in range(33)])


def test_a_host_without_vgic_is_named(kvm, fake):
    def nothing(fd, arg):
        raise KvmError(errno.ENODEV)

    fake.answers[ioctls.KVM_CREATE_DEVICE] = nothing
    before = set(fake.open_fds)
    with pytest.raises(EnvironmentFault, match="makes no vGIC"):
        machine_with(kvm, cpus=3)
    assert fake.open_fds == before  # nothing is left of the machine


def test_the_guest_reaches_each_device_and_nothing_elsewhere(machine, fake, mmio):
    fake.play(
        [
            mmio(layout.UART_BASE + DR, 1, b"A"),
            mmio(layout.RTC_BASE + 0xFE0, 4),
            mmio(layout.VIRTIO_BASE, 4),
            mmio(0x0B00_0000, 4),
            (abi.KVM_EXIT_SYSTEM_EVENT, abi.SystemEvent(type=2).pack()),
        ]
    )
    machine.vcpus = machine.vcpus[:1]
    result = machine.run()
    assert result.ended == "reset" and result.console == b"A" and result.unclaimed_count == 1


def test_the_poweroff_of_psci_is_a_shutdown(machine, fake):
    fake.play([(abi.KVM_EXIT_SYSTEM_EVENT, abi.SystemEvent(type=1).pack())])
    assert machine.run().ended == "shutdown"


def test_input_raises_the_uarts_interrupt(machine, lines):
    machine.uart.write(CR, 4, 0x301)
    machine.feed(b"x")
    assert lines == []
    machine.uart.write(IMSC, 4, RIS_RT)
    assert lines == [(1 << 24 | 33, 1)]
    assert machine.uart.read(DR, 4) == ord("x") and lines[1:] == [(1 << 24 | 33, 0)]


def test_a_machines_devices_are_kept_and_restored(kvm, machine, lines):
    machine.uart.write(CR, 4, 0x301)
    machine.uart.write(IMSC, 4, RIS_RT)
    machine.feed(b"kept")
    kept = machine.state()
    assert list(kept) == ["uart", "rtc", "virtio0"]
    lines.clear()
    with machine_with(kvm, cpus=2, virtio=[Rng()]) as other:
        other.restore(kept)
        assert other.state() == kept and (1 << 24 | 33, 1) in lines
    with machine_with(kvm) as other, pytest.raises(UsageError, match="this one has rtc, uart: make it"):
        other.restore(kept)


def test_closing_leaves_nothing_open(kvm, fake):
    before = set(fake.open_fds)
    machine_with(kvm, cpus=2, virtio=[Rng()]).close()
    assert fake.open_fds == before


def test_lines_are_quiet_once_the_machine_is_closed(kvm, lines):
    with machine_with(kvm) as machine:
        line = machine.line(5)
    line(True)
    assert lines == []


def test_an_arm64_machine_of_the_software_kvm_runs_a_guest_that_finds_its_tree():
    """A guest that sends the first four bytes that x0 points at, and turns the machine off."""
    words = (
        0xD2A12002,  # mov x2, #UART_BASE
        *(0x38401401, 0x39000041) * 4,  # ldrb w1, [x0], #1; strb w1, [x2]
        0xD2B08000,  # mov x0, #0x84000000
        0xF2800100,  # movk x0, #8: PSCI SYSTEM_OFF
        0xD4000002,  # hvc #0
    )
    code = struct.pack(f"<{len(words)}I", *words)
    spec = VmSpec(physaddr_bits="auto", memory=(MemoryRange(1 << 40, 1 << 20),))
    with kvm2.open("cortex-a72-4k") as kvm, LinuxMachine(kvm, spec, cpus=2) as machine:
        machine.load(Image("guest", 1 << 40, (Segment(1 << 40, code, len(code)),)))
        result = machine.run(60)
    assert (result.ended, result.console) == ("shutdown", b"\xd0\x0d\xfe\xed"), result

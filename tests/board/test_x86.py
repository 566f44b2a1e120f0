"""The x86-64 board: on scripted exits, and the demonstration guest on a real /dev/kvm."""

import ctypes
import shutil
import struct
import subprocess

import pytest

from kvm2.abi import exits as abi
from kvm2.abi import ioctls
from kvm2.abi import ioctls_x86 as x86
from kvm2.abi.structs_x86 import CpuidEntry2, Regs, Sregs
from kvm2.board import x86 as board
from kvm2.board.loader import Image, Segment, parse_image, read_image
from kvm2.board.loop import Unclaimed
from kvm2.board.x86 import X86Machine, physical_bits
from kvm2.errors import GuestError, UsageError
from kvm2.guests import DEMO_X86
from kvm2.kvm import Kvm
from kvm2.spec import MemoryRange, VmSpec

MIB = 1 << 20
LEAVES = (
    CpuidEntry2(0, ebx=1),
    CpuidEntry2(1, ebx=0x05000800),
    CpuidEntry2(0xB, edx=5),
    CpuidEntry2(0x80000008, eax=0x3027),
)


@pytest.fixture
def host(fake):
    fake.arch = "x86_64"
    fake.cpuid, fake.state = b"", {}

    def leaves(fd, arg):
        data = struct.pack("=II", len(LEAVES), 0) + b"".join(leaf.pack() for leaf in LEAVES)
        ctypes.memmove(arg, data, len(data))
        return 0

    def set_cpuid(fd, arg):
        count = struct.unpack("=I", ctypes.string_at(arg, 4))[0]
        fake.cpuid = ctypes.string_at(arg + 8, count * CpuidEntry2.SIZE)
        return 0

    def keep(kind):
        def put(fd, arg):
            fake.state[kind] = ctypes.string_at(arg, kind.SIZE)
            return 0

        return put

    def give(kind):
        return lambda fd, arg: ctypes.memmove(arg, fake.state.get(kind, bytes(kind.SIZE)), kind.SIZE) and 0

    fake.answers |= {
        ioctls.KVM_CREATE_VM2: lambda fd, arg: fake.new(),
        x86.KVM_GET_SUPPORTED_CPUID: leaves,
        x86.KVM_SET_CPUID2: set_cpuid,
        x86.KVM_SET_TSS_ADDR: lambda fd, arg: 0,
        x86.KVM_SET_IDENTITY_MAP_ADDR: lambda fd, arg: 0,
        x86.KVM_GET_REGS: give(Regs),
        x86.KVM_SET_REGS: keep(Regs),
        x86.KVM_GET_SREGS: give(Sregs),
        x86.KVM_SET_SREGS: keep(Sregs),
    }
    with Kvm(fake, "fake") as host:
        yield host


@pytest.fixture
def machine(host):
    with X86Machine(host, VmSpec(memory=(MemoryRange(0, MIB),))) as machine:
        yield machine


def out(port, data, size=None, count=1):
    size = size or len(data)

    def step(area):
        area[4096 : 4096 + len(data)] = data
        fill(area, abi.KVM_EXIT_IO, abi.Io(abi.KVM_EXIT_IO_OUT, size, port, count, 4096).pack())

    return step


def into(port, size, count=1):
    def step(area):
        area[4096 : 4096 + 64] = b"\xee" * 64
        fill(area, abi.KVM_EXIT_IO, abi.Io(abi.KVM_EXIT_IO_IN, size, port, count, 4096).pack())

    return step


def fill(area, reason, payload=b""):
    struct.pack_into("=I", area, abi.EXIT_REASON_OFFSET, reason)
    area[abi.UNION_OFFSET : abi.UNION_OFFSET + len(payload)] = payload


def play(machine, fake, *steps):
    fake.script = iter(steps)
    return machine.run(5)


OFF = out(0x604, b"\x00\x20")


def test_the_console_by_bytes_words_and_strings(machine, fake):
    result = play(machine, fake, out(0x3F8, b"A"), out(0x3F8, b"bcd", size=1, count=3), out(0x3FE, b"xy"), OFF)
    assert result.ended == "shutdown" and result.ok and result.console == b"Abcd"
    assert machine.uart.read(7) == ord("y")  # a wider access reaches the ports that follow
    assert result.exits == {"io_write": 4} and not result.unclaimed


def test_reads_of_devices_and_of_nothing(machine, fake):
    seen = []

    def look(area):
        seen.append(bytes(area[4096:4104]))

    def then(step, first):
        def both(area):
            look(area)
            step(area)

        return both if first else step

    steps = [into(0x3FD, 1), then(into(0x1234, 4), True), then(into(0x1234, 2, count=2), True), then(OFF, True)]
    result = play(machine, fake, *steps)
    assert seen == [b"\x60" + b"\xee" * 7, b"\xff" * 4 + b"\xee" * 4, b"\xff" * 4 + b"\xee" * 4]
    assert result.unclaimed == (
        Unclaimed(0x1234, 2, False, 2, "port"),
        Unclaimed(0x1234, 4, False, 1, "port"),
    )
    assert result.unclaimed_count == 3


def test_mmio_is_nothing(machine, fake, mmio):
    answers = []

    def read(area):
        fill(area, *mmio(0xD0000000, 8))

    def look(area):
        answers.append(bytes(area[40:48]))
        fill(area, *mmio(0xD0000000, 2, b"xy"))

    result = play(machine, fake, read, look, OFF)
    assert answers == [b"\xff" * 8]
    assert [(u.space, u.address, u.size, u.is_write) for u in result.unclaimed] == [
        ("memory", 0xD0000000, 2, True),
        ("memory", 0xD0000000, 8, False),
    ]


@pytest.mark.parametrize(
    ("step", "ended", "what"),
    [
        (OFF, "shutdown", ""),
        (out(0xCF9, b"\x06"), "reset", ""),
        (lambda area: fill(area, abi.KVM_EXIT_SHUTDOWN), "crash", "triple fault at RIP 0x0"),
        (lambda area: fill(area, abi.KVM_EXIT_HLT), "halted", "waits for an interrupt"),
        (lambda area: fill(area, abi.KVM_EXIT_SYSTEM_EVENT, abi.SystemEvent(type=3).pack()), "crash", "SystemEvent"),
        (
            lambda area: fill(
                area, abi.KVM_EXIT_INTERNAL_ERROR, abi.EmulationFailure(1, 4, 1, 2, b"\x0f\x0b".ljust(15, b"\0")).pack()
            ),
            "failed",
            "could not emulate the instruction that begins 0f 0b at RIP",
        ),
        (lambda area: fill(area, abi.KVM_EXIT_XEN), "failed", "cannot answer"),
    ],
)
def test_how_a_run_ends(machine, fake, step, ended, what):
    result = play(machine, fake, step)
    assert result.ended == ended and result.ok == (ended in ("shutdown", "reset")) and what in result.reason


def test_other_values_at_the_power_and_reset_ports_end_nothing(machine, fake):
    steps = [
        out(0x604, b"\x00\x04"),
        out(0x604, b"\x00\x24"),
        out(0xCF9, b"\x02"),
        out(0x604, b"\x20"),
        out(0x80, b"\1"),
    ]
    result = play(machine, fake, *steps, out(0xCF9, b"\x04"))
    assert result.ended == "reset" and result.exits == {"io_write": 6}
    assert [(u.address, u.size) for u in result.unclaimed] == [(0x80, 1), (0x604, 1)]


def test_the_vcpu_gets_the_hosts_leaves_with_its_own_apic_id(machine, fake):
    leaves = [CpuidEntry2.unpack(fake.cpuid, at) for at in range(0, len(fake.cpuid), CpuidEntry2.SIZE)]
    assert [leaf.function for leaf in leaves] == [leaf.function for leaf in LEAVES]
    assert leaves[1].ebx == 0x00000800 and leaves[2].edx == 0 and leaves[3] == LEAVES[3]
    assert (machine.ipa_bits, machine.host_ipa_bits) == (39, 39)


@pytest.mark.parametrize(("eax", "bits"), [(0x392E, (46, 46)), (0x303934, (52, 48)), (None, (36, 36))])
def test_physical_bits(eax, bits):
    assert physical_bits(() if eax is None else (CpuidEntry2(0x80000008, eax=eax),)) == bits


def flat(data=b"\xf4"):
    return parse_image("guest", data, (MemoryRange(0, MIB),), "x86_64")


def test_a_flat_image_is_entered_as_a_boot_sector(machine, fake):
    image = flat(b"code")
    assert machine.load(image) == MIB - 4096
    regs, sregs = Regs.unpack(fake.state[Regs]), Sregs.unpack(fake.state[Sregs])
    assert (regs.rip, regs.rsp, regs.rdi, regs.rflags) == (0x7C00, 0x7C00, MIB - 4096, 2)
    assert (sregs.cs.base, sregs.cs.selector, sregs.cr0) == (0, 0, 0)
    assert machine.vm.read(0x7C00, 4) == b"code" and machine.vm.read(MIB - 4096, 8) == b"KVM2PARM"
    block = machine.vm.read(MIB - 4096, 88)
    assert struct.unpack_from("<IIIIII", block, 8) == (1, 88, 39, 39, 12, 1)
    assert struct.unpack_from("<Q", block, 40)[0] == 0x3F8 and struct.unpack_from("<QQ", block, 72) == (0, MIB)
    assert machine.load(image, params=False) == 0 and Regs.unpack(fake.state[Regs]).rdi == 0


def test_an_entry_below_1_mib_is_reached_by_a_segment(machine, fake):
    machine.load(Image("g", 0x54321, (Segment(0x50000, bytes(0x8000), 0x8000),)))
    assert Regs.unpack(fake.state[Regs]).rip == 0x4321
    cs = Sregs.unpack(fake.state[Sregs]).cs
    assert (cs.base, cs.selector) == (0x50000, 0x5000)


def test_an_entry_above_is_in_long_mode_with_the_first_4_gib_one_to_one(host, fake):
    with X86Machine(host, VmSpec(memory=(MemoryRange(0, 4 * MIB),))) as machine:
        machine.load(Image("g", 2 * MIB, (Segment(2 * MIB, b"code", 4),)))
        sregs, regs = Sregs.unpack(fake.state[Sregs]), Regs.unpack(fake.state[Regs])
        assert (sregs.cs.l, sregs.cs.selector, sregs.efer, sregs.cr4) == (1, 0x18, 0x500, 0x620)
        assert regs.rip == 2 * MIB and regs.rsp % 16 == 8 and regs.rdi == 4 * MIB - 4096
        for address in (0, 2 * MIB + 5, (1 << 32) - 1):
            assert walk(machine.vm, sregs.cr3, address) == address
        assert walk(machine.vm, sregs.cr3, 1 << 32) is None
        assert machine.vm.read(sregs.gdt.base + 0x18, 8) == struct.pack("<Q", 0x00AF9B000000FFFF)
        assert sregs.gdt.limit == 31
        with pytest.raises(GuestError, match="needs the 7 pages at 0x3f8000"):
            machine.load(Image("g", 2 * MIB, (Segment(2 * MIB, b"code", 2 * MIB - 0x7000),)))


def walk(vm, cr3, address):
    """A linear address by the tables, as the SDM has it; None where nothing is mapped."""
    table = cr3
    for shift in (39, 30, 21):
        entry = struct.unpack("<Q", vm.read(table + 8 * (address >> shift & 511), 8))[0]
        if not entry & 1:
            return None
        if entry & 0x80:
            return (entry & ~0x1FFFFF) | address & 0x1FFFFF
        table = entry & ~0xFFF
    return None


@pytest.mark.parametrize(
    ("memory", "what"),
    [
        ((MemoryRange(1 << 30, 64 * MIB),), "begins at 0"),
        ((MemoryRange(0, MIB - 4096),), "at least 0x100000"),
        ((MemoryRange(0, MIB), MemoryRange(MIB - 4096, MIB)), "overlap"),
        ((MemoryRange(0, 0),), "above 0"),
    ],
)
def test_memory_maps_that_cannot_be(memory, what):
    with pytest.raises(UsageError, match=what):
        board.check_memory(memory)


def test_one_vcpu_only(host):
    with pytest.raises(UsageError, match="allowed is 1"):
        X86Machine(host, VmSpec(), cpus=2)


def test_images_of_other_kinds_are_refused_in_words():
    memory = (MemoryRange(0, MIB),)
    with pytest.raises(GuestError, match=r"is an ELF for x86-64. kvm2 runs a linked little-endian ELF64 for AArch64"):
        parse_image("g", DEMO_X86.read_bytes(), (MemoryRange(0, MIB),), "arm64")
    with pytest.raises(GuestError, match=r"kvm2 runs a linked little-endian ELF64 for x86-64 \(gcc"):
        parse_image("g", b"", memory, "x86_64")
    with pytest.raises(GuestError, match="do not fit the guest's memory"):
        parse_image("g", bytes(MIB), memory, "x86_64")


# -- on a real KVM


def test_the_demonstration_guest_runs_from_real_mode_to_power_off(real_x86):
    memory = (MemoryRange(0, 16 * MIB), MemoryRange(5 << 30, MIB))
    with X86Machine(real_x86, VmSpec(memory=memory), top=True) as machine:
        machine.load(read_image(DEMO_X86, machine.memory, "x86_64"))
        result = machine.run(30)
        text, bits = result.console.decode(), machine.ipa_bits
    assert result.ended == "shutdown", (result.reason, text)
    assert "real mode with CR0 0x60000010, protected mode with 0x60000011, long mode with 0x80000011" in text
    assert f"MAXPHYADDR: {machine.host_ipa_bits} bits" in text and "hypervisor KVMKVMKVM" in text
    for address, size in ((0, 16 * MIB), (5 << 30, MIB), ((1 << bits) - 65536, 65536)):
        first = (
            f"RAM: {address:#x}, {size // 1024} KiB; first and last word: {address:#x} ok {address + size - 4:#x} ok"
        )
        assert first in text
    assert "NOT WHAT" not in text and "unexpected" not in text and text.endswith("powering off\n")
    if machine.host_ipa_bits < 52:
        assert (
            f"read {1 << machine.host_ipa_bits:#x}, the first address beyond MAXPHYADDR: page fault, error code 0x9"
            in text
        )
    assert {(u.space, u.address, u.is_write) for u in result.unclaimed} == {
        ("port", 0x1234, False),
        ("memory", 0xD0000000, False),
        ("memory", 0xD0000000, True),
    }


C_GUEST = """
static void out(unsigned short port, unsigned char byte) { asm volatile("outb %0, %1" :: "a"(byte), "Nd"(port)); }
const char *names[] = {"from C, ", "relocated\\n"};
void _start(const unsigned long *params)
{
	for (int i = 0; i < 2; i++)
		for (const char *s = names[i]; *s; s++)
			out(0x3f8, *s);
	out(0x3f8, params && *params == 0x4d524150324d564bUL ? 'P' : '-');
	asm volatile("outw %0, %1" :: "a"((unsigned short)0x2000), "Nd"((unsigned short)0x604));
}
"""


@pytest.mark.parametrize("how", ["-static", "-static-pie"])
def test_a_c_program_is_entered_in_long_mode(real_x86, tmp_path, how):
    gcc = shutil.which("x86_64-linux-gnu-gcc")
    if gcc is None:
        pytest.skip("no x86_64-linux-gnu-gcc")
    source, elf = tmp_path / "guest.c", tmp_path / "guest.elf"
    source.write_text(C_GUEST)
    pie = "-fpie" if how == "-static-pie" else "-fno-pie"
    command = [gcc, "-O1", "-mgeneral-regs-only", "-ffreestanding", "-nostdlib", how, pie, str(source), "-o", str(elf)]
    subprocess.run(command, check=True)
    with X86Machine(real_x86, VmSpec()) as machine:
        image = read_image(elf, machine.memory, "x86_64")
        assert (image.entry >= 2 * MIB) and machine.load(image) == (64 * MIB) - 4096
        result = machine.run(30)
    assert result.ended == "shutdown" and result.console == b"from C, relocated\nP", result

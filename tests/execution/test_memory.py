"""The guest's memory: where it may lie, what is logged, and what happens when slots and code change under it."""

from __future__ import annotations

import struct
import threading
import time

import pytest

from kvm2.exits import Interrupted, Mmio, SystemEvent

from .rig import RAM, bench, play

# PSCI calls, whose result goes into x0 to x3.
OFF = "\n mov w0, #8\n movk w0, #0x8400, lsl #16\n hvc #0"
RESET = "\n mov w0, #9\n movk w0, #0x8400, lsl #16\n hvc #0"
MB = 1 << 20


def of_bits(bits, **more):
    return lambda kvm: kvm.create_vm2(physaddr_bits=bits, **more)


PLACES = [
    ("max-4k-nolpa2", 48, 1 << 40),
    ("max-4k-nolpa2", 48, 1 << 47),
    ("max-4k-nolpa2", 48, (1 << 48) - MB),
    ("neoverse-n1-64k", 48, 1 << 47),
    ("cortex-a57-4k", 44, 1 << 43),
    ("apple-m1", 36, (1 << 36) - MB),
    ("lpa2-4k-52", 52, 1 << 50),
    ("lpa2-16k-52", 52, (1 << 52) - MB),
    ("armv9-64k-52", 52, 1 << 51),
    ("lpa2-4k-52", 52, 1 << 40),
]


@pytest.mark.parametrize(("host", "bits", "gpa"), PLACES)
def test_code_and_data_anywhere(host, bits, gpa):
    with bench(host, gpa, vm_of=of_bits(bits)) as b:
        text = "mov x13, #0\n1: str x13, [x1, x13, lsl #3]\n add x13, x13, #1\n cmp x13, #512\n b.ne 1b\n"
        text += f" ldr x4, [x1, #800]{OFF}"
        assert isinstance(b.run(text, x1=gpa + 0x80000), SystemEvent)
        assert b.vcpu.regs.x4 == 100
        assert struct.unpack("<512Q", b.ram.read(0x80000, 4096)) == tuple(range(512))


@pytest.mark.parametrize(("ram", "host", "bits"), [(1 << 40, "neoverse-n1-4k", 48), (1 << 47, "max-16k-nolpa2", 48)])
def test_compiled_guests_high_up(ram, host, bits):
    assert play("exceptions", host, ram=ram, options=("-DBITS=36",), physaddr_bits=bits).out()[-1] == 42


@pytest.mark.parametrize(("host", "page_shift"), [("max-4k-6.12", 14), ("max-4k-6.12", 16), ("max-16k-6.12", 12)])
def test_a_granule_by_attribute(host, page_shift):
    """A stage-2 granule that is not the host's page: the guest runs as ever."""
    with bench(host, vm_of=lambda kvm: kvm.create_vm2(page_shift=page_shift)) as b:
        text = f"mov x13, #0\n1: str x13, [x1, x13]\n add x13, x13, #0x1000\n cmp x13, #0x40000\n b.ne 1b{OFF}"
        assert isinstance(b.run(text, x1=RAM + 0x40000), SystemEvent)
        assert [b.ram[at + 1] for at in range(0x40000, 0x80000, 0x1000)] == [0x10 * n % 256 for n in range(64)]


@pytest.mark.parametrize(("follows", "expected"), [(True, 36), (False, 48)])
def test_parange_follows_ipa(follows, expected):
    codes = {0: 32, 1: 36, 2: 40, 3: 42, 4: 44, 5: 48, 6: 52}
    with bench("neoverse-n1-4k", vm_of=of_bits(36, parange_follows_ipa=follows)) as b:
        assert isinstance(b.run(f"mrs x13, id_aa64mmfr0_el1{OFF}"), SystemEvent)
        assert codes[b.vcpu.regs.x13 & 15] == expected


def test_reset_and_rerun():
    with bench() as b:
        for number in range(3):
            exit = b.run(f"ldr x13, [x1]\n add x13, x13, #1\n str x13, [x1]{RESET}", x1=RAM + 0x1000)
            assert (exit.name, b.vcpu.regs.x13) == ("reset", number + 1)
            b.vcpu.init()
            assert b.vcpu.regs.x13 == 0


def test_code_rewritten_by_the_vmm_between_runs():
    """Through the memory alone, without a register written: the next run executes what is there now."""
    with bench() as b:
        assert b.run("1: mov x13, #1\n str x13, [x1]\n b 1b", x1=0x0A00_0000).value == 1
        old = struct.unpack("<I", b.ram.read(0, 4))[0]
        for number in range(2, 50):
            word = struct.pack("<I", old ^ (1 ^ number) << 5)
            if number % 2:
                b.ram.write(0, word)
            else:
                b.ram[0:4] = word
            assert b.vcpu.run_once().value == number


@pytest.mark.parametrize("flush", [True, False], ids=["ic-ivau", "without"])
def test_self_modifying_code(flush):
    """With the architecture's sequence it must work; without it either may run, and here the new instruction does."""
    sync = "dc cvau, x5\n dsb ish\n ic ivau, x5\n dsb ish\n isb\n" if flush else "dsb ish\n isb\n"
    text = f"""
        mov x6, #0
        mov x4, #0
    1:  movz w7, #0xd280, lsl #16   // mov x0, #n
        orr w7, w7, w6, lsl #5
        adr x5, 2f
        str w7, [x5]
        {sync}
    2:  mov x0, #99
        add x4, x4, x0
        add x6, x6, #1
        cmp x6, #100
        b.ne 1b{OFF}"""
    with bench() as b:
        assert isinstance(b.run(text), SystemEvent)
        assert b.vcpu.regs.x4 == sum(range(100))


@pytest.mark.parametrize(
    ("host", "page"), [("max-4k-6.12", 4096), ("max-16k-6.12", 1 << 14), ("neoverse-n1-64k", 1 << 16)]
)
def test_dirty_log_is_what_the_guest_wrote(host, page):
    with bench(host, size=4 * MB, log_dirty=True) as b:
        pages = 4 * MB // page
        written = sorted({n * 7 % pages for n in range(5, 12)} - {0})
        b.load("nop")
        b.ram.dirty_log()
        for round_ in range(3):
            stores = "\n".join(f"ldr x2, ={RAM + n * page + 8 * round_:#x}\n str x1, [x2]" for n in written)
            # Reading makes nothing dirty.
            reads = "\n".join(f"ldr x2, ={RAM + n * page:#x}\n ldr x13, [x2]" for n in range(pages))
            exit = b.run(f"{reads if round_ == 0 else ''}\n{stores}\n{OFF}\n b .\n .ltorg", x1=1)
            assert isinstance(exit, SystemEvent)
            log = int.from_bytes(b.ram.dirty_log(), "little")
            assert [n for n in range(8 * 128) if log >> n & 1] == written
            assert not any(b.ram.dirty_log())
            b.vcpu.init()


def test_logging_starts_and_stops_under_a_running_guest():
    with bench(size=2 * MB) as b:
        b.load("1: ldr x13, [x1]\n add x13, x13, #1\n str x13, [x1]\n b 1b", x1=RAM + 5 * 4096)
        thread = spin(b.vcpu)
        for _ in range(20):
            b.ram.set_flags(1)
            time.sleep(0.005)
            log = int.from_bytes(b.ram.dirty_log(), "little")
            assert log in (0, 1 << 5)
            time.sleep(0.005)
            before = b.ram.read(5 * 4096, 8)
            log |= int.from_bytes(b.ram.dirty_log(), "little")
            assert log == 1 << 5
            b.ram.set_flags(0)
            time.sleep(0.002)
            assert b.ram.read(5 * 4096, 8) != before
        ended(thread, b.vcpu)


def spin(vcpu):
    """KVM_RUN in a thread until it is kicked; its exit is in the list."""
    exits = []

    def run():
        try:
            exits.append(vcpu.run_once())
        except BaseException as failure:
            exits.append(failure)

    thread = threading.Thread(target=run)
    thread.exits = exits
    thread.start()
    return thread


def ended(thread, vcpu, kick=True):
    if kick:
        vcpu.kick()
    thread.join(5)
    assert not thread.is_alive()
    if kick:
        assert isinstance(thread.exits[0], Interrupted), thread.exits
    return thread.exits[0]


def test_a_slot_deleted_and_moved_under_a_running_guest():
    """What the guest gets there afterwards is MMIO; its other memory goes on working."""
    with bench() as b:
        other = b.vm.map(0x5000_0000, 2 * MB)
        b.load(
            "1: ldr x13, [x1]\n add x13, x13, #1\n str x13, [x1]\n str x13, [x2]\n b 1b",
            x1=0x5000_0008,
            x2=RAM + 0x8000,
        )
        thread = spin(b.vcpu)
        time.sleep(0.05)
        other.move(0x6000_0000)
        exit = ended(thread, b.vcpu, kick=False)
        assert isinstance(exit, Mmio) and exit.address == 0x5000_0008
        kept = other.read(8, 8)
        assert int.from_bytes(kept, "little") > 0
        exit.reply(5) if not exit.is_write else None
        b.vcpu.kick()
        assert isinstance(b.vcpu.run_once(), Interrupted)
        other.move(0x5000_0000)
        thread = spin(b.vcpu)
        time.sleep(0.02)
        assert other.read(8, 8) != kept
        other.unmap()
        exit = ended(thread, b.vcpu, kick=False)
        assert isinstance(exit, Mmio) and exit.address == 0x5000_0008


def test_slots_come_and_go_around_a_running_guest():
    with bench() as b:
        b.load("1: ldr x13, [x1]\n add x13, x13, #1\n str x13, [x1]\n b 1b", x1=RAM + 0x8000)
        thread = spin(b.vcpu)
        for number in range(60):
            other = b.vm.map(0x5000_0000 + number % 3 * MB, MB)
            other.unmap()
        before = b.ram.read(0x8000, 8)
        time.sleep(0.02)
        assert b.ram.read(0x8000, 8) != before
        ended(thread, b.vcpu)

"""The process of battery F6 that runs hostile guests: `python f6_worker.py SEED FIRST COUNT`.

A line of JSON for each guest, written when it begins and when it has ended, so that whoever reads them knows which
guest the process died of. The emulator's C code may crash; what must never happen is a write outside of the slots.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import random
import struct
import sys
import threading
import time
import zlib

import kvm2
from kvm2.board.bus import Bus
from kvm2.board.gic import has_device, make_gic
from kvm2.board.pl011 import Pl011
from kvm2.board.pl031 import Pl031
from kvm2.board.virtio.console import Console
from kvm2.board.virtio.mmio import VirtioMmio
from kvm2.board.virtio.rng import Rng
from kvm2.errors import KvmError, UsageError
from kvm2.exits import Interrupted, Mmio, Nisv

BUDGET = 0.03  # seconds of a guest
EXITS = 300
GUARD = 1 << 20
RAM_SIZE = 1 << 20
ROM_SIZE = 1 << 16
CODE, VECTORS, TABLES, DATA = 0, 0x10000, 0x20000, 0x80000
# Steps over the instruction: msr tpidr_el1, x17; mrs x17, elr_el1; add x17, x17, #4; msr elr_el1, x17;
# mrs x17, tpidr_el1; eret
STEP_OVER = struct.pack("<6I", 0xD518D091, 0xD5384031, 0x91001231, 0xD5184031, 0xD538D091, 0xD69F03E0)
HOSTS = (  # name, IPA bits, where the RAM lies
    ("cortex-a57-4k", 40, 1 << 30),
    ("neoverse-n1-16k", 36, (1 << 36) - RAM_SIZE),
    ("max-4k-6.12", 48, 1 << 47),
    ("max-4k-nolpa2", 48, (1 << 48) - RAM_SIZE),
    ("lpa2-4k-52", 52, 1 << 50),
    ("armv9-64k-52", 52, (1 << 52) - RAM_SIZE),
)


class Watchdog:
    """Kicks the vCPU whose time is up, again and again."""

    def __init__(self) -> None:
        self.vcpu, self.deadline = None, 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.005)
            vcpu = self.vcpu
            if vcpu is not None and time.monotonic() > self.deadline:
                vcpu.kick()


class Canary:
    """Host memory in which the guest's slots lie: everything around them, and some buffers elsewhere, never changes."""

    def __init__(self, seed: int) -> None:
        fill = random.Random(seed).randbytes(1 << 16)
        self.size = GUARD + RAM_SIZE + GUARD + ROM_SIZE + GUARD
        self.memory = mmap.mmap(-1, self.size + (1 << 16))
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.shift = -base % (1 << 16)
        self.base = base + self.shift
        self.view = memoryview(self.memory)[self.shift : self.shift + self.size]
        for at in range(0, self.size, 1 << 16):
            self.view[at : at + (1 << 16)] = fill
        self.ram_at, self.rom_at = GUARD, 2 * GUARD + RAM_SIZE
        self.ram = self.view[self.ram_at : self.ram_at + RAM_SIZE]
        self.buffers = [ctypes.create_string_buffer(fill[: 1 << n], 1 << n) for n in range(6, 16)]
        self.sum = self.checksum()

    def checksum(self) -> int:
        total = zlib.crc32(self.view[: self.ram_at])
        total = zlib.crc32(self.view[self.ram_at + RAM_SIZE :], total)  # the read-only slot is in it
        for buffer in self.buffers:
            total = zlib.crc32(buffer, total)
        return total


class Guest:
    """One hostile guest: its memory and registers, from a random generator."""

    def __init__(self, rng: random.Random, gpa: int, bits: int) -> None:
        self.rng, self.gpa, self.bits = rng, gpa, bits
        self.rom = gpa - 0x200000
        edge, end = 1 << bits, gpa + RAM_SIZE
        self.places = [
            *(gpa + at for at in (0, CODE + 0x400, DATA, DATA + 0xFF8, TABLES, RAM_SIZE - 8, RAM_SIZE - 3)),
            *(end, end - 1, gpa - 1, gpa - 8, self.rom, self.rom + ROM_SIZE - 4, self.rom + 0xFFF),
            *(
                edge - 8,
                edge - 1,
                edge,
                edge + 8,
                edge // 2,
                1 << 40,
                1 << 47,
                (1 << 48) - 4,
                1 << 48,
                1 << 51,
                1 << 52,
            ),
            *(0, 8, 0xFFF, 1 << 63, (1 << 64) - 1, (1 << 64) - 8, 0x0900_0000, 0x10000),
        ]

    def value(self) -> int:
        rng = self.rng
        kind = rng.random()
        if kind < 0.6:
            return (rng.choice(self.places) + rng.choice((0, 0, 0, 1, 2, 4, 7, -1, -4, 0x1000))) % (1 << 64)
        return rng.getrandbits(64) if kind < 0.8 else rng.getrandbits(rng.choice((1, 4, 8, 12, 16, 32)))

    def word(self) -> int:
        rng = self.rng
        kind, bits = rng.random(), rng.getrandbits(32)
        if kind < 0.15:
            return bits
        if kind < 0.35:  # loads and stores of every form
            return bits & ~0x1A00_0000 | 0x0800_0000 | rng.choice((0, 0x1000_0000))
        if kind < 0.6:  # MRS, MSR, SYS, hints, barriers
            return 0xD500_0000 | bits & 0x3F_FFFF
        if kind < 0.65:  # SVC, HVC, SMC, BRK, HLT, DCPS
            return 0xD400_0000 | bits & 0xFF_FFFF
        if kind < 0.68:  # UDF to branches
            return rng.choice((0x1400_0000, 0x5400_0000, 0x3400_0000, 0xB600_0000)) | bits & 0xFF
        if kind < 0.71:
            return rng.choice((0xD61F_0000, 0xD63F_0000, 0xD65F_0000, 0xD69F_03E0)) | (bits & 31) << 5
        if kind < 0.86:  # SIMD and floating point, SVE
            return bits & ~0x1E00_0000 | rng.choice((0x0E00_0000, 0x1E00_0000, 0x0400_0000))
        return bits & ~0x1C00_0000 | rng.choice((0x0800_0000, 0x1000_0000, 0x1400_0000))  # data processing

    def random_words(self) -> list[int]:
        return [self.rng.getrandbits(32) for _ in range(1000)]

    def biased_words(self) -> list[int]:
        return [self.word() for _ in range(1000)]

    def self_modifying(self) -> list[int]:
        """Stores of what may be instructions, right before and behind PC, with and without maintenance."""
        rng, words = self.rng, []
        for _ in range(300):
            target, source = rng.sample(range(17), 2)
            words.append(
                0x1000_0000 | rng.getrandbits(2) << 29 | (rng.randrange(-64, 64) & 0x7FFFF) << 5 | target
            )  # adr
            words.append(rng.choice((0xB900_0000, 0xF900_0000, 0x3900_0000, 0xA900_0000)) | target << 5 | source)
            words.append(rng.choice((0xD50B_7520 | target, 0xD508_751F, 0xD503_3FDF, 0xD503_201F, self.word())))
        return words

    def mmio(self) -> list[int]:
        """Every width and form at every place, one behind the other."""
        rng, words = self.rng, []
        for _ in range(400):
            base, data = rng.sample(range(28), 2)
            form = rng.choice(
                (0x3900_0000, 0x3940_0000, 0x3980_0000, 0xB980_0000, 0x3C00_0400, 0x2800_0000, 0x0800_7C00)
            )
            words.append(form | rng.getrandbits(2) << 30 | rng.choice((0, 1 << 22, 1 << 23)) | base << 5 | data)
        return words

    def calls(self) -> list[int]:
        """HVC, SMC and SVC with random arguments, many of them function numbers of PSCI and SMCCC."""
        rng, words = self.rng, []
        for _ in range(250):
            high = rng.choice((0x8400, 0xC400, 0x8000, 0x8600, 0xC600, 0xC500, rng.getrandbits(16)))
            words.append(0x5280_0000 | rng.choice((rng.randrange(0x25), rng.getrandbits(16))) << 5)
            words.append(0x72A0_0000 | high << 5)
            words.append(0xD280_0001 | rng.getrandbits(3) << 5)
            words.append(0xD400_0000 | rng.choice((1, 2, 2, 3)) | rng.choice((0, 0, rng.getrandbits(16))) << 5)
        return words

    def waiting(self) -> list[int]:
        return [*self.biased_words()[:20], 0xD503_207F, 0x17FF_FFFF, 0xD503_205F, 0x17FF_FFFF]

    def hostile_tables(self) -> list[int]:
        """The MMU on with registers of any value, tables that point at themselves, each other, nothing, everything."""
        rng = self.rng
        tcr = rng.getrandbits(64) if rng.random() < 0.3 else (
            rng.randrange(12, 40) | rng.randrange(12, 40) << 16 | rng.randrange(4) << 14 | rng.randrange(4) << 30
            | rng.randrange(8) << 32 | rng.getrandbits(4) << 37 | rng.getrandbits(1) << 59
        )  # fmt: skip
        self.system = {
            "TCR_EL1": tcr,
            "TTBR0_EL1": rng.choice((self.gpa + TABLES, self.gpa + TABLES + 0x4000, self.value())) & (1 << 48) - 1,
            "TTBR1_EL1": self.value(),
            "MAIR_EL1": rng.getrandbits(64),
            "SCTLR_EL1": 0x30D0_0801 | rng.choice((0, 4, 1 << 25, 1 << 19, rng.getrandbits(30))),
        }
        self.usable = self.gpa >> 48 == 0 and rng.random() < 0.6
        if self.usable:  # the code itself is mapped, so that it goes on to use the other entries
            self.system["TCR_EL1"] = 16 | 16 << 16 | 2 << 30 | 5 << 32 | rng.getrandbits(2) << 39
            self.system["TTBR0_EL1"] = self.gpa + TABLES
            self.system["SCTLR_EL1"] = 0x30D0_0801 | rng.choice((0, 4))
        return self.biased_words()

    def interrupts(self) -> list[int]:
        """The CPU interface's and the timers' registers, WFI, and accesses of every frame and device of the board."""
        rng, words = self.rng, []
        for _ in range(250):
            register = rng.choice(
                (
                    0x0C << 12 | rng.choice((8, 9, 11, 12)) << 8 | rng.randrange(8) << 5,  # ICC_*_EL1
                    0x4 << 12 | 6 << 8,  # ICC_PMR_EL1
                    3 << 16 | 0xE << 12 | rng.choice((0, 2, 3)) << 8 | rng.randrange(3) << 5,  # CNT*_EL0
                )
            )
            words.append(0xD510_0000 | 1 << 20 | 1 << 19 | rng.getrandbits(1) << 21 | register | rng.randrange(28))
            # movz, movk: the address of a register; then any plain access.
            base, offset = rng.choice(BOARD), rng.choice((rng.randrange(0x1000), rng.randrange(0x20000))) & -4
            address = base + offset
            words.append(0xD280_0000 | (address & 0xFFFF) << 5 | 28)
            words.append(0xF2A0_0000 | (address >> 16) << 5 | 28)
            words.append(
                rng.choice((0x3900_0000, 0x7900_0000, 0xB900_0000, 0xF900_0000))
                | rng.getrandbits(1) << 22 | 28 << 5 | rng.randrange(28)
            )  # fmt: skip
            if rng.random() < 0.2:
                words.append(
                    rng.choice((0xD503_207F, 0xD503_42FF, 0xD503_42DF, 0xD503_205F))
                )  # WFI, DAIFClr, -Set, WFE
        return words

    system: dict[str, int] = {}
    usable = False

    def tables(self) -> bytes:
        rng, entries = self.rng, []
        for _ in range((DATA - TABLES) // 8):
            kind = rng.random()
            place = rng.choice(
                (self.gpa + TABLES, self.gpa + TABLES + rng.randrange(0x60) * 0x1000, self.gpa, self.value())
            )
            attributes = 0x700 | rng.choice((0, 0x40, 0x80, rng.getrandbits(12) & 0xFFC))
            entries.append(0 if kind < 0.1 else place & 0xF_FFFF_FFFF_F000 | attributes | rng.choice((1, 3, 3, 3)))
        if self.usable:  # 4K, 48 bits: three tables, then a block of 2 MiB
            for level, shift in enumerate((39, 30, 21)):
                table, last = self.gpa + TABLES + 0x1000 * (level + 1), level == 2
                entry = self.gpa & -(1 << 21) | 0x701 if last else table | 3
                entries[512 * level + (self.gpa >> shift & 511)] = entry
        return struct.pack(f"<{len(entries)}Q", *entries)


KINDS = (
    *("random_words", "biased_words", "self_modifying", "mmio", "calls", "waiting", "hostile_tables", "biased_words"),
    *("interrupts", "interrupts"),
)
# Distributor, ITS, redistributors (or a GICv2's interface), UART, clock, virtio slots.
BOARD = (
    *(0x0800_0000, 0x0801_0000, 0x0808_0000, 0x0809_0000, 0x080A_0000, 0x080B_0000, 0x0900_0000, 0x0901_0000),
    *(0x0A00_0000 + 0x200 * slot for slot in range(4)),
)


class GuestMemory:
    """The guest's RAM, as devices see it."""

    def __init__(self, gpa: int, ram: memoryview) -> None:
        self.gpa, self.ram = gpa, ram

    def _at(self, gpa: int, size: int) -> int:
        if not self.gpa <= gpa <= self.gpa + RAM_SIZE - size:
            raise UsageError(f"{size:#x} bytes at {gpa:#x}: no memory")
        return gpa - self.gpa

    def read(self, gpa: int, size: int) -> bytes:
        at = self._at(gpa, size)
        return bytes(self.ram[at : at + size])

    def write(self, gpa: int, data: bytes) -> None:
        at = self._at(gpa, len(data))
        self.ram[at : at + len(data)] = data


class Machine:
    """A GIC of some version and the board's devices, around a VM whose vCPU is made already."""

    def __init__(self, vm: object, rng: random.Random, memory: GuestMemory) -> None:
        self.vm, self.rng = vm, rng
        version = rng.choice([number for number in (2, 3) if has_device(vm, f"vgic-v{number}")])
        self.gic = make_gic(vm, 1, 96, version)
        self.bus = Bus()
        self.bus.add(0x0900_0000, Pl011(lambda byte: None, self.line(1)), "uart", 1)
        self.bus.add(0x0901_0000, Pl031(self.line(2)), "rtc", 2)
        for slot, device in enumerate((Rng(), Console(lambda data: None), Rng())):
            self.bus.add(0x0A00_0000 + 0x200 * slot, VirtioMmio(device, memory, self.line(16 + slot)), f"v{slot}", 16)

    def line(self, spi: int) -> object:
        return lambda level: self.vm.irq_line(1 << 24 | 32 + spi, level)

    def provoke(self) -> None:
        """An interrupt that comes from outside, of any number, perhaps of none."""
        rng = self.rng
        number = rng.choice((rng.randrange(1100), rng.getrandbits(32), 2 << 24 | rng.randrange(40)))
        with contextlib.suppress(KvmError):
            self.vm.irq_line(number, rng.random() < 0.7)


def load(guest: Guest, canary: Canary, vcpu: object, kind: str) -> None:
    rng = guest.rng
    words = getattr(guest, kind)()
    ram = canary.ram
    ram[:TABLES] = bytes(TABLES)
    ram[CODE : CODE + 4 * len(words)] = struct.pack(f"<{len(words)}I", *words)
    for vector in range(16):
        ram[VECTORS + 128 * vector : VECTORS + 128 * vector + 24] = STEP_OVER
    if kind == "hostile_tables":
        ram[TABLES:DATA] = guest.tables()
    regs = vcpu.regs
    for number in range(31):
        setattr(regs, f"x{number}", guest.value())
    regs.pc, regs.sp = guest.gpa + CODE + 4 * rng.randrange(8), guest.gpa + RAM_SIZE - 0x1000
    regs.pstate = rng.choice((0x3C5, 0x3C5, 0x3C4, 0x3C0, 0x5))
    system = {"VBAR_EL1": guest.gpa + VECTORS, "CPACR_EL1": 3 << 20 | rng.choice((0, 3 << 16)), **guest.system}
    for name, value in system.items():
        vcpu.set_reg(name, value)


def play(guest: Guest, vcpu: object, watchdog: Watchdog, machine: Machine | None) -> str:
    """Runs until something ends the guest; what did."""
    rng = guest.rng
    watchdog.deadline, watchdog.vcpu = time.monotonic() + BUDGET, vcpu
    try:
        for _ in range(EXITS):
            try:
                exit = vcpu.run_once()
            except KvmError as error:
                if error.errno != errno.ENOSYS:
                    raise
                vcpu.regs.pc = (vcpu.regs.pc + 4) % (1 << 64)  # as a VMM could that emulates the access
                continue
            if isinstance(exit, Nisv):
                vcpu.regs.pc = (vcpu.regs.pc + 4) % (1 << 64)
            elif isinstance(exit, Mmio):
                if machine is not None:
                    machine.provoke()
                    if machine.bus.answer(exit):
                        continue
                if not 1 <= exit.size <= 8 or exit.address >> 52:
                    return f"WRONG {exit!r}"
                if not exit.is_write:
                    exit.reply(rng.randbytes(exit.size))
            elif isinstance(exit, Interrupted):
                return "budget"
            else:
                return repr(exit).split("(")[0]
        return "exits"
    except KvmError as error:
        if error.errno != errno.EFAULT:
            return f"WRONG {error}"
        return error.name if "Unicorn error" not in str(error) else f"emulator: {str(error).split(': ')[-1]}"
    finally:
        watchdog.vcpu = None


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main(seed: int, first: int, count: int) -> None:
    watchdog, canary = Watchdog(), Canary(seed)
    for number in range(first, first + count):
        rng = random.Random(f"{seed} {number}")
        name, bits, gpa = rng.choice(HOSTS)
        kind = KINDS[number % len(KINDS)]
        say(guest=number, kind=kind, host=name)
        with kvm2.open(name) as kvm, kvm.create_vm(bits) as vm, vm.create_vcpu() as vcpu:
            guest = Guest(rng, gpa, bits)
            vm.set_memory_region(0, gpa, RAM_SIZE, canary.base + canary.ram_at)
            vm.set_memory_region(1, guest.rom, ROM_SIZE, canary.base + canary.rom_at, 2)
            if rng.random() < 0.3:
                vm.enable_cap("ARM_NISV_TO_USER")
            optional = ["sve"] * (rng.random() < 0.5 and kvm.check_extension("ARM_SVE"))
            if rng.random() < 0.5 and kvm.check_extension("ARM_PTRAUTH_ADDRESS"):
                optional += ["ptrauth_address", "ptrauth_generic"]
            vcpu.init(["psci_0_2", *optional])
            if "sve" in optional:
                vcpu.finalize("sve")
            machine = Machine(vm, rng, GuestMemory(gpa, canary.ram)) if kind == "interrupts" else None
            load(guest, canary, vcpu, kind)
            start = time.monotonic()
            ended = play(guest, vcpu, watchdog, machine)
            took = time.monotonic() - start
        intact = canary.checksum() == canary.sum
        say(guest=number, ended=ended, seconds=round(took, 3), intact=intact)
        if not intact:
            return


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))

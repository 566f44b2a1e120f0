"""Random work for an ITS, through ioctls alone, and what was answered: the same on every KVM of this release.

Stands alone, so that a live kernel can be asked:

    kvm2 oracle exec --shape max-4k-6.12 --put tests/softkvm/vgic/its_work.py=/work.py -- python /work.py /dev/kvm 40

No vCPU runs: userspace writes GITS_CWRITER and the redistributors' registers, which does what a guest's write does.
"""

from __future__ import annotations

import random
import re
import struct
import sys
import zlib

import kvm2
from kvm2.abi import ioctls
from kvm2.abi.structs_irq import Msi
from kvm2.errors import KvmError

RAM, SIZE = 0x4000_0000, 16 << 20
QUEUE, DEVICES, COLLECTIONS, PROPERTIES, PENDING, ITT, SECOND = (RAM + (n << 20) for n in range(1, 8))
BAD = 0x7000_0000  # no memory
DIST, ITS, REDIST = 0x0800_0000, 0x0808_0000, 0x080A_0000
DOORBELL = ITS + 0x10040
ADDR, CTRL, REDIST_REGS, ITS_REGS = 0, 4, 5, 8
INIT, SAVE, RESTORE, SAVE_PENDING, RESET = range(5)
CTLR, IIDR, TYPER, CBASER, CWRITER, CREADR, BASER0, BASER1 = 0, 4, 8, 0x80, 0x88, 0x90, 0x100, 0x108
MOVI, INT, CLEAR, SYNC, MAPD, MAPC, MAPTI, MAPI, INV, INVALL, MOVALL, DISCARD = 1, 3, 4, 5, *range(8, 16)
VALID = 1 << 63
QUEUE_SIZE = 4096
SEEN = (CTLR, IIDR, TYPER, CBASER, CWRITER, CREADR, BASER0, BASER1, 0x110, 0xFFD0, 0xFFD4, 0xFFE8, 0xFFFC)
LPI_REGS = (0, 0x70, 0x74, 0x78, 0x7C)
TABLES = (DEVICES, 0x20000), (COLLECTIONS, 0x20000), (SECOND, 0x80000), (PENDING, 0x20000), (ITT, 0x100000)
SOME_LPIS = (8192, 8193, 8194, 8195, 8200, 9000, 65535)


def answer(call, *args):
    """What a call gives, or the name of its errno."""
    try:
        return call(*args) or 0
    except KvmError as refusal:
        return refusal.name


def command(opcode, device=0, event=0, high=0, two=0, three=0):
    return struct.pack("<4Q", opcode | device << 32, event | high << 32, two, three)


class Work:
    """One VM, one seed; `lines` is what was answered."""

    def __init__(self, vm, seed):
        self.vm, self.rng, self.lines = vm, random.Random(seed), []
        vm.map(RAM, SIZE)
        self.vcpus = [vm.create_vcpu(number) for number in range(2)]
        for vcpu in self.vcpus:
            vcpu.init()
        self.gic, self.its = vm.create_device("vgic-v3"), vm.create_device("vgic-its")
        for device, kind, address in ((self.gic, 2, DIST), (self.gic, 3, REDIST), (self.its, 4, ITS)):
            device.set_device_attr(ADDR, kind, address.to_bytes(8, "little"))
        self.gic.set_device_attr(CTRL, INIT)
        self.its.set_device_attr(CTRL, INIT)

    def say(self, *words):
        self.lines.append(" ".join(map(str, words)))

    # ---- registers

    def get(self, offset):
        value = answer(self.its.get_device_attr, ITS_REGS, offset, 8)
        return value if isinstance(value, str) else hex(int.from_bytes(value, "little"))

    def put(self, offset, value):
        return answer(self.its.set_device_attr, ITS_REGS, offset, (value % (1 << 64)).to_bytes(8, "little"))

    def rget(self, vcpu, offset):
        value = answer(self.gic.get_device_attr, REDIST_REGS, vcpu << 32 | offset, 4)
        return value if isinstance(value, str) else hex(int.from_bytes(value, "little"))

    def rput(self, vcpu, offset, value):
        data = (value % (1 << 32)).to_bytes(4, "little")
        return answer(self.gic.set_device_attr, REDIST_REGS, vcpu << 32 | offset, data)

    def registers(self):
        self.say("its", *(self.get(offset) for offset in SEEN))
        self.say("redistributors", *(self.rget(vcpu, offset) for vcpu in range(2) for offset in LPI_REGS))

    def odd_registers(self):
        """Any value in every register, and offsets that are none."""
        for offset in (
            CBASER,
            BASER0,
            BASER1,
            0x110,
            CREADR,
            CWRITER,
            IIDR,
            TYPER,
            0xFFD0,
            0x104,
            0x10,
            7,
            0x84,
            1 << 32,
        ):
            value = self.rng.getrandbits(64)
            has = answer(self.its.has_device_attr, ITS_REGS, offset)
            self.say("register", hex(offset), hex(value), self.put(offset, value), self.get(offset), has)
        for offset in LPI_REGS[1:]:
            value = self.rng.getrandbits(32)
            self.say("redistributor", hex(offset), hex(value), self.rput(0, offset, value), self.rget(0, offset))

    # ---- the parts of a run

    def set_up(self, indirect):
        rng = self.rng
        if indirect:
            for place, table in ((0, SECOND), (1, SECOND + 0x10000), (7, SECOND + 0x20000)):
                self.vm.write(DEVICES + 8 * place, (table | VALID).to_bytes(8, "little"))
        self.vm.write(PROPERTIES, bytes(rng.choice([0xA1, 0xA0, 0x41, 0xF1]) for _ in range(1024)) * 56)
        if rng.random() < 0.5:
            for vcpu in range(2):
                self.vm.write(PENDING + vcpu * 0x10000 + 1024, rng.randbytes(2))
        for vcpu in range(2):
            for offset, value in ((0x70, PROPERTIES | 15), (0x78, PENDING + vcpu * 0x10000)):
                self.rput(vcpu, offset, value)
                self.rput(vcpu, offset + 4, value >> 32)
            self.rput(vcpu, 0, 1)
        self.put(BASER0, DEVICES | VALID | indirect << 62)
        self.put(BASER1, COLLECTIONS | VALID)
        self.put(CBASER, QUEUE | VALID)
        self.put(CTLR, 1)

    def usual_commands(self):
        """Devices, collections and events as a driver maps them."""
        rng = self.rng
        found = [command(MAPC, two=number | vcpu << 16 | VALID) for number, vcpu in ((0, 0), (1, 1), (2, 1))]
        for device in (0, 1, 2, 5):
            found.append(command(MAPD, device, 5, two=ITT + device * 0x10000 | VALID))
            for event in (0, 1, 2, 3, 31):
                if rng.random() < 0.8:
                    lpi = rng.choice([*SOME_LPIS, 8210 + device * 8 + event])
                    found.append(command(MAPTI, device, event, lpi, rng.choice([0, 1, 2, 3])))
        return found

    def any_command(self):
        rng = self.rng
        if rng.random() < 0.03:
            return rng.randbytes(32)
        opcode = rng.choice(
            [*(MAPD, MAPC, MAPC, MAPI, MOVI, CLEAR, SYNC, INV, INVALL, MOVALL, DISCARD), *[MAPTI, INT] * 4]
        )
        device, event = rng.choice([0, 1, 2, 5]), rng.choice([0, 1, 2, 3, 31])
        collection = rng.choice([0, 1, 2, 3])
        if rng.random() < 0.1:
            opcode, device, event = rng.randrange(256), rng.getrandbits(32), rng.getrandbits(32)
        if opcode == MAPD:
            itt = rng.choice([*[ITT + device * 0x10000] * 4, BAD, rng.getrandbits(52) & ~0xFF])
            valid = rng.random() < 0.9
            return command(
                MAPD, rng.choice([device, 8200, 65535]), rng.choice([1, 4, 7, 15, 16]), two=itt | valid << 63
            )
        if opcode == MAPC:
            return command(MAPC, two=collection | rng.choice([0, 1, 1, 2]) << 16 | (rng.random() < 0.8) << 63)
        if opcode == MOVALL:
            return command(MOVALL, two=rng.choice([0, 1, 2]) << 16, three=rng.choice([0, 1, 1, 2]) << 16)
        if opcode == MAPI:
            event = rng.choice([8192, 8193, 31])
        high = rng.choice([*SOME_LPIS, 8191, 65536, rng.getrandbits(32)])
        return command(opcode, device, event, high, rng.choice([collection, collection, 300, 8191, 8192]))

    def send(self, commands):
        """A few at a time."""
        at = int(self.get(CWRITER), 16)
        for start in range(0, len(commands), 8):
            for data in commands[start : start + 8]:
                self.vm.write(QUEUE + at, data)
                at = (at + 32) % QUEUE_SIZE
            self.put(CWRITER, at)
            self.say("queue", self.get(CREADR))

    def message(self, device, event, address=DOORBELL, flags=1):
        msi = Msi(address & 0xFFFFFFFF, address >> 32, event, flags, device)
        self.say("message", device, event, answer(self.vm.ioctl, ioctls.KVM_SIGNAL_MSI, msi))

    def saved(self):
        """Every entry of every table that is not zero, after saving."""
        self.say("pending", answer(self.gic.set_device_attr, CTRL, SAVE_PENDING))
        self.say("save", answer(self.its.set_device_attr, CTRL, SAVE))
        for base, size in TABLES:
            data = self.vm.read(base, size)
            places = {at // 8 * 8 for found in re.finditer(rb"[^\0]+", data) for at in range(*found.span())}
            for at in sorted(places):
                self.say("entry", hex(base + at), data[at : at + 8][::-1].hex())

    def something(self):
        rng = self.rng
        what = rng.random()
        if what < 0.7:
            self.send([self.any_command() for _ in range(rng.randrange(1, 12))])
        if what > 0.4:
            for _ in range(4):
                address, flags = rng.choice([*[DOORBELL] * 12, ITS, DIST, RAM]), rng.choice([*[1] * 8, 0, 0, 2])
                self.message(rng.choice([0, 1, 2, 5, 99]), rng.choice([0, 1, 2, 3, 31, 8192]), address, flags)
        if what > 0.9:
            vcpu = rng.randrange(2)
            self.say("off", self.rput(vcpu, 0, 0), self.rget(vcpu, 0))
            self.message(0, 0)
            self.rput(vcpu, 0, rng.random() < 0.8)
        if what > 0.97:
            self.put(CTLR, 0)
            self.message(0, 0)
            self.put(CTLR, 1)
        if 0.3 < what < 0.36:
            self.say("creadr", self.put(CREADR, rng.getrandbits(14)), self.get(CREADR))

    def restored(self, indirect):
        """Restored over what is there, into a new ITS, from tables that were written to; then used and saved again."""
        rng = self.rng
        kept = {offset: int(self.get(offset), 16) for offset in (CBASER, CWRITER, CREADR, BASER0, BASER1, CTLR)}
        self.say("restore over", answer(self.its.set_device_attr, CTRL, RESTORE))
        self.say("reset", answer(self.its.set_device_attr, CTRL, RESET))
        self.registers()
        self.say("no control", *(answer(self.its.set_device_attr, CTRL, attr) for attr in (3, 9)))
        for offset in (CBASER, CWRITER, CREADR, BASER0, BASER1):
            self.put(offset, kept[offset])
        if rng.random() < 0.4:
            for _ in range(rng.randrange(1, 4)):
                at = rng.choice([DEVICES, COLLECTIONS, ITT, SECOND]) + rng.randrange(64) * 8
                entry = rng.choice([rng.getrandbits(64), 0, VALID, 0x2001 << 16, 0x2005 << 16 | 2 | 1 << 48])
                self.vm.write(at, entry.to_bytes(8, "little"))
        self.say("restore", answer(self.its.set_device_attr, CTRL, RESTORE))
        for base, size in TABLES:
            if base != DEVICES or not indirect:
                self.vm.write(base, bytes(size))
        self.saved()
        self.put(CTLR, kept[CTLR])
        for device in (0, 1, 2, 5):
            for event in (0, 1, 2):
                self.message(device, event)
        self.send([self.any_command() for _ in range(10)])
        self.saved()
        self.registers()


def run(kvm, seed):
    """The answers of one seed."""
    with kvm.create_vm2() as vm:
        work = Work(vm, seed)
        work.registers()
        indirect = seed % 3 == 0
        if seed % 4 == 0:
            work.odd_registers()
        work.set_up(indirect)
        work.registers()
        work.send(work.usual_commands())
        for _ in range(work.rng.randrange(4, 12)):
            work.something()
        work.registers()
        work.saved()
        work.restored(indirect)
        for vcpu in work.vcpus:
            vcpu.close()
    return work.lines


def checksums(lines):
    """What is kept of the answers: a checksum of each line."""
    return " ".join(f"{zlib.crc32(line.encode()):08x}" for line in lines)


if __name__ == "__main__":
    with kvm2.open(sys.argv[1]) as kvm:
        for seed in range(*map(int, sys.argv[2:])):
            print(seed, checksums(run(kvm, seed)), flush=True)

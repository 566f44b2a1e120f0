"""A vGIC's attributes, asked in every state, as JSON: `python vgic_inside.py HOST v2|v3`. For a live kernel and its
description; values to write are the same in every run.

Run as a program (inside the machine too), so it stands alone.
"""

import errno
import json
import os
import struct
import sys

import kvm2
from kvm2.abi import ioctls, structs, structs_arm64
from kvm2.errors import KvmError
from kvm2.handle import Buffer

HAS, GET, SET = ioctls.KVM_HAS_DEVICE_ATTR, ioctls.KVM_GET_DEVICE_ATTR, ioctls.KVM_SET_DEVICE_ATTR
ADDR, DIST, CPU, NR_IRQS, CTRL, REDIST, SYSREGS, LEVELS = range(8)
RAM = 0x4000_0000
OFF = struct.pack("<3I", 0xD2B08000, 0xF2800100, 0xD4000002)  # PSCI SYSTEM_OFF
FRAMES = {"v3": ((2, 0x0800_0000), (3, 0x080A_0000)), "v2": ((0, 0x0800_0000), (1, 0x0801_0000))}
# ICC_PMR, BPR0, AP0R0-3, AP1R0-3, RPR, IAR1, BPR1, CTLR, SRE, IGRPEN0, IGRPEN1 (EL1).
ICC = (0xC230, *range(0xC643, 0xC64C), 0xC65B, 0xC660, *range(0xC663, 0xC668))
# Registers that are written, with random values.
WRITTEN = {
    ("v3", DIST): (0, 4, 8, 12, 0x84, 0x88, 0x104, 0x108, 0x184, 0x204, 0x208, 0x284, 0x304, 0x384, 0x420, 0x45C,
                   0x820, 0xC08, 0xC14, 0xD04, 0x6100, 0x6104, 0x6110, 0xFFE8),
    ("v3", REDIST): (0, 4, 8, 12, 16, 20, 0x70, 0x74, 0x78, 0x7C, 0xA0, 0xB0, 0xC0, 0x10080, 0x10100, 0x10180,
                     0x10200, 0x10280, 0x10300, 0x10380, 0x10400, 0x1041C, 0x10C00, 0x10C04, 0x10D00, 0x10E00),
    ("v2", DIST): (0, 4, 8, 0x80, 0x84, 0x100, 0x104, 0x180, 0x200, 0x204, 0x280, 0x300, 0x304, 0x380, 0x400, 0x420,
                   0x800, 0x820, 0xC00, 0xC04, 0xC08, 0xF00, 0xF10, 0xF20, 0xF2C),
    ("v2", CPU): (0, 4, 8, 0x1C, 0xD0, 0xD4, 0xFC),
}  # fmt: skip


class Asked:
    """Writes down what each call answers."""

    def __init__(self, model):
        self.model, self.answers, self.seed = model, [], 12345
        self.groups = (DIST, REDIST) if model == "v3" else (DIST, CPU)

    def random(self):
        self.seed = (self.seed * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return self.seed >> 16 & 0xFFFFFFFF

    def call(self, text, function, *arguments):
        try:
            answer = function(*arguments)
        except KvmError as error:
            answer = errno.errorcode[error.errno]
        answer = answer if isinstance(answer, (int, str)) else "ok"
        self.answers.append([text, answer])
        return answer

    def attr(self, device, what, group, attr, value=0, size=4, address=None, text=""):
        data = Buffer(value.to_bytes(size, "little"))
        at = data.address if address is None else address

        def ask():
            device.ioctl(what, structs.DeviceAttr(group=group, attr=attr, addr=at))
            return int.from_bytes(data.bytes(), "little") if what == GET else "ok"

        words = {HAS: "has", GET: "get", SET: "set"}
        return self.call(f"{words[what]} {group} {attr:#x} {text or hex(value)}", ask)

    def everything(self, device, what):
        """All of the first page of each frame, and around what lies higher."""
        ends = (0x5FF0, 0x60F0, 0x63F0, 0x7FF0, 0xFFC0, 0xFFF0, 0x10070, 0x10400, 0x10BF0, 0x10DF0, 0x1FFF0)
        offsets = [*range(0, 0x1100, 4), 1, 2, 0x402, 0x6001, *(at + n for at in ends for n in range(0, 0x30, 4))]
        for group in self.groups:
            for offset in offsets:
                self.attr(device, what, group, offset)
        if self.model == "v3":
            for enc in (*ICC, 0xC231, 0xC661):
                self.attr(device, what, SYSREGS, enc, 0, 8)


def made(asked, kvm):
    """What can be made and placed, in which order."""
    with kvm.create_vm2() as vm:
        for _ in range(2):
            asked.call("irqchip", vm.ioctl, ioctls.KVM_CREATE_IRQCHIP, 0)
        for id, at in ((0, 1 << 27), (0, 1 << 27), (1, 0x8010800), (1, 0x8010000), (2, 0), (0x10000, 0), (0x20001, 0)):
            device = structs_arm64.ArmDeviceAddr(id=id, addr=at)
            asked.call(f"place {id:#x} {at:#x}", vm.ioctl, ioctls.KVM_ARM_SET_DEVICE_ADDR, device)
        for kind in ("vgic-v2", "vgic-v3"):
            asked.call(kind, vm.create_device, kind)
        asked.call("MAX_VCPUS", vm.check_extension, "MAX_VCPUS")
        asked.call("vCPU 8", vm.create_vcpu, 8)
    with kvm.create_vm2() as vm:
        device = vm.create_device("vfio")
        asked.call("vfio", vm.create_device, "vfio")
        reader = os.pipe()[0]
        for group, attr in ((1, 1), (1, 2), (1, 3), (0, 0), (2, 1)):
            for what, value in ((HAS, 0), (GET, 0), (SET, reader), (SET, 999), (SET, 0xFFFFFFFF)):
                asked.attr(device, what, group, attr, value, text="pipe" if value == reader else "")
    for case in ("nothing", "distributor", "other", "overlap"):
        with kvm.create_vm2() as vm:
            vcpu, device = start(vm, 1)[0], vm.create_device(f"vgic-{asked.model}")
            first, second = FRAMES[asked.model]
            if case in ("distributor", "overlap"):
                asked.attr(device, SET, ADDR, *first, 8)
            if case in ("other", "overlap"):
                asked.attr(device, SET, ADDR, second[0], first[1] if case == "overlap" else second[1], 8)
            asked.attr(device, SET, CTRL, 0)
            for _ in range(2):
                asked.call(f"run {case}", vcpu.run_once)
            asked.attr(device, HAS, ADDR, 2)


def start(vm, vcpus):
    vm.map(RAM, 1 << 16).write(0, OFF)
    found = [vm.create_vcpu(number) for number in range(vcpus)]
    for vcpu in found:
        vcpu.init()
        vcpu.regs.pc = RAM
    return found


def set_up(asked, vm):
    """A vGIC before and after each step of its set-up."""
    device = vm.create_device(f"vgic-{asked.model}")
    for group in range(9):
        for what in (HAS, GET, SET):
            asked.attr(device, what, group, 7, 0, 8)
            if (what, group) == (SET, CTRL):
                continue
            asked.attr(device, what, group, 0, 0, 8)
            if what != HAS and group not in (ADDR, CTRL):
                asked.attr(device, what, group, 0, 0, 8, address=0)
    for frame, at in FRAMES[asked.model]:
        for address in (at + 1, (1 << 64) - 0x1000, (1 << 64) - 0x10000, 1 << 40, at, at, at + 1):
            asked.attr(device, SET, ADDR, frame, address, 8)
    vcpus = start(vm, 2)
    asked.everything(device, HAS)
    for number in (31, 96, 96):
        asked.attr(device, SET, NR_IRQS, 0, number)
    for value in (1 << 52 | 0x900_0000 | 1, 1 << 52 | 0x900_0000, 0x900_0000):
        asked.attr(device, SET, ADDR, 5, value, 8)
        asked.attr(device, GET, ADDR, 5, value, 8)
    for attr in (0, 3, 1, 0):
        asked.attr(device, SET, CTRL, attr)
    asked.call("vCPU", vm.create_vcpu, 2)
    asked.call("vCPU", vm.create_vcpu, 0)
    asked.everything(device, HAS)
    return device, vcpus


def written(asked, device, rounds):
    """Random values into every register, and what is read then."""
    for _ in range(rounds):
        for group in asked.groups:
            for offset in WRITTEN[asked.model, group]:
                at = (asked.random() & 1) << 32 | offset if group != DIST or asked.model == "v2" else offset
                asked.attr(device, SET, group, at, asked.random())
                asked.attr(device, GET, group, at)
        if asked.model == "v3":
            for enc in ICC:
                for value in (asked.random(), asked.random() & 7, 0x8C00 | asked.random() & 3, 0x8400):
                    asked.attr(device, SET, SYSREGS, enc, value, 8)
            for first in (0, 32, 64, 96, 5, 0x400):
                asked.attr(device, SET, LEVELS, first, asked.random())
                asked.attr(device, GET, LEVELS, first)
        asked.everything(device, GET)
    for revision in range(5):
        asked.attr(device, SET, DIST, 8, 0x4B00043B | revision << 12)


def main(host, model):
    asked = Asked(model)
    with kvm2.open(host) as kvm:
        made(asked, kvm)
        with kvm.create_vm2() as vm:
            device, vcpus = set_up(asked, vm)
            asked.everything(device, GET)
            written(asked, device, 2)
            active, pending = (
                ((REDIST, 0x10300), (REDIST, 0x10200)) if model == "v3" else ((DIST, 0x300), (DIST, 0x200))
            )
            # Nothing may interrupt the guest: everything off.
            asked.attr(device, SET, DIST, 0, 0)
            asked.attr(device, SET, *active, 0)
            asked.call("run", vcpus[0].run_once)
            asked.everything(device, GET)
            for bit in (27, 30, 20, 1):
                for group, offset in (active, pending):
                    asked.attr(device, SET, group, offset, 1 << bit)
                    asked.attr(device, GET, group, offset)
            asked.attr(device, SET, CTRL, 0)
            asked.attr(device, SET, ADDR, *FRAMES[model][0], 8)
    print(json.dumps(asked.answers))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A guest that sets up its ITS itself and takes LPIs: its own INT commands, messages of other threads, two vCPUs."""

from __future__ import annotations

import struct
import threading
import time

import pytest

import kvm2
from kvm2.abi import ioctls
from kvm2.abi import its as abi
from kvm2.abi.structs_irq import KVM_MSI_VALID_DEVID, Msi
from kvm2.errors import KvmError
from kvm2.exits import Mmio

from .rig import flat

RAM = 0x4000_0000
TABLE, LOG, LOG_STRIDE = RAM + 0x10000, RAM + 0x20000, 0x1000
QUEUE, DEVICES, COLLECTIONS, PROPERTIES, PENDING, ITT = (RAM + (n << 20) for n in range(1, 7))
DIST, ITS, REDIST, DONE = 0x0800_0000, 0x0808_0000, 0x080A_0000, 0x0B00_0000
FIRST = 8192
ADDR, CTRL = 0, 4

# x19: writes to do (address, value, bytes; address 0 ends them), x20: where interrupts are written down, x21: how many
# there will be, x22: a device that is told of the last one.
GUEST = """
    adr x0, vectors
    msr vbar_el1, x0
    mov x0, #0xf8
    msr S3_0_C4_C6_0, x0        // ICC_PMR_EL1
    mov x0, #1
    msr S3_0_C12_C12_7, x0      // ICC_IGRPEN1_EL1
    isb
next:
    ldp x1, x2, [x19], #16
    cbz x1, wait
    ldr x3, [x19], #8
    cmp x3, #4
    b.eq word
    str x2, [x1]
    b next
word:
    str w2, [x1]
    b next
wait:
    msr daifclr, #2
    wfi
    b wait
    .balign 2048
vectors:
    .space 0x280
    mrs x0, S3_0_C12_C12_0      // ICC_IAR1_EL1
    str w0, [x20], #4
    msr S3_0_C12_C12_1, x0      // ICC_EOIR1_EL1
    sub x21, x21, #1
    cbnz x21, back
    str w0, [x22]
back:
    eret
"""


def command(opcode: int, device: int = 0, event: int = 0, high: int = 0, two: int = 0) -> bytes:
    return struct.pack("<4Q", opcode | device << 32, event | high << 32, two, 0)


class Its:
    """A VM with a GICv3 and an ITS; the guest does the rest."""

    def __init__(self, vm, vcpus: int) -> None:
        self.vm = vm
        vm.map(RAM, 8 << 20)
        self.vcpus = [vm.create_vcpu(number) for number in range(vcpus)]
        gic, its = self.gic, self.its = vm.create_device("vgic-v3"), vm.create_device("vgic-its")
        gic.set_device_attr(ADDR, 2, DIST.to_bytes(8, "little"))
        gic.set_device_attr(ADDR, 3, REDIST.to_bytes(8, "little"))
        its.set_device_attr(ADDR, 4, ITS.to_bytes(8, "little"))
        for device in (gic, its):
            device.set_device_attr(CTRL, 0)
        vm.write(RAM, flat(GUEST))

    def start(self, commands: bytes, expected: list[int]) -> None:
        writes = [(DIST, 0x12, 4)]
        for number in range(len(self.vcpus)):
            frame = REDIST + number * 0x20000
            writes += [(frame + 0x70, PROPERTIES | 15, 8), (frame + 0x78, PENDING + number * 0x10000, 8), (frame, 1, 4)]
        writes += [
            (ITS + abi.GITS_BASER, DEVICES | abi.VALID, 8),
            (ITS + abi.GITS_BASER + 8, COLLECTIONS | abi.VALID, 8),
            (ITS + abi.GITS_CBASER, QUEUE | abi.VALID | 15, 8),
            (ITS + abi.GITS_CTLR, 1, 4),
            (ITS + abi.GITS_CWRITER, len(commands), 8),
        ]
        self.vm.write(TABLE, b"".join(struct.pack("<3Q", *write) for write in writes))
        self.vm.write(QUEUE, commands)
        self.vm.write(PROPERTIES, b"\xa1" * 4096)
        for number, vcpu in enumerate(self.vcpus):
            vcpu.init()
            vcpu.regs.pc = RAM
            vcpu.regs.x19 = TABLE if number == 0 else TABLE + 0x8000
            vcpu.regs.x20, vcpu.regs.x21, vcpu.regs.x22 = LOG + number * LOG_STRIDE, expected[number], DONE

    def taken(self, number: int, count: int) -> list[int]:
        return list(struct.unpack(f"<{count}I", self.vm.read(LOG + number * LOG_STRIDE, 4 * count)))

    def signal(self, device: int, event: int) -> int:
        doorbell = ITS + abi.GITS_TRANSLATER
        return self.vm.ioctl(ioctls.KVM_SIGNAL_MSI, Msi(doorbell, 0, event, KVM_MSI_VALID_DEVID, device))


def setup(lpis: int, vcpus: int) -> bytes:
    """Device 3 with `lpis` events, which go to the vCPUs in turn."""
    commands = command(abi.MAPD, 3, 9, two=ITT | abi.VALID)
    for number in range(vcpus):
        commands += command(abi.MAPC, two=number | number << 16 | abi.VALID)
    for event in range(lpis):
        commands += command(abi.MAPTI, 3, event, FIRST + event, event % vcpus)
    return commands + command(abi.SYNC)


def test_a_guests_own_commands_interrupt_it():
    with kvm2.open("cortex-a57-4k") as kvm, kvm.create_vm2() as vm:
        its = Its(vm, 1)
        its.start(setup(4, 1) + command(abi.INT, 3, 2) + command(abi.INT, 3, 0), [2])
        exit = its.vcpus[0].run_once()
        assert isinstance(exit, Mmio) and exit.address == DONE
        assert its.taken(0, 2) == [FIRST, FIRST + 2]  # both were pending, of the same priority
        # A message while the vCPU is out of the guest is taken when it is in again.
        its.vcpus[0].regs.x21 = 1
        assert its.signal(3, 3) == 1 and its.signal(3, 4) == 0
        assert isinstance(its.vcpus[0].run_once(), Mmio) and its.taken(0, 3)[2] == FIRST + 3
        its.vcpus[0].close()


def test_messages_wake_vcpus_that_wait():
    lpis, vcpus = 200, 2
    with kvm2.open("max-4k-6.12") as kvm, kvm.create_vm2() as vm:
        its = Its(vm, vcpus)
        # The first LPI of each vCPU is the guest's own, which says that everything is set up.
        own = b"".join(command(abi.INT, 3, number) for number in range(vcpus))
        its.start(setup(lpis, vcpus) + own, [lpis // vcpus] * vcpus)
        ended: list[object] = [None] * vcpus

        def run(number: int) -> None:
            ended[number] = its.vcpus[number].run_once()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(vcpus)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while any(its.taken(number, 1) == [0] for number in range(vcpus)) and time.monotonic() < deadline:
            time.sleep(0.001)
        for device, control in ((its.its, 1), (its.its, 2), (its.its, 4), (its.gic, 3)):
            with pytest.raises(KvmError) as refusal:
                device.set_device_attr(CTRL, control)
            assert refusal.value.name == "EBUSY"  # the vCPUs run

        def messages(first: int) -> None:
            for event in range(vcpus + first, lpis, 2):
                assert its.signal(3, event) == 1

        senders = [threading.Thread(target=messages, args=(first,)) for first in range(2)]
        for thread in senders:
            thread.start()
        for thread in (*senders, *threads):
            thread.join(60)
        for number, vcpu in enumerate(its.vcpus):
            if ended[number] is None:
                vcpu.kick()
                threads[number].join(60)
        assert all(isinstance(exit, Mmio) and exit.address == DONE for exit in ended), ended
        for number in range(vcpus):
            assert sorted(its.taken(number, lpis // vcpus)) == list(range(FIRST + number, FIRST + lpis, vcpus))
        for vcpu in its.vcpus:
            vcpu.close()

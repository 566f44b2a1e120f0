"""Devices inside the VM: accesses that are answered without an exit, in place."""

from __future__ import annotations

import pytest

from kvm2.exits import Mmio, SystemEvent

from .rig import RAM, bench
from .test_mmio import ALL, BIG, DEVICE, HOSTS, LOADS, OFF, STORES, VALUE, swapped


class Device:
    """Answers reads with `answer`, writes down what arrives; `silent` leaves everything to others."""

    def __init__(self, answer=0, silent=False):
        self.answer, self.silent, self.seen = answer, silent, []

    def read(self, vcpu, offset, size):
        self.seen.append((vcpu.vcpu_id, offset, size))
        return None if self.silent else self.answer

    def write(self, vcpu, offset, size, value):
        self.seen.append((vcpu.vcpu_id, offset, size, value))
        return not self.silent


def on_bus(b, device, address=DEVICE, size=0x100):
    b.kvm.backend.inspect(b.vm.fd).bus.add(address, size, device)
    return device


@pytest.mark.parametrize(("host", "ram", "bits"), HOSTS)
@pytest.mark.parametrize("big", [False, True], ids=["little", "big"])
def test_loads_and_stores(host, ram, bits, big):
    with bench(host, ram, vm_of=lambda kvm: kvm.create_vm2(physaddr_bits=bits)) as b:
        device = on_bus(b, Device())
        for text, size, expected in LOADS:
            answer = VALUE & (1 << 8 * size) - 1
            device.answer = swapped(answer, size) if big else answer
            assert isinstance(b.run(f"{BIG if big else ''}{text}{OFF}", x1=DEVICE + 0x18, x13=ALL), SystemEvent)
            assert device.seen.pop() == (0, 0x18, size)
            assert b.vcpu.regs.x13 == expected, text
            b.vcpu.init()
        for text, size in STORES:
            assert isinstance(b.run(f"{BIG if big else ''}{text}{OFF}", x1=DEVICE, x2=VALUE), SystemEvent)
            value = VALUE & (1 << 8 * size) - 1
            assert device.seen.pop() == (0, 0, size, swapped(value, size) if big else value)
            b.vcpu.init()


def test_what_no_device_answers_leaves_the_guest():
    with bench() as b:
        silent = on_bus(b, Device(silent=True), size=0x102)
        exit = b.run(f"ldr w13, [x1]\n str w13, [x1, #0x100]{OFF}", x1=DEVICE)
        assert isinstance(exit, Mmio) and silent.seen == [(0, 0, 4)]
        exit.reply(5)
        # The second one reaches over the device's end: it is not asked.
        exit = b.vcpu.run_once()
        assert isinstance(exit, Mmio) and (exit.address, exit.value) == (DEVICE + 0x100, 5) and len(silent.seen) == 1


def test_the_zero_register_and_a_read_only_slot():
    with bench() as b:
        device = on_bus(b, Device(answer=ALL))
        rom = on_bus(b, Device(), 0x5000_0000)
        b.vm.map(0x5000_0000, 0x10000, readonly=True)
        exit = b.run(f"ldr xzr, [x1]\n str xzr, [x1, #8]\n str w2, [x3]{OFF}", x1=DEVICE, x2=3, x3=0x5000_0000)
        assert isinstance(exit, SystemEvent)
        assert device.seen == [(0, 0, 8), (0, 8, 8, 0)] and rom.seen == [(0, 0, 4, 3)]
        assert b.vcpu.regs.sp == 0 and RAM <= b.vcpu.regs.pc < RAM + 0x100

"""Small x86-64 guests on this machine's real KVM, and what a process holds of it."""

from __future__ import annotations

import os
from pathlib import Path

import kvm2

CODE_AT = 0x1000
OUT = bytes.fromhex("e610")  # out %al, $0x10
HLT = b"\xf4"
SPIN = bytes.fromhex("ebfe")


def vcpu(kvm: kvm2.Kvm, code: bytes, **registers: int) -> kvm2.Vcpu:
    """A vCPU in real mode at the start of a program, in 64 KiB of memory."""
    vm = kvm.create_vm()
    vm.map(0, 0x10000).write(CODE_AT, code)
    made = vm.create_vcpu()
    cs = made.regs.cs
    made.regs.update(cs=type(cs)(0, 0xFFFF, 0, cs.type, 1, s=1), rip=CODE_AT, rflags=2, **registers)
    return made


def cycles(kvm: kvm2.Kvm, count: int) -> None:
    """So many VMs with memory and a vCPU, made, run and closed, each in one of the six orders."""
    for number in range(count):
        with vcpu(kvm, OUT + HLT, rax=number & 0xFF) as running:
            vm, ram = running.vm, running.vm.rams[0]
            exit = running.run_once()
            assert isinstance(exit, kvm2.Io) and exit.value == number & 0xFF, exit
            for close in ((vm, running), (running, vm))[number % 2]:
                close.close()
        assert ram.read(CODE_AT, 3) == OUT + HLT
        if number % 3 == 0:
            vcpu(kvm, HLT).run_once()  # forgotten, not closed


def holdings() -> tuple[int, int]:
    """(descriptors, mappings) of this process."""
    return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())

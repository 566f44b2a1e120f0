"""Guests on the software KVM, through the same handles that everybody uses."""

from __future__ import annotations

from collections.abc import Callable

import kvm2
from bench.a64 import LOAD_ADDRESS, MMIO_LOOP, OFF, PSCI_LOOP, code

HOST = "max-4k-6.12"
RAM_BYTES = 4 << 20


def vcpu(program: bytes) -> kvm2.Vcpu:
    """A vCPU at the start of a program, in a VM with 4 MiB of memory."""
    vm = kvm2.open(HOST).create_vm2()
    ram = vm.map(LOAD_ADDRESS, RAM_BYTES)
    ram.write(0, program)
    made = vm.create_vcpu()
    made.init()
    made.set_reg("pc", LOAD_ADDRESS)
    return made


def exits() -> Callable[[int], None]:
    """So many MMIO exits, a Python object each."""
    running = vcpu(MMIO_LOOP)

    def run(count: int) -> None:
        once = running.run_once
        for _ in range(count):
            if not isinstance(once(), kvm2.Mmio):
                raise AssertionError("the guest left for something else than its device")

    return run


def psci_calls() -> Callable[[int], None]:
    """So many PSCI calls by HVC, which the software KVM answers without leaving KVM_RUN."""
    return _until_off(PSCI_LOOP)


def loop(program: bytes) -> Callable[[int], None]:
    """A program that counts X19 down, so many times round."""
    return _until_off(program + code(OFF))


def _until_off(program: bytes) -> Callable[[int], None]:
    running = vcpu(program)

    def run(count: int) -> None:
        running.set_mp_state(0)  # SYSTEM_OFF stopped it
        running.set_reg("pc", LOAD_ADDRESS)
        running.set_reg("x19", count)
        exit = running.run_once()
        if not isinstance(exit, kvm2.SystemEvent):
            raise AssertionError(f"the guest ended with {exit}")

    return run

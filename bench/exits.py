"""Exits of a real x86-64 guest from Python, against the same loop in C on the same vCPU; VMs made on the real kernel.

The guest writes to a port, or to an address without memory, for ever. The loop in C is compiled when it is measured.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import kvm2
from bench.measure import Batch, Figure, Measured, Unavailable, in_turns
from kvm2.abi import exits as abi
from kvm2.abi import ioctls

CODE_AT = 0x1000
IO_LOOP = bytes.fromhex("e610 ebfc")  # out %al, $0x10; jmp back
MMIO_LOOP = bytes.fromhex("a20080 ebfb")  # mov %al, 0x8000; jmp back
EXITS = 3000
CYCLES = 10_000
C_LOOP = """
#include <linux/kvm.h>
#include <sys/ioctl.h>

int loop(int fd, const volatile struct kvm_run *run, unsigned reason, long count)
{
	while (count--)
		if (ioctl(fd, KVM_RUN, 0) || run->exit_reason != reason)
			return -1;
	return 0;
}
"""


def vcpu(code: bytes) -> kvm2.Vcpu:
    """A vCPU of this machine's KVM in real mode at the start of a program; Unavailable where there is none."""
    if os.uname().machine != "x86_64":
        raise Unavailable("the guest is an x86-64 one, this machine is not")
    try:
        kvm = kvm2.open("/dev/kvm")
    except kvm2.Kvm2Error as error:
        raise Unavailable(str(error)) from error
    vm = kvm.create_vm()
    vm.map(CODE_AT, 0x1000).write(0, code)
    made = vm.create_vcpu()
    cs = made.regs.cs
    made.regs.update(cs=type(cs)(0, 0xFFFF, 0, cs.type, 1, s=1), rip=CODE_AT, rflags=2)
    return made


@cache
def c_loop() -> Callable[[int, int, int, int], int]:
    """The loop in C; Unavailable without a compiler."""
    gcc = shutil.which("gcc")
    if gcc is None:
        raise Unavailable("the baseline needs gcc")
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch) / "loop.c", Path(scratch) / "loop.so"
        source.write_text(C_LOOP)
        subprocess.run([gcc, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        loop = ctypes.CDLL(str(library)).loop
    loop.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_long]
    return loop


def in_c(running: kvm2.Vcpu, reason: int) -> Batch:
    """So many exits in C."""
    loop, fd = c_loop(), running.fd
    area = ctypes.addressof(ctypes.c_char.from_buffer(running.kvm_run))

    def run(count: int) -> None:
        if loop(fd, area, reason, count):
            raise AssertionError("the guest left for something else")

    return run


def raw(running: kvm2.Vcpu, reason: int) -> Batch:
    """So many exits by the backend's way into KVM_RUN, reading the reason."""
    fd, enter = running.fd, running.backend.runner(running.fd).ioctl  # type: ignore[attr-defined]
    area, unpack = running.kvm_run, struct.Struct(f"={abi.EXIT_REASON_OFFSET}xI").unpack_from

    def run(count: int) -> None:
        for _ in range(count):
            enter(fd, ioctls.KVM_RUN)
            if unpack(area)[0] != reason:
                raise AssertionError("the guest left for something else")

    return run


def typed(running: kvm2.Vcpu, reason: int) -> Batch:
    """So many exits as objects, by the iterator that a VMM uses."""
    kind = {abi.KVM_EXIT_IO: kvm2.Io, abi.KVM_EXIT_MMIO: kvm2.Mmio}[reason]

    def run(count: int) -> None:
        once = running.run_once
        for _ in range(count):
            if type(once()) is not kind:
                raise AssertionError("the guest left for something else")

    return run


def _exits(ours: Callable[[kvm2.Vcpu, int], Batch], code: bytes, reason: int) -> Measured:
    running = vcpu(code)
    a, b = in_turns(ours(running, reason), EXITS, in_c(running, reason), EXITS, rounds=31)
    running.close()
    return Measured(a / b, a * 1e6, b * 1e6, "us")


def create() -> Measured:
    """KVM_CREATE_VM2 lowered to what the kernel has, and close, against KVM_CREATE_VM and close by fcntl."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        kvm = kvm2.open("/dev/kvm")
    except (OSError, kvm2.Kvm2Error) as error:
        raise Unavailable(f"this needs this machine's /dev/kvm: {error}") from error

    def ours(count: int) -> None:
        for _ in range(count):
            kvm.create_vm2().close()

    def baseline(count: int) -> None:
        for _ in range(count):
            os.close(fcntl.ioctl(device, ioctls.KVM_CREATE_VM, 0))

    a, b = in_turns(ours, 100, baseline, 100)
    os.close(device)
    kvm.close()
    return Measured(a / b, a * 1e6, b * 1e6, "us")


def held() -> int:
    """Descriptors of this process, and mappings of vCPUs."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")) + sum("kvm" in line.rpartition(" ")[2] for line in maps)


def cycles(count: int) -> int:
    """So many VMs with memory and a vCPU, made, run once and closed; what is left of them."""
    vcpu(IO_LOOP).close()  # what is made once
    gc.collect()
    before = held()
    for _ in range(count):
        running = vcpu(IO_LOOP)
        if not isinstance(running.run_once(), kvm2.Io):
            raise AssertionError("the guest left for something else")
        running.close()
        running.vm.close()
    del running
    gc.collect()
    return held() - before


def left_over() -> Measured:
    """What VMs leave behind in the process."""
    left = cycles(CYCLES)
    return Measured(left, left, CYCLES, "VMs")


def io_raw() -> Measured:
    """A write to a port, KVM_RUN from Python."""
    return _exits(raw, IO_LOOP, abi.KVM_EXIT_IO)


def io_typed() -> Measured:
    """A write to a port, as an exit with its object."""
    return _exits(typed, IO_LOOP, abi.KVM_EXIT_IO)


def mmio_raw() -> Measured:
    """A write to an address without memory, KVM_RUN from Python."""
    return _exits(raw, MMIO_LOOP, abi.KVM_EXIT_MMIO)


def mmio_typed() -> Measured:
    """A write to an address without memory, as an exit with its object."""
    return _exits(typed, MMIO_LOOP, abi.KVM_EXIT_MMIO)


FIGURES = (
    Figure("io-raw", "port write of a real guest, KVM_RUN from Python / the same loop in C", 1.5, io_raw),
    Figure("io-typed", "the same with its Io object / C", 2.0, io_typed),
    Figure("mmio-raw", "MMIO write of a real guest, KVM_RUN from Python / the same loop in C", 1.5, mmio_raw),
    Figure("mmio-typed", "the same with its Mmio object / C", 2.0, mmio_typed),
    Figure("left-over", f"descriptors and mappings left by {CYCLES} VMs made, run and closed", 0, left_over, unit=""),
    Figure("create-real", "CREATE_VM2 lowered, and close / KVM_CREATE_VM and close, real kernel", 1.2, create),
)

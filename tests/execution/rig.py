"""What the execution tests share: guests compiled on the spot, run through the handles, their reports read back."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvm2
from kvm2.board.loader import read_image
from kvm2.board.machine import Machine, RunResult
from kvm2.spec import MemoryRange, VmSpec

GCC = "aarch64-linux-gnu-gcc"
GUESTS = Path(__file__).with_name("guests")
RAM = 0x4000_0000
RAM_SIZE = 8 << 20
OUT, LOG, CPU_STRIDE = 0x200000, 0x208000, 0x10000
FLAGS = ("-nostdlib", "-static", "-ffreestanding", "-fno-pic", "-no-pie", "-O1", "-fno-stack-protector", "-w")
C_FLAGS = ("-mgeneral-regs-only", "-mstrict-align", "-fno-builtin", "-mno-outline-atomics")

_built = tempfile.TemporaryDirectory(prefix="kvm2-guests-")


class Taken(NamedTuple):
    """An exception that the guest's handler wrote down."""

    vector: int
    esr: int
    elr: int
    far: int
    spsr: int

    @property
    def ec(self) -> int:
        return self.esr >> 26


def _gcc(arguments: list[str], output: Path) -> Path:
    if not shutil.which(GCC):
        pytest.skip(f"needs {GCC} (Debian and Ubuntu: apt-get install gcc-aarch64-linux-gnu)")
    done = subprocess.run([GCC, *FLAGS, "-o", str(output), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@functools.cache
def build(name: str, ram: int = RAM, *options: str) -> Path:
    """guests/NAME.c with the runtime, as an ELF file linked at `ram`."""
    output = Path(_built.name) / f"{name}-{hashlib.sha1(repr((ram, options)).encode()).hexdigest()[:12]}.elf"
    layout = [f"-DRAM={ram:#x}UL", f"-Wl,-Ttext-segment={ram:#x}", "-Wl,-N", "-Wl,--build-id=none"]
    sources = [str(GUESTS / "rt.S"), str(GUESTS / f"{name}.c")]
    return _gcc([*C_FLAGS, *layout, *options, *sources], output)


@functools.cache
def flat(text: str) -> bytes:
    """The machine code of assembly text that refers to nothing but its own labels and numbers."""
    stem = Path(_built.name) / hashlib.sha1(text.encode()).hexdigest()
    source = stem.with_suffix(".S")
    source.write_text(f"\t.arch armv8.5-a+sve\n{text}\n")
    data = _gcc(["-c", str(source)], stem.with_suffix(".o")).read_bytes()
    # Of the object file only .text is wanted, and of its section header (offset, size) at 24.
    start, each, count, names = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<3H", data, 58)
    headers = [data[start + each * n : start + each * (n + 1)] for n in range(count)]
    strings = struct.unpack_from("<Q", headers[names], 24)[0]
    for header in headers:
        name = strings + struct.unpack_from("<I", header)[0]
        if data[name : name + 6] == b".text\0":
            offset, size = struct.unpack_from("<2Q", header, 24)
            return data[offset : offset + size]
    raise AssertionError("no .text")


class Ran:
    """A finished guest: how it ended, and what it reported."""

    def __init__(self, machine: Machine, result: RunResult, ram: int) -> None:
        self.machine, self.result, self.ram = machine, result, ram

    def out(self, cpu: int = 0) -> list[int]:
        return self._words(self.ram + OUT + cpu * CPU_STRIDE, 1)

    def log(self, cpu: int = 0) -> list[Taken]:
        words = self._words(self.ram + LOG + cpu * CPU_STRIDE, 5)
        return [Taken(*words[at : at + 5]) for at in range(0, len(words), 5)]

    def _words(self, address: int, each: int) -> list[int]:
        count = struct.unpack("<Q", self.machine.vm.read(address, 8))[0]
        return list(struct.unpack(f"<{count * each}Q", self.machine.vm.read(address + 8, 8 * count * each)))


def play(
    name: str, host: str = "max-4k-6.12", *, cpus: int = 1, ram: int = RAM, options: tuple[str, ...] = (), **spec: Any
) -> Ran:
    """Builds and runs guests/NAME.c on `host` until it powers off."""
    image = build(name, ram, *options)
    spec.setdefault("memory", (MemoryRange(ram, RAM_SIZE),))
    with kvm2.open(host) as kvm, Machine(kvm, VmSpec(**spec), cpus=cpus) as machine:
        machine.load(read_image(image, machine.memory))
        result = machine.run(timeout=60)
        ran = Ran(machine, result, ram)
        assert result.ended == "shutdown", (result, [v.regs.pc for v in machine.vcpus], ran.log())
    return ran


class Bench:
    """A VM with one slot of RAM at `gpa` and vCPUs whose code a test writes itself."""

    def __init__(self, kvm: Any, vm: Any, gpa: int, size: int, **flags: bool) -> None:
        self.kvm, self.vm, self.gpa = kvm, vm, gpa
        self.ram = vm.map(gpa, size, **flags)
        self.vcpus = [vm.create_vcpu(0)]
        self.vcpu = self.vcpus[0]
        self.vcpu.init()

    def load(self, text: str, offset: int = 0, vcpu: Any = None, **registers: int) -> None:
        """Code at an offset of the RAM, and the vCPU at its start with `x3=...`."""
        vcpu = vcpu or self.vcpu
        self.ram.write(offset, flat(text))
        vcpu.regs.pc = self.gpa + offset
        for name, value in registers.items():
            setattr(vcpu.regs, name, value)

    def run(self, text: str, offset: int = 0, **registers: int) -> Any:
        """`load`, and the first exit."""
        self.load(text, offset, **registers)
        return self.vcpu.run_once()


@contextlib.contextmanager
def bench(
    host: str = "max-4k-6.12", gpa: int = RAM, size: int = 1 << 20, *, vm_of: Any = None, **flags: bool
) -> Iterator[Bench]:
    """A `Bench` on a host; `vm_of(kvm)` makes the VM where the default one does not do."""
    with kvm2.open(host) as kvm:
        vm = vm_of(kvm) if vm_of else kvm.create_vm2()
        with vm:
            made = Bench(kvm, vm, gpa, size, **flags)
            yield made
            for vcpu in made.vcpus:
                vcpu.close()

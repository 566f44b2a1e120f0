"""A small machine around one or more cores: memory, stage-1 and stage-2 tables, a log of traps."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass

from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.core import Core
from kvm2.softkvm.cpu.state import CpuState

from .asm import asm

SIZE = 8 << 20
EL0T, EL1T, EL1H = 0x3C0, 0x3C4, 0x3C5
NORMAL, NO_EXEC, USER = 0, 1 << 54 | 1 << 53, 1 << 6
TG0 = {12: 0, 14: 2, 16: 1}
TG1 = {12: 2, 14: 1, 16: 3}


class Arena:
    """Memory of this process, by host address; a bump allocator at its end for tables."""

    def __init__(self, size: int = SIZE) -> None:
        self.map = mmap.mmap(-1, size + (1 << 16))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.shift = -address % (1 << 16)
        self.base = address + self.shift
        self.size = size
        self._next = self.base + size

    def write(self, address: int, data: bytes) -> None:
        at = address - self.base + self.shift
        self.map[at : at + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        at = address - self.base + self.shift
        return self.map[at : at + size]

    def word(self, address: int) -> int:
        return struct.unpack("<Q", self.read(address, 8))[0]

    def put(self, address: int, *values: int) -> None:
        self.write(address, struct.pack(f"<{len(values)}Q", *values))

    def table(self, size: int) -> int:
        self._next = (self._next - size) & -size
        self.write(self._next, bytes(size))
        return self._next


class Tables:
    """VMSAv8-64 tables in an arena: 4K, 16K or 64K pages, `bits` of input address, full depth."""

    def __init__(self, arena: Arena, shift: int, bits: int, start: int | None = None) -> None:
        self.arena, self.shift, self.bits = arena, shift, bits
        self.stride = shift - 3
        depth = -(-(bits - shift) // self.stride)
        self.start = 4 - depth if start is None else start
        self.top = bits - shift - self.stride * (3 - self.start)
        self.root = arena.table(max(8 << self.top, 64))

    def set(self, address: int, output: int, attributes: int, level: int = 3) -> None:
        self._write(address, output | attributes | (3 if level == 3 else 1), level)

    def clear(self, address: int, level: int = 3) -> None:
        self._write(address, 0, level)

    def _write(self, address: int, value: int, level: int) -> None:
        table = self.root
        for at in range(self.start, level + 1):
            low = self.shift + self.stride * (3 - at)
            width = self.top if at == self.start else self.stride
            entry = table + 8 * (address >> low & (1 << width) - 1)
            if at == level:
                self.arena.put(entry, value)
            else:
                if not self.arena.word(entry) & 1:
                    self.arena.put(entry, self.arena.table(1 << self.shift) | 3)
                table = self.arena.word(entry) & 0xFFFFFFFFF000 & -(1 << self.shift)

    def pages(self, address: int, output: int, size: int, attributes: int) -> None:
        for offset in range(0, size, 1 << self.shift):
            self.set(address + offset, output + offset, attributes)


S1_PAGE = 1 << 10 | 3 << 8  # AF, inner shareable, attribute 0
S2_PAGE = 1 << 10 | 3 << 8 | 0xF << 2  # AF, inner shareable, normal write-back
S2_READ, S2_WRITE, S2_XN = 1 << 6, 1 << 7, 2 << 53


def stage2_vtcr(shift: int, bits: int, start: int) -> int:
    sl0 = {12: 2 - start, 14: 3 - start, 16: 3 - start}[shift]
    return 64 - bits | sl0 << 6 | 1 << 8 | 1 << 10 | 3 << 12 | TG0[shift] << 14 | 5 << 16 | 1 << 31


@dataclass
class Trap:
    esr: int
    far: int
    pc: int
    hpfar: int

    @property
    def ec(self) -> int:
        return self.esr >> 26


class Machine:
    """One core with code at `arena.base` and a list of what trapped; `HVC` ends a run."""

    def __init__(self, model: str = "a72", arena: Arena | None = None, **options: object) -> None:
        self.arena = arena or Arena()
        self.traps: list[Trap] = []
        self.answer: Callable[[Trap], bool] = lambda trap: False
        self.core = Core(model, self._trap, **options)  # type: ignore[arg-type]
        self.state = CpuState()

    def _trap(self) -> bool:
        core = self.core
        trap = Trap(core.abort_syndrome(), core.far, core.pc, core.hpfar())
        self.traps.append(trap)
        return self.answer(trap)

    def load(self, text: str, at: int = 0, pstate: int = EL1H, **registers: int) -> int:
        """Puts code at `arena.base + at` and lets the core start there with `x3=...`; the address."""
        address = self.arena.base + at
        self.arena.write(address, asm(text))
        self.start(address, pstate, **registers)
        return address

    def start(self, pc: int, pstate: int = EL1H, **registers: int) -> None:
        self.state.pc, self.state.pstate = pc, pstate
        for name, value in registers.items():
            if name.startswith("x"):
                self.state.x[int(name[1:])] = value
            elif name.startswith("sp"):
                setattr(self.state, name, value)
            else:
                self.state.sys[getattr(reg, name)] = value
        self.core.load(self.state)
        self.core.flush_code()

    def run(self, text: str, **options: int) -> Trap:
        """Loads and runs until a trap; the trap."""
        self.load(text, **options)
        return self.go()

    def go(self) -> Trap:
        outcome = self.core.run()
        assert outcome == "trap", (outcome, self.core.error, hex(self.core.pc))
        return self.traps[-1]

    def close(self) -> None:
        self.core.close()

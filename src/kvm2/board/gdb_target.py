"""A board as gdb's target: all its vCPUs stop together, run together or one alone, and say why they stopped.

Over the handles only: KVM_SET_GUEST_DEBUG, ONE_REG, the VM's memory, and `Board.pausing`.
"""

from __future__ import annotations

import contextlib
import queue
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from kvm2.board.gdb_memory import GuestMemory
from kvm2.board.gdb_points import HARDWARE, Point, comparators, guest_debug
from kvm2.errors import KvmError, UsageError
from kvm2.exits import Debug

if TYPE_CHECKING:
    from kvm2.board.loop import Board
    from kvm2.exits import Exit
    from kvm2.vcpu import Vcpu

EC_SHIFT: Final = 26
EC_BREAKPOINT, EC_WATCHPOINT, EC_BRK = 0x30, 0x34, 0x3C
SIGINT, SIGTRAP = 2, 5
EL0T, EL1T, EL1H, MODE = 0, 4, 5, 0xF
DAIF: Final = 0x3C0
NZCV: Final = 0xF << 28
PAN, SPAN = 1 << 22, 1 << 23  # of PSTATE, of SCTLR_EL1
_VECTORS: Final = {EL0T: 0x400, EL1T: 0x000, EL1H: 0x200}


@dataclass(frozen=True)
class Stop:
    """Why the guest stands still: a signal of gdb's, the vCPU, and what gdb is told beside ("watch:...;")."""

    signal: int
    vcpu: int
    reason: str = ""


class Target:
    """The board, as long as a debugger is there. One thread uses it; `stopped` and `ended` come from the vCPUs'."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.vcpus = {vcpu.id: vcpu for vcpu in board.vcpus}
        self.memory = GuestMemory(board.vm, board.ipa_bits)
        self.points: list[Point] = []
        self._limits = tuple(_limit(board, cap) for cap in ("GUEST_DEBUG_HW_BPS", "GUEST_DEBUG_HW_WPS"))
        self._set: dict[int, object] = {}
        self._stops: queue.SimpleQueue[Stop] = queue.SimpleQueue()
        # What a vCPU's thread writes to, so that whoever waits for gdb and for the guest wakes up.
        self.wake, self._bell = socket.socketpair()
        self.wake.setblocking(False)
        self._bell.setblocking(False)
        self.over = False

    # ---- from the vCPUs' threads (`loop.Debugger`)

    def stopped(self, vcpu: Vcpu, exit: Exit) -> None:
        """KVM_EXIT_DEBUG: every vCPU is held, unless it was the guest's own BRK."""
        assert isinstance(exit, Debug)
        stop = self._explained(vcpu, exit)
        if stop is None:
            reinject(vcpu, exit.hsr)
            return
        self.board.pausing.hold_soon(self, self.vcpus)
        self._stops.put(stop)
        self._ring()

    def ended(self) -> None:
        """The run is over."""
        self.over = True
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already; closed: nobody listens
            self._bell.send(b"!")

    def _explained(self, vcpu: Vcpu, exit: Debug) -> Stop | None:
        ec = exit.hsr >> EC_SHIFT & 0x3F
        if ec == EC_BRK:
            self.memory.forget()
            if not self.memory.is_breakpoint(vcpu, cast("int", vcpu.get_reg("pc"))):
                return None
            return Stop(SIGTRAP, vcpu.id, "swbreak:;")
        if ec == EC_BREAKPOINT:
            return Stop(SIGTRAP, vcpu.id, "hwbreak:;")
        if ec == EC_WATCHPOINT:
            return Stop(SIGTRAP, vcpu.id, self._watched(exit.far))
        return Stop(SIGTRAP, vcpu.id)

    def _watched(self, far: int) -> str:
        for point in self.points:
            if point.kind != HARDWARE and point.covers(far):
                name = {"2": "watch", "3": "rwatch", "4": "awatch"}[point.kind]
                return f"{name}:{point.address:x};"
        return f"awatch:{far:x};"

    # ---- from the debugger's thread

    def pause(self) -> None:
        """Every vCPU stands still."""
        self.board.pause(self)
        self.memory.forget()

    def next_stop(self) -> Stop | None:
        """What a vCPU has to tell, with all of them stopped; None where there is nothing. What others have to tell
        at the same time is forgotten: it comes again when they go on."""
        with contextlib.suppress(BlockingIOError):
            while self.wake.recv(4096):
                pass
        try:
            stop = self._stops.get_nowait()
        except queue.Empty:
            return None
        self.pause()
        while not self._stops.empty():
            self._stops.get_nowait()
        return stop

    def go(self, steps: frozenset[int], runs: frozenset[int]) -> None:
        """Let the vCPUs of `steps` make one step and those of `runs` go on; the others stand still."""
        breaks, watches = comparators(self.points, *self._limits)
        for number, vcpu in self.vcpus.items():
            wanted = guest_debug(breaks, watches, software=self.memory.has_breakpoints, step=number in steps)
            if self._set.get(number) != wanted and (wanted.control or number in self._set):
                vcpu.set_guest_debug(wanted)
                self._set[number] = wanted
        self.memory.forget()
        self.board.pausing.release(self, steps | runs)

    def add(self, point: Point) -> None:
        """A hardware breakpoint or watchpoint; `TooMany` where the host has no comparator left for it."""
        if point not in self.points:
            comparators([*self.points, point], *self._limits)
            self.points.append(point)

    def remove(self, point: Point) -> None:
        """It goes, where it is there."""
        if point in self.points:
            self.points.remove(point)

    def leave(self) -> None:
        """The debugger goes: no breakpoint is left, the guest runs on."""
        if not self.over:
            self.pause()
        self.points.clear()
        try:
            self.memory.remove_all()
            self.go(frozenset(), frozenset(self.vcpus))
        except (KvmError, UsageError):
            if not self.over:  # at the end the vCPUs may be closed
                raise
        while not self._stops.empty():
            self._stops.get_nowait()

    def close(self) -> None:
        """No debugger will come any more."""
        self._bell.close()
        self.wake.close()


def _limit(board: Board, cap: str) -> int:
    try:
        return board.kvm.check_extension(cap)
    except KvmError:
        return 0


def reinject(vcpu: Vcpu, syndrome: int) -> None:
    """The guest's own BRK: the exception that KVM took away from it is entered (AArch64.TakeException to EL1)."""
    pstate, sctlr = (cast("int", vcpu.get_reg(name)) for name in ("pstate", "SCTLR_EL1"))
    vector = _VECTORS.get(pstate & MODE, 0x600)  # AArch32 at EL0
    new = pstate & (NZCV | PAN) | DAIF | EL1H | (0 if sctlr & SPAN else PAN * _has_pan(vcpu))
    vcpu.set_reg("elr_el1", vcpu.get_reg("pc"))
    vcpu.set_reg("spsr_el1", pstate)
    vcpu.set_reg("ESR_EL1", syndrome & 0xFFFF_FFFF)
    vcpu.set_reg("pstate", new)
    vcpu.set_reg("pc", cast("int", vcpu.get_reg("VBAR_EL1")) + vector)


def _has_pan(vcpu: Vcpu) -> bool:
    return bool(cast("int", vcpu.get_reg("ID_AA64MMFR1_EL1")) >> 20 & 0xF)

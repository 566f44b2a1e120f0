"""What every machine around a guest has: a VM with RAM, vCPUs in threads, a console, and the loop that answers exits.

`machine.Machine` is the board for arm64 guests, `x86.X86Machine` the one for x86-64.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from kvm2.board.params import Params
from kvm2.board.pausing import Pausing
from kvm2.errors import KvmError, UsageError
from kvm2.exits import Exit, Interrupted, Io, Mmio, SystemEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from kvm2.board.loader import Image
    from kvm2.kvm import Kvm
    from kvm2.ram import Ram
    from kvm2.spec import MemoryRange, VmSpec
    from kvm2.vcpu import Vcpu
    from kvm2.vm import Vm

TOP_SIZE = 1 << 16  # a page of the largest granule: right for every host
PARAMS_ROOM = 4096
CONSOLE_KEPT = 1 << 20
UNCLAIMED_KEPT = 256
ENDED_WELL = ("shutdown", "reset")


@dataclass(frozen=True)
class Unclaimed:
    """Accesses to an address where there is nothing: reads gave what the board says, writes were dropped.

    `space` is "memory", or "port" for x86's port I/O.
    """

    address: int
    size: int
    is_write: bool
    count: int
    space: str = "memory"


@dataclass(frozen=True)
class RunResult:
    """How a run ended: `ended` is "shutdown", "reset", "crash", "suspend", "halted", "failed", "timeout" or
    "interrupted".

    `exits` counts by kind, `unclaimed` by address (the first 256 of them; `unclaimed_count` counts all); `console` is
    what the guest sent, the last 1 MiB of it. `reason` says more where the end was not a clean one.
    """

    ended: str
    seconds: float
    exits: dict[str, int]
    console: bytes
    unclaimed: tuple[Unclaimed, ...] = ()
    unclaimed_count: int = 0
    reason: str = ""
    vcpu: int = 0
    error: KvmError | None = field(default=None, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the guest ended itself, by power-off or reset."""
        return self.ended in ENDED_WELL


class Debugger(Protocol):
    """Who is told of KVM_EXIT_DEBUG (`Board.debugger`), and of the end."""

    def stopped(self, vcpu: Vcpu, exit: Exit) -> None:
        """A debug exception, in the vCPU's thread. The vCPU goes on afterwards, unless it is held then."""

    def ended(self) -> None:
        """The run is over."""


class Board:
    """A VM with its RAM, ready to load a guest and run once. Subclasses make the vCPUs and answer exits.

    `memory` is the RAM, `sink` gets each byte of the console, `top` is the slot that `map_top` made, or None.
    """

    params_below = 1 << 64  # the parameter block lies below this address
    bits_name = "IPA bits"
    nothing_reads = "0"
    ipa_bits: int  # bits of the guest physical addresses that can be mapped

    def __init__(
        self,
        kvm: Kvm,
        spec: VmSpec,
        memory: tuple[MemoryRange, ...],
        vm: Vm | None,
        cpus: int,
        sink: Callable[[int], object] | None,
    ) -> None:
        if cpus < 1:
            raise UsageError(f"cpus = {cpus}: a guest needs at least 1")
        self.kvm, self.spec, self.memory = kvm, spec, memory
        self.vm = vm if vm is not None else kvm.create_vm2(spec)
        self.rams: list[Ram] = [_mapped(self.vm, piece) for piece in memory]
        self.top: MemoryRange | None = None
        self.vcpus: list[Vcpu] = []
        self.console = bytearray()
        self._sink = sink
        # One table a vCPU: their threads count without a lock.
        self._exits: list[dict[str, int]] = [{} for _ in range(cpus)]
        self._unclaimed: dict[tuple[str, int, int, bool], int] = {}
        self._unclaimed_count = 0
        self._lock = threading.Lock()
        self._done = threading.Event()
        # Held until the end, for who waits in the main thread: two Ctrl-C at once break an Event's wait (RuntimeError).
        self._over = threading.Lock()
        self._over.acquire()
        self.pausing = Pausing(lambda number: self._by_id(number).kick())
        self.debugger: Debugger | None = None
        self._end: tuple[str, str, int, KvmError | None] | None = None
        self._bug: BaseException | None = None

    def load(self, image: Image, *, params: bool = True) -> int:
        """Put the image and the parameter block into memory, and vCPU 0 at the entry; the block's address, or 0."""
        raise NotImplementedError

    def map_top(self, bits: int) -> MemoryRange | None:
        """A small slot that ends at 2^bits, where the RAM does not reach; None where it does."""
        from kvm2.spec import MemoryRange

        top = MemoryRange((1 << bits) - TOP_SIZE, TOP_SIZE)
        if any(piece.base < top.end and top.base < piece.end for piece in self.memory):
            return None
        self.rams.append(self.vm.map(top.base, top.size))
        return top

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(address, size) of everything that is mapped, the slot at the top last."""
        pieces = [*self.memory, self.top] if self.top else self.memory
        return tuple((piece.base, piece.size) for piece in pieces)

    def place_params(self, image: Image) -> int:
        """The last page of the first range that the image leaves free; 0 where there is none."""
        if Params(0, 0, 0, 0, tuple((p.base, p.size) for p in self.memory)).size + 16 > PARAMS_ROOM:
            return 0
        for piece in self.memory:
            at = min(piece.end, self.params_below) - PARAMS_ROOM
            if at >= piece.base and not any(s.address < at + PARAMS_ROOM and at < s.end for s in image.segments):
                return at
        return 0

    # -- pausing

    def _by_id(self, number: int) -> Vcpu:
        return next(vcpu for vcpu in self.vcpus if vcpu.id == number)

    def pause(self, who: object = "pause") -> None:
        """Hold every vCPU between two instructions; returns when all are out of the guest. Also before `run`.

        Holders are named by `who`: a vCPU goes on when none of them holds it.
        """
        self.pausing.hold(who, [vcpu.id for vcpu in self.vcpus])

    def resume(self, who: object = "pause") -> None:
        """Let go of what `who` holds."""
        self.pausing.release(who)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Every vCPU is held: a snapshot is taken in here."""
        who = object()
        self.pause(who)
        try:
            yield
        finally:
            self.resume(who)

    # -- running

    def run(self, timeout: float | None = None, tick: Callable[[float, int], None] | None = None) -> RunResult:
        """Run every vCPU in a thread of its own until the guest ends, a vCPU cannot go on, or `timeout` seconds passed.

        KeyboardInterrupt stops the vCPUs and is given on, with the result so far as its argument. `tick(seconds,
        exits)` is called about four times a second.
        """
        started = time.monotonic()
        threads = [
            threading.Thread(target=self._drive, args=(vcpu,), name=f"vcpu{vcpu.id}", daemon=True)
            for vcpu in self.vcpus
        ]
        try:
            for thread in threads:
                thread.start()
            self._wait(started, timeout, tick)
        except KeyboardInterrupt:
            self.finish("interrupted", "Ctrl-C", 0)
            self._stop(threads)
            raise KeyboardInterrupt(self._result(started)) from None
        self._stop(threads)
        if self._bug is not None:
            raise self._bug
        return self._result(started)

    def _wait(self, started: float, timeout: float | None, tick: Callable[[float, int], None] | None) -> None:
        while True:
            passed = time.monotonic() - started
            if timeout is not None and passed >= timeout:
                return self.finish("timeout", f"still running after {timeout:g} s", 0)
            if self._over.acquire(timeout=0.25 if timeout is None else min(0.25, timeout - passed)):
                return None
            if tick is not None:
                tick(time.monotonic() - started, sum(self.exit_counts().values()))

    def _stop(self, threads: list[threading.Thread]) -> None:
        for vcpu, thread in zip(self.vcpus, threads, strict=True):
            vcpu.kick()  # also one whose thread is only just being started
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.05)

    def exit_counts(self) -> dict[str, int]:
        """How often the guest was left so far, by the exit's kind."""
        total: dict[str, int] = {}
        for table in self._exits:
            for kind, count in table.copy().items():
                total[kind] = total.get(kind, 0) + count
        return dict(sorted(total.items()))

    def _result(self, started: float) -> RunResult:
        ended, reason, vcpu, error = self._end or ("failed", "nobody said why", 0, None)
        found = sorted(self._unclaimed.items())
        unclaimed = tuple(Unclaimed(address, size, w, count, space) for (space, address, size, w), count in found)
        return RunResult(
            ended=ended,
            seconds=time.monotonic() - started,
            exits=self.exit_counts(),
            console=bytes(self.console),
            unclaimed=unclaimed,
            unclaimed_count=self._unclaimed_count,
            reason=reason,
            vcpu=vcpu,
            error=error,
        )

    def finish(self, ended: str, reason: str, vcpu: int, error: KvmError | None = None) -> None:
        """The run ends, in these words; the first to say so is right."""
        with self._lock:
            if self._end is None:
                self._end = (ended, reason, vcpu, error)
                self._over.release()
        self._done.set()
        self.pausing.end()
        if self.debugger is not None:
            self.debugger.ended()

    def _drive(self, vcpu: Vcpu) -> None:
        try:
            with self.pausing.driving(vcpu.id):
                self._loop(vcpu)
        except KvmError as error:
            self.finish("failed", f"KVM_RUN of vCPU {vcpu.id}: {error}", vcpu.id, error)
        except BaseException as error:  # a defect here must not look like a guest that hangs
            self._bug = error
            self.finish("failed", repr(error), vcpu.id)

    def _loop(self, vcpu: Vcpu) -> None:
        exits, mmio, io, done = self._exits[self.vcpus.index(vcpu)], self.mmio, self.io, self._done.is_set
        park, number = self.pausing.park, vcpu.id
        park(number)
        for exit in vcpu.run():
            what = type(exit)
            if what is Io:
                kind = "io_write" if exit.is_write else "io_read"  # type: ignore[attr-defined]
                io(exit)  # type: ignore[arg-type]
            elif what is Mmio:
                kind = "mmio_write" if exit.is_write else "mmio_read"  # type: ignore[attr-defined]
                mmio(exit)  # type: ignore[arg-type]
            else:
                kind = exit.kind
            exits[kind] = exits.get(kind, 0) + 1
            if what is not Io and what is not Mmio:
                if kind == "debug" and self.debugger is not None:
                    self.debugger.stopped(vcpu, exit)
                elif what is not Interrupted:
                    return self.other(vcpu, exit)
                park(number)
            if done():
                return None
        return None

    # -- what a board answers

    def mmio(self, exit: Mmio) -> None:
        """An access to a guest physical address without memory: a device's, or `nothing_there`."""
        raise NotImplementedError

    def io(self, exit: Io) -> None:
        """An access to a port, on x86."""
        raise NotImplementedError

    def other(self, vcpu: Vcpu, exit: Exit) -> None:
        """An exit that ends the run: any but MMIO, port I/O and an interruption."""
        if isinstance(exit, SystemEvent):
            self.finish(exit.name, "" if exit.name in ENDED_WELL else repr(exit), vcpu.id)
        else:
            self.finish("failed", f"vCPU {vcpu.id} left with {exit!r}, which this board cannot answer", vcpu.id)

    def nothing_there(self, space: str, address: int, size: int, is_write: bool, times: int = 1) -> None:
        """Count accesses that no device claims."""
        key = (space, address, size, is_write)
        with self._lock:
            self._unclaimed_count += times
            if key in self._unclaimed or len(self._unclaimed) < UNCLAIMED_KEPT:
                self._unclaimed[key] = self._unclaimed.get(key, 0) + times

    def send(self, byte: int) -> None:
        """A byte for the console."""
        if len(self.console) >= 2 * CONSOLE_KEPT:
            del self.console[:CONSOLE_KEPT]
        self.console.append(byte)
        if self._sink is not None:
            self._sink(byte)

    def close(self) -> None:
        """Close the vCPUs and the VM."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _mapped(vm: Vm, piece: MemoryRange) -> Ram:
    try:
        return vm.map(piece.base, piece.size)
    except KvmError as error:  # says only the slot's numbers: whose they are
        raise KvmError(error.errno or 0, f"memory {piece}: {error.reason or error.strerror}", error.findings) from error


def check_ranges(memory: tuple[MemoryRange, ...]) -> None:
    """UsageError where ranges are empty, beyond 64 bits, or overlap each other."""
    for piece in memory:
        if piece.size <= 0 or piece.base < 0 or piece.end > 1 << 64:
            raise UsageError(f"memory {piece}: allowed are sizes above 0 that end within 64 bits")
    ordered = sorted(memory, key=lambda piece: piece.base)
    for first, second in pairwise(ordered):
        if second.base < first.end:
            raise UsageError(f"memory {first} and {second} overlap: each address belongs to one range")

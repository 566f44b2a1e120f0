"""The machine around a guest: memory, UART, vCPUs in threads, and the loop that answers their exits.

with kvm2.open("neoverse-n1-4k") as kvm:
    machine = Machine(kvm, VmSpec(memory=(MemoryRange(1 << 30, 64 << 20),)))
    machine.load(read_image(path, machine.memory))
    result = machine.run()
"""

from __future__ import annotations

import struct
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from kvm2.board.params import Params
from kvm2.board.pl011 import SIZE as UART_SIZE
from kvm2.board.pl011 import Pl011
from kvm2.errors import GuestError, KvmError, UsageError
from kvm2.exits import Exit, Interrupted, Mmio, SystemEvent
from kvm2.spec import MemoryRange, VmSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.board.loader import Image
    from kvm2.kvm import Kvm
    from kvm2.ram import Ram
    from kvm2.vcpu import Vcpu
    from kvm2.vm import Vm

DEFAULT_MEMORY = (MemoryRange(1 << 30, 64 << 20),)
UART_BASE = 0x0900_0000
TOP_SIZE = 1 << 16  # a page of the largest granule: right for every host
PARAMS_ROOM = 4096
CONSOLE_KEPT = 1 << 20
UNCLAIMED_KEPT = 256
ENDED_WELL = ("shutdown", "reset")


@dataclass(frozen=True)
class Unclaimed:
    """Accesses to an address where there is nothing: reads gave 0, writes were dropped."""

    address: int
    size: int
    is_write: bool
    count: int


@dataclass(frozen=True)
class RunResult:
    """How a run ended: `ended` is "shutdown", "reset", "crash", "suspend", "failed", "timeout" or "interrupted".

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
        """Whether the guest ended itself, by PSCI SYSTEM_OFF or SYSTEM_RESET."""
        return self.ended in ENDED_WELL


class Machine:
    """One VM with its board, made through KVM_CREATE_VM2 (or an existing `vm`), ready to load a guest and run once.

    `spec.memory` is the RAM, the first range being where flat images go; `cpus` vCPUs are made, all but the first
    powered off. With `top`, a small slot is mapped at the end of the IPA space where the RAM does not reach.
    """

    def __init__(
        self,
        kvm: Kvm,
        spec: VmSpec,
        *,
        vm: Vm | None = None,
        cpus: int = 1,
        sink: Callable[[int], object] | None = None,
        top: bool = False,
    ) -> None:
        self.kvm, self.spec = kvm, spec
        self.memory = spec.memory or DEFAULT_MEMORY
        check_memory(self.memory)
        if cpus < 1:
            raise UsageError(f"cpus = {cpus}: a guest needs at least 1")
        self.vm = vm if vm is not None else kvm.create_vm2(spec)
        self.ipa_bits = ipa_bits_of(self.vm)
        self.rams: list[Ram] = [self.vm.map(piece.base, piece.size) for piece in self.memory]
        self.top = self._map_top() if top else None
        self.console = bytearray()
        self.uart = Pl011(self._send)
        self._sink = sink
        self.vcpus = [self.vm.create_vcpu(number) for number in range(cpus)]
        self.sve_vls = 0
        for vcpu in self.vcpus:
            self._initialise(vcpu)
        # One table a vCPU: their threads count without a lock.
        self._exits: list[dict[str, int]] = [{} for _ in self.vcpus]
        self._unclaimed: dict[tuple[int, int, bool], int] = {}
        self._unclaimed_count = 0
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._end: tuple[str, str, int, KvmError | None] | None = None
        self._bug: BaseException | None = None

    def _map_top(self) -> MemoryRange | None:
        top = MemoryRange((1 << self.ipa_bits) - TOP_SIZE, TOP_SIZE)
        if any(piece.base < top.end and top.base < piece.end for piece in self.memory):
            return None
        self.rams.append(self.vm.map(top.base, top.size))
        return top

    def _initialise(self, vcpu: Vcpu) -> None:
        features = ["psci_0_2"] + ["power_off"] * (vcpu.id > 0) + ["sve"] * (self.spec.sve is not None)
        vcpu.init(features)
        if self.spec.sve is None:
            return
        if self.spec.sve == "vcpu":
            # The rule of KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS: the host's own set, written back, then finalised.
            vcpu.set_reg("sve_vls", vcpu.get_reg("sve_vls"))
            vcpu.finalize("sve")
        words = vcpu.get_reg("sve_vls")
        self.sve_vls = struct.unpack_from("<Q", words)[0] if isinstance(words, bytes) else words

    # -- loading

    def load(self, image: Image, *, params: bool = True) -> int:
        """Put the image and the parameter block into memory, and vCPU 0 at the entry; the block's address, or 0."""
        image.load(self.vm)
        address = self._place_params(image) if params else 0
        if address:
            self.vm.write(address, self._params().pack())
        boot = self.vcpus[0].regs
        boot.pc, boot.x0 = image.entry, address
        return address

    def _params(self) -> Params:
        ranges = [*self.memory, self.top] if self.top else list(self.memory)
        return Params(
            ipa_bits=self.ipa_bits,
            host_ipa_bits=self.kvm.check_extension("ARM_VM_IPA_SIZE"),
            page_shift=page_shift_of(self.vm),
            cpus=len(self.vcpus),
            ranges=tuple((piece.base, piece.size) for piece in ranges),
            sve_vls=self.sve_vls,
            uart=UART_BASE,
            top=(self.top.base, self.top.size) if self.top else (0, 0),
        )

    def _place_params(self, image: Image) -> int:
        """The last page of the first range that the image leaves free; 0 where there is none."""
        if Params(0, 0, 0, 0, tuple((p.base, p.size) for p in self.memory)).size + 16 > PARAMS_ROOM:
            return 0
        for piece in self.memory:
            at = piece.end - PARAMS_ROOM
            if at >= piece.base and not any(s.address < piece.end and at < s.end for s in image.segments):
                return at
        return 0

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
        for thread in threads:
            thread.start()
        try:
            self._wait(started, timeout, tick)
        except KeyboardInterrupt:
            self._finish("interrupted", "Ctrl-C", 0)
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
                return self._finish("timeout", f"still running after {timeout:g} s", 0)
            if self._done.wait(0.25 if timeout is None else min(0.25, timeout - passed)):
                return None
            if tick is not None:
                tick(time.monotonic() - started, sum(self._count().values()))

    def _stop(self, threads: list[threading.Thread]) -> None:
        for vcpu, thread in zip(self.vcpus, threads, strict=True):
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.05)

    def _count(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for table in self._exits:
            for kind, count in table.copy().items():
                total[kind] = total.get(kind, 0) + count
        return dict(sorted(total.items()))

    def _result(self, started: float) -> RunResult:
        ended, reason, vcpu, error = self._end or ("failed", "nobody said why", 0, None)
        unclaimed = tuple(Unclaimed(*key, count) for key, count in sorted(self._unclaimed.items()))
        return RunResult(
            ended=ended,
            seconds=time.monotonic() - started,
            exits=self._count(),
            console=bytes(self.console),
            unclaimed=unclaimed,
            unclaimed_count=self._unclaimed_count,
            reason=reason,
            vcpu=vcpu,
            error=error,
        )

    def _finish(self, ended: str, reason: str, vcpu: int, error: KvmError | None = None) -> None:
        with self._lock:
            if self._end is None:
                self._end = (ended, reason, vcpu, error)
        self._done.set()

    def _drive(self, vcpu: Vcpu) -> None:
        try:
            self._loop(vcpu)
        except KvmError as error:
            self._finish("failed", f"KVM_RUN of vCPU {vcpu.id}: {error}", vcpu.id, error)
        except BaseException as error:  # a defect here must not look like a guest that hangs
            self._bug = error
            self._finish("failed", repr(error), vcpu.id)

    def _loop(self, vcpu: Vcpu) -> None:
        exits, mmio, done = self._exits[self.vcpus.index(vcpu)], self._mmio, self._done.is_set
        for exit in vcpu.run():
            if type(exit) is Mmio:
                kind = "mmio_write" if exit.is_write else "mmio_read"
                mmio(exit)
            else:
                kind = exit.kind
            exits[kind] = exits.get(kind, 0) + 1
            if type(exit) is not Mmio and type(exit) is not Interrupted:
                return self._other(vcpu, exit)
            if done():
                return None
        return None

    def _mmio(self, exit: Mmio) -> None:
        offset = exit.address - UART_BASE
        if 0 <= offset < UART_SIZE:
            if exit.is_write:
                self.uart.write(offset, exit.value)
            else:
                exit.reply(self.uart.read(offset) & ((1 << 8 * exit.size) - 1))
            return
        if not exit.is_write:
            exit.reply(0)
        key = (exit.address, exit.size, exit.is_write)
        with self._lock:
            self._unclaimed_count += 1
            if key in self._unclaimed or len(self._unclaimed) < UNCLAIMED_KEPT:
                self._unclaimed[key] = self._unclaimed.get(key, 0) + 1

    def _other(self, vcpu: Vcpu, exit: Exit) -> None:
        if isinstance(exit, SystemEvent):
            self._finish(exit.name, "" if exit.name in ENDED_WELL else repr(exit), vcpu.id)
        else:
            self._finish("failed", f"vCPU {vcpu.id} left with {exit!r}, which this board cannot answer", vcpu.id)

    def _send(self, byte: int) -> None:
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

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_memory(memory: tuple[MemoryRange, ...]) -> None:
    """UsageError where ranges overlap each other or the UART, or are empty."""
    for piece in memory:
        if piece.size <= 0 or piece.base < 0 or piece.end > 1 << 64:
            raise UsageError(f"memory {piece}: allowed are sizes above 0 that end within 64 bits")
        if piece.base < UART_BASE + UART_SIZE and piece.end > UART_BASE:
            raise UsageError(f"memory {piece} covers the UART at {UART_BASE:#x}: leave that page free")
    ordered = sorted(memory, key=lambda piece: piece.base)
    for first, second in pairwise(ordered):
        if second.base < first.end:
            raise UsageError(f"memory {first} and {second} overlap: each address belongs to one range")


def ipa_bits_of(vm: Vm) -> int:
    """The VM's IPA size in bits: attribute 2, or on a mainline kernel what the software KVM shows of its own VM."""
    try:
        bits: int = vm.get_attr(2).physaddr_bits
    except KvmError as error:
        from kvm2.hosts.soft import format_of

        found = format_of(vm.backend, vm.fd)
        if found is None:
            raise GuestError(f"this host runs no arm64 guest: its VM has no IPA size to read back ({error})") from error
        return found.ipa_bits
    return bits


def page_shift_of(vm: Vm) -> int:
    """The VM's stage-2 granule, as `ipa_bits_of`; this machine's page size where neither says."""
    try:
        shift: int = vm.get_attr(8).page_shift
    except KvmError:
        from kvm2.hosts.soft import format_of

        found = format_of(vm.backend, vm.fd)
        return found.page_shift if found is not None else 12
    return shift

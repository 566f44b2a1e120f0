"""Writes that need no exit, on the software KVM and on this machine's x86-64 KVM: what a guest of either causes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import kvm2
from kvm2.exits import Mmio

from .rig import bench
from .x86 import CODE_AT, HLT

DEVICE = 0x8000  # an address that 16-bit code reaches
OFF = "\n mov w0, #8\n movk w0, #0x8400, lsl #16\n hvc #0"

Write = tuple[int, int, int]  # address, size, value
Play = Callable[[Sequence[Write]], list[Write]]


class Writer:
    """A VM whose guest writes what it is told; `play` answers the writes that left the guest."""

    def __init__(self, vm: kvm2.Vm, vcpu: kvm2.Vcpu, load: Callable[[Sequence[Write]], None]) -> None:
        self.vm, self.vcpu, self._load = vm, vcpu, load
        self.eventfds: list[int] = []

    def eventfd(self) -> int:
        self.eventfds.append(os.eventfd(0, os.EFD_NONBLOCK))
        return self.eventfds[-1]

    def play(self, *writes: Write) -> list[Write]:
        self._load(writes)
        left = []
        for exit in self.vcpu.run():
            if not isinstance(exit, Mmio):
                break
            left.append((exit.address, exit.size, exit.value))
        return left

    def ring(self) -> list[Write]:
        found = self.vm.coalesced_writes(self.vcpu)
        return [(one.phys_addr, one.len, int.from_bytes(one.data[: one.len], "little")) for one in found]


def counts(*eventfds: int) -> list[int]:
    """What was signalled since the last time."""
    found = []
    for fd in eventfds:
        try:
            found.append(os.eventfd_read(fd))
        except BlockingIOError:
            found.append(0)
    return found


@contextlib.contextmanager
def soft(host: str = "max-4k-6.12") -> Iterator[Writer]:
    stores = {1: "strb w2", 2: "strh w2", 4: "str w2", 8: "str x2"}
    with bench(host) as b:

        def load(writes: Sequence[Write]) -> None:
            b.vcpu.init()
            text = [
                f"ldr x1, ={address:#x}\n ldr x2, ={value:#x}\n {stores[size]}, [x1]" for address, size, value in writes
            ]
            b.load("\n".join(text) + OFF + "\n .ltorg")

        yield Writer(b.vm, b.vcpu, load)


@contextlib.contextmanager
def x86(kvm: Any) -> Iterator[Writer]:
    stores = {1: b"\xa2", 2: b"\xa3", 4: b"\x66\xa3"}  # mov %al, %ax, %eax to a 16-bit address
    with kvm.create_vm() as vm:
        ram = vm.map(0, DEVICE)
        vcpu = vm.create_vcpu()
        cs = vcpu.regs.cs

        def load(writes: Sequence[Write]) -> None:
            code = b"".join(
                b"\x66\xb8" + value.to_bytes(4, "little") + stores[size] + address.to_bytes(2, "little")
                for address, size, value in writes
            )
            ram.write(CODE_AT, code + HLT)
            vcpu.regs.update(cs=type(cs)(0, 0xFFFF, 0, cs.type, 1, s=1), rip=CODE_AT, rflags=2)

        yield Writer(vm, vcpu, load)


@pytest.fixture(params=["max-4k-6.12", "max-16k-6.12", "x86-64"])
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    host = request.param
    with x86(request.getfixturevalue("real_x86")) if host == "x86-64" else soft(host) as made:
        yield made
        for fd in made.eventfds:
            os.close(fd)


# ---- ioeventfd


def test_length_and_value_decide_and_the_rest_leaves(writer: Writer) -> None:
    two, five, any_length, all_values = (writer.eventfd() for _ in range(4))
    writer.vm.ioeventfd(two, DEVICE, 2, datamatch=2)
    writer.vm.ioeventfd(five, DEVICE, 2, datamatch=5)
    writer.vm.ioeventfd(any_length, DEVICE + 0x10)
    writer.vm.ioeventfd(all_values, DEVICE + 0x20, 4)
    hits = [(DEVICE, 2, 2), (DEVICE, 2, 5), (DEVICE, 2, 5), (DEVICE + 0x10, 1, 1), (DEVICE + 0x10, 4, 0)]
    hits += [(DEVICE + 0x20, 4, 0), (DEVICE + 0x20, 4, 0xFFFF_FFFF), (DEVICE + 0x20, 4, 7)]
    misses = [(DEVICE, 2, 3), (DEVICE, 1, 2), (DEVICE, 4, 2), (DEVICE + 1, 2, 2), (DEVICE + 0x11, 1, 1)]
    misses += [(DEVICE + 0x20, 2, 0), (DEVICE + 0x22, 2, 0), (DEVICE + 0x1E, 4, 0)]
    assert writer.play(*hits) == []
    assert counts(two, five, any_length, all_values) == [1, 2, 2, 3]
    assert writer.play(*misses) == misses
    assert counts(two, five, any_length, all_values) == [0, 0, 0, 0]


def test_one_that_is_taken_away_leaves_the_others(writer: Writer) -> None:
    first, second = writer.eventfd(), writer.eventfd()
    for fd, value in ((first, 1), (second, 2)):
        writer.vm.ioeventfd(fd, DEVICE, 4, datamatch=value)
    writer.vm.deassign_ioeventfd(first, DEVICE, 4, datamatch=1)
    assert writer.play((DEVICE, 4, 1), (DEVICE, 4, 2)) == [(DEVICE, 4, 1)]
    assert counts(first, second) == [0, 1]


def test_the_client_may_close_its_descriptor(writer: Writer) -> None:
    kept = writer.eventfd()
    given = os.dup(kept)
    writer.vm.ioeventfd(given, DEVICE, 4)
    os.close(given)
    assert writer.play((DEVICE, 4, 1)) == [] and counts(kept) == [1]
    writer.vm.deassign_ioeventfd(kept, DEVICE, 4)
    assert writer.play((DEVICE, 4, 1)) == [(DEVICE, 4, 1)]


def test_a_full_eventfd_does_not_stop_the_guest(writer: Writer) -> None:
    full = os.eventfd(0)
    os.eventfd_write(full, (1 << 64) - 2)
    writer.vm.ioeventfd(full, DEVICE, 4)
    assert writer.play((DEVICE, 4, 1), (DEVICE, 4, 2)) == []
    os.close(full)


def test_memory_behind_an_ioeventfd_is_memory(writer: Writer) -> None:
    """The access is none that KVM hears of."""
    fd = writer.eventfd()
    writer.vm.ioeventfd(fd, DEVICE, 4)
    ram = writer.vm.map(DEVICE, 0x8000, slot=5)
    assert writer.play((DEVICE, 4, 0x1234)) == [] and counts(fd) == [0] and ram.read(0, 4) == b"\x34\x12\0\0"


# ---- coalesced MMIO


def test_writes_wait_in_the_ring_in_their_order(writer: Writer) -> None:
    writer.vm.register_coalesced_mmio(DEVICE, 0x100)
    inside = [(DEVICE, 1, 0x11), (DEVICE + 0xFE, 2, 0x2233), (DEVICE + 0x10, 4, 0x44556677), (DEVICE + 0xFF, 1, 8)]
    outside = [(DEVICE + 0xFF, 2, 1), (DEVICE + 0x100, 1, 1)]
    assert writer.play(*inside[:2], *outside, *inside[2:]) == outside
    assert writer.ring() == inside and writer.ring() == []
    writer.vm.unregister_coalesced_mmio(DEVICE, 0x100)
    assert writer.play(inside[0]) == inside[:1] and writer.ring() == []


def test_a_full_ring_sends_writes_out(writer: Writer) -> None:
    writer.vm.register_coalesced_mmio(DEVICE, 4)
    page = len(writer.vcpu.kvm_run) // (writer.vm.check_extension("COALESCED_MMIO") + 1)
    room = (page - 8) // 24 - 1
    writes = [(DEVICE, 4, number) for number in range(room + 3)]
    assert writer.play(*writes) == writes[room:]
    assert writer.ring() == writes[:room]
    assert writer.play(*writes[:5]) == [] and writer.ring() == writes[:5]


def test_a_ring_that_userspace_broke_is_full(writer: Writer) -> None:
    writer.vm.register_coalesced_mmio(DEVICE, 4)
    area, page = writer.vcpu.kvm_run, writer.vm.check_extension("COALESCED_MMIO")
    ring = page * len(area) // (page + 1)
    area[ring + 4 : ring + 8] = b"\xff\xff\xff\x7f"
    assert writer.play((DEVICE, 4, 1)) == [(DEVICE, 4, 1)]
    area[ring + 4 : ring + 8] = bytes(4)
    assert writer.play((DEVICE, 4, 1)) == [] and writer.ring() == [(DEVICE, 4, 1)]


def test_zones_and_ioeventfds_on_the_same_address(writer: Writer) -> None:
    """Who is asked first is the bus's order: of equal starts the shorter one, else the one that starts first."""
    fd = writer.eventfd()
    writer.vm.register_coalesced_mmio(DEVICE, 0x10)
    writer.vm.ioeventfd(fd, DEVICE, 4)
    writer.vm.ioeventfd(fd, DEVICE + 4, 4)
    assert writer.play((DEVICE, 4, 1), (DEVICE + 4, 4, 2)) == []
    assert (counts(fd), writer.ring()) == ([1], [(DEVICE + 4, 4, 2)])


def test_unregistering_takes_every_zone_that_holds_the_range(writer: Writer) -> None:
    for size in (0x10, 0x20, 0x40):
        writer.vm.register_coalesced_mmio(DEVICE, size)
    writer.vm.unregister_coalesced_mmio(DEVICE + 0x10, 0x10)
    assert writer.play((DEVICE, 4, 1), (DEVICE + 0x10, 4, 2)) == [(DEVICE + 0x10, 4, 2)]
    assert writer.ring() == [(DEVICE, 4, 1)]


def test_every_vcpu_shows_the_one_ring() -> None:
    with soft() as writer, writer.vm.create_vcpu(1) as second, writer.vm.create_vcpu(7) as third:
        writer.vm.register_coalesced_mmio(DEVICE, 4)
        assert writer.play((DEVICE, 4, 9)) == []
        ring = len(second.kvm_run) // 2
        assert bytes(second.kvm_run[ring:]) == bytes(third.kvm_run[ring:]) == bytes(writer.vcpu.kvm_run[ring:])
        assert [one.data[0] for one in writer.vm.coalesced_writes(third)] == [9] and writer.ring() == []


def test_ioeventfds_come_and_go_while_the_guest_writes() -> None:
    """Each write is signalled or leaves, never both, never neither."""
    with soft() as writer:
        fd, other = writer.eventfd(), os.eventfd(0, os.EFD_NONBLOCK)
        done = threading.Event()

        def change() -> None:
            while not done.is_set():
                writer.vm.ioeventfd(fd, DEVICE, 4)
                writer.vm.ioeventfd(other, DEVICE + 8, 4)
                writer.vm.deassign_ioeventfd(fd, DEVICE, 4)
                writer.vm.deassign_ioeventfd(other, DEVICE + 8, 4)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            left = sum(len(writer.play(*[(DEVICE, 4, 1)] * 100)) for _ in range(20))
        finally:
            done.set()
            thread.join()
        assert left + sum(counts(fd)) == 2000
        os.close(other)

"""Making VMs: KVM_CREATE_VM2 here against KVM_CREATE_VM of this machine, and the attribute list alone."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import TYPE_CHECKING

from bench.guest import HOST
from bench.measure import Figure, Measured, Unavailable, in_turns

if TYPE_CHECKING:
    from kvm2.softkvm.memory import Memory

KVM_CREATE_VM = 0xAE01
OUTER, CAPABILITIES, SIZE, POINTER = (struct.Struct(text) for text in ("=IHHQ", "=IHHQ", "=II", "=Q"))


def create() -> Measured:
    """A VM made and closed again, from Python on both sides."""
    import kvm2

    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))
    except OSError as error:
        raise Unavailable(f"the baseline needs this machine's /dev/kvm: {error}") from error
    kvm = kvm2.open(HOST)

    def ours(count: int) -> None:
        for _ in range(count):
            kvm.create_vm2(physaddr_bits=40).close()

    def baseline(count: int) -> None:
        for _ in range(count):
            os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))

    a, b = in_turns(ours, 200, baseline, 100)
    os.close(device)
    return Measured(a / b, a * 1e6, b * 1e6, "us")


def _two_attributes() -> tuple[int, list[object]]:
    """The address of a list with a capability word and a size, and what keeps it in place."""
    capabilities = ctypes.create_string_buffer(CAPABILITIES.pack(1, 64, 0, 1))
    size = ctypes.create_string_buffer(SIZE.pack(2, 52))
    pointers = ctypes.create_string_buffer(
        POINTER.pack(ctypes.addressof(capabilities)) + POINTER.pack(ctypes.addressof(size))
    )
    outer = ctypes.create_string_buffer(OUTER.pack(0, 2, 0, ctypes.addressof(pointers)))
    return ctypes.addressof(outer), [capabilities, size, pointers, outer]


def _bare_parse(address: int) -> list[tuple[int, ...]]:
    """The same bytes with struct and string_at and nothing else: no check, no object, a crash for a bad pointer."""
    _, count, _, array = OUTER.unpack(ctypes.string_at(address, 16))
    found: list[tuple[int, ...]] = []
    for (pointer,) in POINTER.iter_unpack(ctypes.string_at(array, 8 * count)):
        kind = struct.unpack("=I", ctypes.string_at(pointer, 4))[0]
        if kind == 1:
            found.append(CAPABILITIES.unpack(ctypes.string_at(pointer, 16)))
        elif kind == 2:
            found.append(SIZE.unpack(ctypes.string_at(pointer, 8)))
    return found


class StringAt:
    """Client memory as the baseline reads it: by `string_at`, so that what is compared is the decoding."""

    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def accessible(self, address: int, size: int, write: bool) -> bool:
        return True


def _decode(memory: Memory) -> Measured:
    from kvm2.abi import wire

    address, keep = _two_attributes()
    if wire.decode(memory, address).findings:
        raise AssertionError("the list that is measured is not in order")

    def ours(count: int) -> None:
        for _ in range(count):
            wire.decode(memory, address)

    def baseline(count: int) -> None:
        for _ in range(count):
            _bare_parse(address)

    a, b = in_turns(ours, 2000, baseline, 5000)
    keep.clear()
    return Measured(a / b, a * 1e6, b * 1e6, "us")


def decode() -> Measured:
    """A list of two attributes, with every check, from the same kind of reads as the baseline."""
    return _decode(StringAt())


def decode_checked() -> Measured:
    """The same as an ioctl does it: each of the five reads is a system call that a bad address cannot crash."""
    from kvm2.softkvm.memory import ProcessMemory

    return _decode(ProcessMemory())


FIGURES = (
    Figure("create", "CREATE_VM2 and close, software KVM / CREATE_VM and close, this machine's /dev/kvm", 0.5, create),
    Figure("decode", "decoding a list of two attributes / bare struct, both by string_at", 2.5, decode),
    Figure("decode-copy", "the same with reads that no bad address can crash / bare", None, decode_checked),
)

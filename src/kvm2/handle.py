"""A file descriptor of a KVM as a Python object: how it is called, how it is closed, what it keeps alive."""

from __future__ import annotations

import ctypes
import errno
import struct
import weakref
from typing import TYPE_CHECKING, TypeVar

from kvm2.errors import KvmError, UsageError

if TYPE_CHECKING:
    from typing import Self

    from kvm2.abi.layout import Structure
    from kvm2.hosts.backend import Backend

S = TypeVar("S", bound="Structure")


class Buffer:
    """Bytes at a fixed address, to be pointed at by ioctl arguments.

    >>> buffer = Buffer(b"kvm2")
    >>> buffer.bytes(), buffer.address != 0
    (b'kvm2', True)
    """

    __slots__ = ("_array", "address", "size")

    def __init__(self, data: bytes | int) -> None:
        size = data if isinstance(data, int) else len(data)
        # At least one byte, so that every buffer has an address of its own.
        self._array = ctypes.create_string_buffer(b"" if isinstance(data, int) else data, max(size, 1))
        self.size = size
        self.address = ctypes.addressof(self._array)

    def bytes(self) -> bytes:
        """What is in it now."""
        return self._array.raw[: self.size]


def packed(structure: Structure) -> Buffer:
    """A structure's bytes at an address; UsageError where a value does not fit its field."""
    try:
        return Buffer(structure.pack())
    except struct.error as error:
        raise UsageError(f"{structure!r}: a value does not fit its field ({error})") from error


class Memories(list[object]):
    """The guest memories of one VM. Its VM, vCPU and device descriptors hold it until they are closed."""


def close_descriptor(backend: Backend, fd: int, memories: Memories | None) -> None:
    """What closing a handle does; `memories` is only held, so that guest memory outlives the descriptor."""
    backend.close(fd)


MOST_REQUEST = (1 << 32) - 1
LEAST_ARGUMENT, MOST_ARGUMENT = -(1 << 63), (1 << 64) - 1


class Handle:
    """The base of `Kvm`, `Vm`, `Vcpu` and `Device`: one descriptor, closed once, in any order with the others.

    As with a kernel, a vCPU keeps its VM alive: closing a `Vm` closes that descriptor only.
    """

    def __init__(self, backend: Backend, fd: int, memories: Memories | None = None) -> None:
        self._backend = backend
        self._fd = fd
        self._close = weakref.finalize(self, close_descriptor, backend, fd, memories)

    @property
    def fd(self) -> int:
        """The descriptor's number in its backend; KvmError(EBADF) once it is closed."""
        if self._fd < 0:
            raise self._closed_error()
        return self._fd

    @property
    def backend(self) -> Backend:
        """Who answers this descriptor's ioctls."""
        return self._backend

    @property
    def arch(self) -> str:
        """The architecture of the host and so of its guests: "arm64" or "x86_64"."""
        return self._backend.arch

    def _only_on(self, arch: str, call: str, instead: str = "") -> None:
        """UsageError where the host is of another architecture than the call."""
        here = self._backend.arch
        if here != arch:
            hint = f": {instead}" if instead else ""
            raise UsageError(f"{call} is a call of {arch}, and this host is {here}{hint}")

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; closing twice is fine."""
        self._fd = -1
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._fd < 0 else f'fd {self._fd}'}>"

    def _closed_error(self) -> KvmError:
        return KvmError(errno.EBADF, f"this {type(self).__name__} is closed: make a new one")

    def ioctl(self, request: int, argument: int | Structure | Buffer = 0) -> int:
        """Any ioctl: its request number, and a number, a structure or a buffer. KvmError if refused.

        A structure is copied: what the host writes back is in `exchange`.
        """
        if self._fd < 0:
            raise self._closed_error()
        if not isinstance(request, int) or not 0 <= request <= MOST_REQUEST:
            raise UsageError(f"request = {request!r}: an ioctl's number has 32 bits (kvm2.abi.ioctls has them)")
        if isinstance(argument, int):
            if not LEAST_ARGUMENT <= argument <= MOST_ARGUMENT:
                raise UsageError(f"argument = {argument:#x}: an ioctl's argument has 64 bits")
            return self._backend.ioctl(self._fd, request, argument)
        buffer = argument if isinstance(argument, Buffer) else packed(argument)
        return self._backend.ioctl(self._fd, request, buffer.address)

    def exchange(self, request: int, argument: S) -> S:
        """An ioctl that writes its structure back: the structure as the host left it."""
        buffer = packed(argument)
        self.ioctl(request, buffer)
        return type(argument).unpack(buffer.bytes())


class DeviceAttributes(Handle):
    """A handle that has KVM_HAS/GET/SET_DEVICE_ATTR: a VM, a vCPU, a device."""

    def has_device_attr(self, group: int, attr: int) -> bool:
        """Whether KVM_HAS_DEVICE_ATTR answers 0 (it refuses with ENXIO; other refusals are raised)."""
        try:
            self._device_attr("KVM_HAS_DEVICE_ATTR", group, attr, 0)
        except KvmError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return True

    def get_device_attr(self, group: int, attr: int, size: int) -> bytes:
        """The attribute's value, `size` bytes (its size is the attribute's own: 4 or 8 for most)."""
        value = Buffer(size)
        self._device_attr("KVM_GET_DEVICE_ATTR", group, attr, value.address)
        return value.bytes()

    def set_device_attr(self, group: int, attr: int, value: bytes | None = None, *, flags: int = 0) -> None:
        """Set an attribute; `value` None passes a NULL address, for attributes that are commands."""
        data = None if value is None else Buffer(value)
        self._device_attr("KVM_SET_DEVICE_ATTR", group, attr, data.address if data else 0, flags)

    def _device_attr(self, call: str, group: int, attr: int, address: int, flags: int = 0) -> None:
        from kvm2.abi import ioctls, structs

        self.ioctl(getattr(ioctls, call), structs.DeviceAttr(flags=flags, group=group, attr=attr, addr=address))


def checked_word(name: str, value: int, bits: int) -> int:
    """`value` when it is a whole number of `bits` bits; UsageError otherwise, so that nothing is cut off."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << bits:
        raise UsageError(f"{name} = {value!r}: allowed are whole numbers from 0 to {(1 << bits) - 1:#x}")
    return value

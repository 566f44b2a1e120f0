"""How a Linux ioctl request number is made and read (`_IOC` of asm-generic/ioctl.h; the same on arm64 and x86-64).

>>> hex(iow(0x0C, 16)), hex(io(0x01))
('0x4010ae0c', '0xae01')
>>> split(0x4080AE0C)
Request(direction='w', kind=174, nr=12, size=128)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from kvm2.abi.layout import Scalar, Structure, extent

KVMIO: Final = 0xAE
"""The type byte of every KVM request."""

MAX_SIZE: Final = (1 << 14) - 1
"""The largest payload a request number can name, in bytes."""

# "w": userspace writes the payload for the kernel to read (_IOW); "r": the kernel writes it (_IOR).
_DIRECTIONS: Final = {"": 0, "w": 1, "r": 2, "wr": 3}
_NAMES: Final = {code: name for name, code in _DIRECTIONS.items()}


class Request(NamedTuple):
    """The four fields of a request number; `size` is that of the payload in bytes."""

    direction: str
    kind: int
    nr: int
    size: int


def ioc(direction: str, nr: int, size: int) -> int:
    """The 32-bit request number of a KVM ioctl; ValueError where a field does not fit.

    `direction` is "" (`_IO`), "w" (`_IOW`), "r" (`_IOR`) or "wr" (`_IOWR`).
    """
    if not 0 <= nr <= 0xFF or not 0 <= size <= MAX_SIZE:
        raise ValueError(f"no request number has nr {nr} and size {size}: nr is 0..255, size 0..{MAX_SIZE}")
    return _DIRECTIONS[direction] << 30 | size << 16 | KVMIO << 8 | nr


def io(nr: int) -> int:
    """`_IO(KVMIO, nr)`: the argument, if any, is a number or a pointer whose size the request does not name."""
    return ioc("", nr, 0)


def iow(nr: int, size: int) -> int:
    """`_IOW(KVMIO, nr, ...)` of a payload of `size` bytes."""
    return ioc("w", nr, size)


def ior(nr: int, size: int) -> int:
    """`_IOR(KVMIO, nr, ...)` of a payload of `size` bytes."""
    return ioc("r", nr, size)


def iowr(nr: int, size: int) -> int:
    """`_IOWR(KVMIO, nr, ...)` of a payload of `size` bytes."""
    return ioc("wr", nr, size)


def split(request: int) -> Request:
    """The fields of a request number; ValueError where it has more than 32 bits."""
    if request >> 32:
        raise ValueError(f"{request:#x} is not a request number: it has more than 32 bits")
    return Request(_NAMES[request >> 30], request >> 8 & 0xFF, request & 0xFF, request >> 16 & MAX_SIZE)


Payload = type[Structure] | Scalar | None
"""What an ioctl's argument points to; None: nothing, the argument is a number or unused."""

ARM64: Final = ("arm64",)
X86_64: Final = ("x86_64",)
BOTH: Final = ("arm64", "x86_64")


@dataclass(frozen=True)
class Ioctl:
    """One ioctl as one kind of kernel offers it.

    `number` is the 32-bit request; `direction` the letters of its macro ("", "w", "r", "wr"); `on` the kinds of fd that
    take it; `cap` the capability that says so; `arg` what the argument is where it is no pointer; `returns` what the
    call returns where that is not 0. `tail` is the item of the flexible array that follows the payload.
    """

    name: str
    number: int
    nr: int
    direction: str
    payload: Payload
    on: tuple[str, ...]
    cap: str | None
    arches: tuple[str, ...]
    doc: str
    arg: str
    returns: str
    tail: Payload

    @property
    def size(self) -> int:
        """Bytes that the request number says the argument points to."""
        return self.number >> 16 & MAX_SIZE


class Declare:
    """Collects declarations: each call declares an ioctl and returns its request number."""

    def __init__(self) -> None:
        self.rows: list[Ioctl] = []

    def __call__(
        self,
        name: str,
        direction: str,
        nr: int,
        payload: Payload,
        on: str,
        doc: str,
        *,
        cap: str | None = None,
        arches: tuple[str, ...] = BOTH,
        arg: str = "",
        returns: str = "",
        tail: Payload = None,
    ) -> int:
        size = extent(payload)[0] if direction else 0
        number = ioc(direction, nr, size)
        kinds = tuple(on.split())
        self.rows.append(Ioctl(name, number, nr, direction, payload, kinds, cap, arches, doc, arg, returns, tail))
        return number

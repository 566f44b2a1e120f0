"""Hardware breakpoints and watchpoints of a debugger, as comparators of KVM_SET_GUEST_DEBUG.

After DBGBCR<n>_EL1 and DBGWCR<n>_EL1 of the Arm ARM: they match at EL1 and EL0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvm2.abi.structs_arm64 import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW,
    KVM_GUESTDBG_USE_SW_BP,
    GuestDebug,
    GuestDebugArch,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

WRITE, READ, ACCESS = "2", "3", "4"  # of gdb's Z packets
HARDWARE: Final = "1"
_LOADS_STORES: Final = {WRITE: 2, READ: 1, ACCESS: 3}
_LSC_SHIFT, _BAS_SHIFT, _MASK_SHIFT = 3, 5, 24
_ENABLED_AT_EL0_AND_EL1: Final = 3 << 1 | 1
_ALL_BYTES: Final = 0xFF
_BREAKPOINT: Final = 0xF << _BAS_SHIFT | _ENABLED_AT_EL0_AND_EL1
WORD: Final = 8
COMPARATORS: Final = 16


@dataclass(frozen=True)
class Point:
    """What a Z packet asks for: its type ("1" to "4"), an address and for watchpoints a length in bytes."""

    kind: str
    address: int
    length: int

    def covers(self, address: int) -> bool:
        """Whether an access that was reported at `address` may be this one: it touched one of the same 8 bytes."""
        return self.address // WORD * WORD <= address < -(-(self.address + self.length) // WORD) * WORD


class TooMany(Exception):
    """More comparators than the host has."""


def breakpoint_of(point: Point) -> tuple[int, int]:
    """(DBGBVR, DBGBCR)."""
    return point.address, _BREAKPOINT


def watchpoints_of(point: Point) -> list[tuple[int, int]]:
    """(DBGWVR, DBGWCR) pairs: one for each 8 bytes, or one for a power of two that is aligned to itself.

    >>> [(hex(value), hex(control)) for value, control in watchpoints_of(Point(WRITE, 0x1006, 4))]
    [('0x1000', '0x1817'), ('0x1008', '0x77')]
    >>> [(hex(value), hex(control)) for value, control in watchpoints_of(Point(ACCESS, 0x1000, 64))]
    [('0x1000', '0x6001fff')]
    """
    how = _LOADS_STORES[point.kind] << _LSC_SHIFT | _ENABLED_AT_EL0_AND_EL1
    size = point.length
    if size > WORD and size & (size - 1) == 0 and point.address % size == 0:
        return [(point.address, how | _ALL_BYTES << _BAS_SHIFT | (size.bit_length() - 1) << _MASK_SHIFT)]
    pairs, at, end = [], point.address, point.address + size
    while at < end:
        word = at // WORD * WORD
        stop = min(end, word + WORD)
        pairs.append((word, how | ((1 << stop - at) - 1 << at - word) << _BAS_SHIFT))
        at = stop
    return pairs


def comparators(
    points: Iterable[Point], breakpoints: int, watchpoints: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The breakpoint and watchpoint comparators for all points; `TooMany` where the host has fewer."""
    breaks = [breakpoint_of(point) for point in points if point.kind == HARDWARE]
    watches = [pair for point in points if point.kind != HARDWARE for pair in watchpoints_of(point)]
    for wanted, limit, what in ((breaks, breakpoints, "breakpoints"), (watches, watchpoints, "watchpoints")):
        if len(wanted) > limit:
            raise TooMany(f"{len(wanted)} hardware {what}: this host has {limit}")
    return breaks, watches


def guest_debug(
    breaks: list[tuple[int, int]], watches: list[tuple[int, int]], *, software: bool, step: bool
) -> GuestDebug:
    """The structure for one vCPU; control 0 where nothing is to be debugged, and the guest may debug itself."""
    hardware = bool(breaks or watches)
    control = KVM_GUESTDBG_USE_SW_BP * software | KVM_GUESTDBG_SINGLESTEP * step | KVM_GUESTDBG_USE_HW * hardware

    def filled(pairs: list[tuple[int, int]], index: int) -> tuple[int, ...]:
        values = [pair[index] for pair in pairs]
        return (*values, *(0,) * (COMPARATORS - len(values)))

    arch = GuestDebugArch(
        dbg_bvr=filled(breaks, 0), dbg_bcr=filled(breaks, 1), dbg_wvr=filled(watches, 0), dbg_wcr=filled(watches, 1)
    )
    return GuestDebug(control | KVM_GUESTDBG_ENABLE if control else 0, arch=arch)

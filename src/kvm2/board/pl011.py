"""The UART: an Arm PrimeCell PL011 (DDI 0183), as far as a guest that polls it can tell.

Writes to the data register go to `sink` at once; `feed` puts bytes into the receive FIFO. There are no interrupts:
the masked status register is always 0. Registers that only hold a value keep it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 0x1000

DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, RIS, MIS, ICR, DMACR = (
    *(0x00, 0x04, 0x18, 0x20, 0x24, 0x28, 0x2C),
    *(0x30, 0x34, 0x38, 0x3C, 0x40, 0x44, 0x48),
)
FR_RXFE, FR_TXFE = 1 << 4, 1 << 7
RIS_TX = 1 << 5
_ID_BASE = 0xFE0
# PeriphID0..3 (part 0x011, designer 0x41, revision 1) and PCellID0..3.
_ID = (0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_RESET = {CR: 0x300, IFLS: 0x12}
_WIDTH = {ILPR: 8, IBRD: 16, FBRD: 6, LCR_H: 8, CR: 16, IFLS: 6, IMSC: 11, DMACR: 3}


class Pl011:
    """One UART. `sink` gets each byte that the guest sends.

    >>> sent = []
    >>> uart = Pl011(sent.append)
    >>> uart.write(0, ord("A"))
    >>> sent, hex(uart.read(0xFE0)), uart.read(0x18) == FR_TXFE | FR_RXFE
    ([65], '0x11', True)
    """

    def __init__(self, sink: Callable[[int], object]) -> None:
        self._sink = sink
        self._received: deque[int] = deque()
        self._held = dict(_RESET)

    def feed(self, data: bytes) -> None:
        """Bytes that the guest can read from the data register."""
        self._received.extend(data)

    def write(self, offset: int, value: int) -> None:
        """A write of a register; read-only and unknown ones ignore it."""
        if offset == DR:
            self._sink(value & 0xFF)
        elif offset in _WIDTH:
            self._held[offset] = value & ((1 << _WIDTH[offset]) - 1)

    def read(self, offset: int) -> int:
        """A read of a register; 0 from those that do not exist."""
        if offset == FR:
            return FR_TXFE | (0 if self._received else FR_RXFE)
        if offset == DR:
            return self._received.popleft() if self._received else 0
        if offset == RIS:
            return RIS_TX | (1 << 4 if self._received else 0)
        if offset >= _ID_BASE:
            return _ID[(offset - _ID_BASE) // 4] if offset % 4 == 0 and offset < SIZE else 0
        return self._held.get(offset, 0)

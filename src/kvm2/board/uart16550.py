"""The x86 board's UART: a 16550A (PC16550D data sheet), as far as a guest that polls it can tell.

Writes to the transmit register go to `sink` at once; `feed` puts bytes into the receive FIFO. No interrupt line is
wired, but the identification register says what would be pending, and loopback works, by which drivers find the chip.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 8
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(SIZE)
LSR_DATA_READY, LSR_THRE, LSR_TEMT = 1 << 0, 1 << 5, 1 << 6
LCR_DLAB, MCR_LOOP, FCR_ENABLE, FCR_CLEAR_RECEIVED = 1 << 7, 1 << 4, 1 << 0, 1 << 1
IER_RECEIVED, IER_THRE = 1 << 0, 1 << 1
IIR_NONE, IIR_THRE, IIR_RECEIVED, IIR_FIFOS = 1, 2, 4, 0xC0
MSR_CTS_DSR_DCD = 0xB0


class Uart16550:
    """One UART; offsets 0 to 7 are its byte-wide registers. `sink` gets each byte that the guest sends.

    >>> sent = []
    >>> uart = Uart16550(sent.append)
    >>> uart.write(DATA, ord("A"))
    >>> sent, hex(uart.read(LSR))
    ([65], '0x60')
    """

    def __init__(self, sink: Callable[[int], object]) -> None:
        self._sink = sink
        self._received: deque[int] = deque()
        self._held = {IER: 0, LCR: 3, MCR: 0, SCR: 0}
        self._divisor = bytearray((12, 0))  # 9600 baud
        self._fifos = False
        self._sent = False  # since IIR last said that the transmitter is empty

    def feed(self, data: bytes) -> None:
        """Bytes that the guest can read."""
        self._received.extend(data)

    def write(self, offset: int, value: int) -> None:
        """A write of one register; read-only ones ignore it."""
        if offset < IIR_FCR and self._held[LCR] & LCR_DLAB:
            self._divisor[offset] = value
        elif offset == DATA:
            self._sent = True
            if self._held[MCR] & MCR_LOOP:
                self._received.append(value)
            else:
                self._sink(value)
        elif offset == IIR_FCR:
            self._fifos = bool(value & FCR_ENABLE)
            if value & FCR_CLEAR_RECEIVED:
                self._received.clear()
        elif offset == IER:
            self._sent = self._sent or bool(value & IER_THRE)
            self._held[IER] = value & 0x0F
        elif offset == MCR:
            self._held[MCR] = value & 0x1F
        elif offset in self._held:
            self._held[offset] = value

    def read(self, offset: int) -> int:
        """A read of one register."""
        if offset < IIR_FCR and self._held[LCR] & LCR_DLAB:
            return self._divisor[offset]
        if offset == DATA:
            return self._received.popleft() if self._received else 0
        if offset == IIR_FCR:
            return self._identification() | (IIR_FIFOS if self._fifos else 0)
        if offset == LSR:
            return LSR_THRE | LSR_TEMT | (LSR_DATA_READY if self._received else 0)
        if offset == MSR:
            return self._modem_status()
        return self._held[offset]

    def _identification(self) -> int:
        if self._held[IER] & IER_RECEIVED and self._received:
            return IIR_RECEIVED
        if self._held[IER] & IER_THRE and self._sent:
            self._sent = False
            return IIR_THRE
        return IIR_NONE

    def _modem_status(self) -> int:
        mcr = self._held[MCR]
        if not mcr & MCR_LOOP:
            return MSR_CTS_DSR_DCD
        # Loopback: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
        return (mcr & 1) << 5 | (mcr >> 1 & 1) << 4 | (mcr >> 2 & 1) << 6 | (mcr >> 3 & 1) << 7

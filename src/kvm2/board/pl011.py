"""The UART: an Arm PrimeCell PL011 (DDI 0183).

What the guest sends goes to `sink` at once: the transmit FIFO is always empty. What `feed` brings waits until there is
room in the receive FIFO of 16 bytes (one byte where LCR_H.FEN is 0). Time does not pass on the line, so the receive
timeout interrupt is there as soon as bytes are. Modem lines, DMA, breaks, errors and loopback never happen; registers
that only hold a value keep it.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 0x1000

DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, RIS, MIS, ICR, DMACR = (
    *(0x00, 0x04, 0x18, 0x20, 0x24, 0x28, 0x2C),
    *(0x30, 0x34, 0x38, 0x3C, 0x40, 0x44, 0x48),
)
FR_RXFE, FR_RXFF, FR_TXFE = 1 << 4, 1 << 6, 1 << 7
RIS_RX, RIS_TX, RIS_RT = 1 << 4, 1 << 5, 1 << 6
LCR_H_FEN = 1 << 4
CR_UARTEN, CR_RXE = 1 << 0, 1 << 9
FIFO_DEPTH = 16
# IFLS.RXIFLSEL: one eighth, a quarter, a half, three quarters, seven eighths; reserved values as the last one.
_RX_LEVELS = (2, 4, 8, 12, 14, 14, 14, 14)
# So many reads of the flags in a row, with nothing else between, are a guest that waits for input.
_POLLING = 8
_ID_BASE = 0xFE0
# PeriphID0..3 (part 0x011, designer 0x41, revision 1) and PCellID0..3.
_ID = (0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_RESET = {CR: 0x300, IFLS: 0x12}
_WIDTH = {ILPR: 8, IBRD: 16, FBRD: 6, LCR_H: 8, CR: 16, IFLS: 6, IMSC: 11, DMACR: 3}


class Pl011:
    """One UART. `sink` gets each byte that the guest sends; `irq` is told when the interrupt's level changes.

    Without `irq` it is a UART to be polled: no interrupt is ever shown as wanted (MIS is 0), and bytes are received
    even by a guest that never enables the UART. An access of any size is one of the register at its offset.

    >>> sent = []
    >>> uart = Pl011(sent.append)
    >>> uart.write(DR, 1, ord("A"))
    >>> sent, hex(uart.read(0xFE0, 4)), uart.read(FR, 4) == FR_TXFE | FR_RXFE
    ([65], '0x11', True)
    """

    size = SIZE

    def __init__(self, sink: Callable[[int], object], irq: Callable[[bool], None] | None = None) -> None:
        self._sink, self._irq = sink, irq
        self._held = dict(_RESET)
        self._fifo: deque[int] = deque()
        self._outside: deque[int] = deque()  # fed, and no room in the FIFO yet
        self._ahead: deque[int] = deque()  # typed before the guest listens
        self._ris = 0
        self._level = False
        self._flags_read = 0
        self._lock = threading.Lock()  # the state above
        # Held while `irq` is called, so that two threads cannot tell their levels in the wrong order.
        self._line = threading.Lock()

    # -- the line's other end

    def feed(self, data: bytes) -> None:
        """Bytes on the line: the guest reads them from the data register, in order, none is ever lost on the way."""
        with self._lock:
            self._outside.extend(data)
            self._receive()
        self._tell()

    def type_ahead(self, data: bytes) -> None:
        """As `feed`, but the bytes wait until the guest listens: it has unmasked a receive interrupt, or polls.

        A driver throws away what is in the FIFO when it starts, and so what was typed before it did.
        """
        with self._lock:
            self._ahead.extend(data)
            if self._listening():
                self._admit()
        self._tell()

    @property
    def waiting(self) -> int:
        """Bytes that the guest has not read yet."""
        with self._lock:
            return len(self._fifo) + len(self._outside) + len(self._ahead)

    def _listening(self) -> bool:
        return self._irq is None or self._held.get(IMSC, 0) & (RIS_RX | RIS_RT) != 0

    def _admit(self) -> None:
        self._outside.extend(self._ahead)
        self._ahead.clear()
        self._receive()

    @property
    def _depth(self) -> int:
        return FIFO_DEPTH if self._held.get(LCR_H, 0) & LCR_H_FEN else 1

    @property
    def _trigger(self) -> int:
        return _RX_LEVELS[self._held[IFLS] >> 3 & 7] if self._depth > 1 else 1

    def _receive(self) -> None:
        """Bytes from the line into the FIFO; the interrupts that say so."""
        enabled = CR_UARTEN | CR_RXE
        if not self._outside or (self._irq is not None and self._held[CR] & enabled != enabled):
            return
        before, depth = len(self._fifo), self._depth
        while self._outside and len(self._fifo) < depth:
            self._fifo.append(self._outside.popleft())
        if len(self._fifo) > before:
            self._ris |= RIS_RT
            if before < self._trigger <= len(self._fifo):
                self._ris |= RIS_RX

    def _tell(self) -> None:
        """The interrupt's level, if it has changed."""
        irq = self._irq
        if irq is None or bool(self._ris & self._held.get(IMSC, 0)) is self._level:
            return
        with self._line:
            level = bool(self._ris & self._held.get(IMSC, 0))
            if level is not self._level:
                self._level = level
                irq(level)

    # -- the guest's end

    def write(self, offset: int, size: int, value: int) -> None:
        """A write of a register; read-only and unknown ones ignore it."""
        if offset == DR:
            self._sink(value & 0xFF)
            self._flags_read = 0
            if self._ris & RIS_TX:
                return  # the state of nearly every byte, and nothing changes
            with self._lock:
                self._ris |= RIS_TX  # the FIFO is empty again
        elif offset == ICR:
            with self._lock:
                self._ris &= ~value
        elif offset in _WIDTH:
            with self._lock:
                self._set(offset, value & ((1 << _WIDTH[offset]) - 1))
        self._tell()

    def _set(self, offset: int, value: int) -> None:
        if offset == LCR_H and (self._held.get(LCR_H, 0) ^ value) & LCR_H_FEN:
            self._fifo.clear()  # 3.3.7: FIFO mode and character mode do not share contents
            self._ris &= ~(RIS_RX | RIS_RT)
        self._held[offset] = value
        if offset == IMSC and self._listening():
            self._admit()
        elif offset == IMSC:  # a driver that stops; what it has not got waits for the next one
            self._ahead.extendleft(reversed(self._outside))
            self._outside.clear()
        elif offset in (CR, LCR_H):
            self._receive()

    def read(self, offset: int, size: int) -> int:
        """A read of a register; 0 from those that do not exist."""
        if offset == FR:
            return self._flags()
        self._flags_read = 0
        if offset == DR:
            return self._take()
        if offset == RIS:
            return self._shown()
        if offset == MIS:
            return 0 if self._irq is None else self._ris & self._held.get(IMSC, 0)
        if offset >= _ID_BASE:
            return _ID[(offset - _ID_BASE) // 4] if offset % 4 == 0 and offset < SIZE else 0
        return self._held.get(offset, 0)

    def _shown(self) -> int:
        """RIS. A guest that polls may look for room here without ever having sent."""
        return self._ris | RIS_TX if self._irq is None else self._ris

    def _flags(self) -> int:
        if self._fifo:
            return FR_TXFE | (FR_RXFF if len(self._fifo) >= self._depth else 0)
        if self._ahead:
            self._flags_read += 1
            if self._flags_read >= _POLLING:
                with self._lock:
                    self._admit()
                self._tell()
        return FR_TXFE | FR_RXFE

    def _take(self) -> int:
        with self._lock:
            if not self._fifo:
                return 0
            byte = self._fifo.popleft()
            if len(self._fifo) < self._trigger:
                self._ris &= ~RIS_RX
            if not self._fifo:
                self._ris &= ~RIS_RT
            self._receive()
        self._tell()
        return byte

    # -- snapshots

    def state(self) -> dict[str, Any]:
        """Registers, interrupts, and the bytes that the guest has not read."""
        with self._lock:
            return {
                "registers": {f"{offset:#x}": value for offset, value in sorted(self._held.items())},
                "ris": self._ris,
                "fifo": bytes(self._fifo).hex(),
                "outside": bytes(self._outside).hex(),
                "ahead": bytes(self._ahead).hex(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; the interrupt line follows."""
        with self._lock:
            self._held = {int(offset, 16): value for offset, value in state["registers"].items()}
            self._ris = state["ris"]
            self._fifo = deque(bytes.fromhex(state["fifo"]))
            self._outside = deque(bytes.fromhex(state["outside"]))
            self._ahead = deque(bytes.fromhex(state["ahead"]))
        self._tell()

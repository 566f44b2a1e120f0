"""The real-time clock: an Arm PrimeCell PL031 (DDI 0224), which counts seconds from this machine's clock.

A load sets the difference from that clock, which is all that is kept. The match interrupt is raised when the counter
comes to the match register.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 0x1000

DR, MR, LR, CR, IMSC, RIS, MIS, ICR = range(0, 0x20, 4)
_ID_BASE = 0xFE0
# PeriphID0..3 (part 0x031, designer 0x41, revision 0) and PCellID0..3.
_ID = (0x31, 0x10, 0x04, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_MASK = 0xFFFF_FFFF
_LONGEST_WAIT = 3600.0  # the clock of this machine may be set meanwhile: look again


class Pl031:
    """One clock. `irq` is told when the interrupt's level changes; `now` gives the seconds since 1970.

    >>> clock = Pl031(now=lambda: 1_000_000.7)
    >>> clock.read(DR, 4)
    1000000
    >>> clock.write(LR, 4, 5)
    >>> clock.read(DR, 4), clock.read(CR, 4), hex(clock.read(0xFE0, 4))
    (5, 1, '0x31')
    """

    size = SIZE

    def __init__(self, irq: Callable[[bool], None] | None = None, now: Callable[[], float] = time.time) -> None:
        self._irq, self._now = irq, now
        self._offset = 0  # the counter is the machine's clock plus this, modulo 2^32
        self._match = self._load = self._imsc = self._ris = 0
        self._level = self._closed = False
        self._due: int | None = None  # the second of this machine's clock in which the counter matches
        self._waiter: threading.Thread | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._line = threading.Lock()  # held while `irq` is called: levels are told in order

    @property
    def _count(self) -> int:
        return (int(self._now()) + self._offset) & _MASK

    def read(self, offset: int, size: int) -> int:
        """A read of a register; 0 from those that do not exist and from the one that is only written."""
        if offset == DR:
            return self._count
        if offset == CR:
            return 1  # the counter never stops: once enabled it stays so, and it comes enabled
        if offset >= _ID_BASE:
            return _ID[(offset - _ID_BASE) // 4] if offset % 4 == 0 and offset < SIZE else 0
        with self._lock:
            held = {MR: self._match, LR: self._load, IMSC: self._imsc, RIS: self._ris, MIS: self._ris & self._imsc}
        return held.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """A write of a register; read-only and unknown ones ignore it."""
        with self._lock:
            if offset == MR:
                self._match = value & _MASK
            elif offset == LR:
                self._load = value & _MASK
                self._offset = (self._load - int(self._now())) & _MASK
            elif offset == IMSC:
                self._imsc = value & 1
            elif offset == ICR:
                self._ris &= ~value & 1
            if offset in (MR, LR):
                self._arm()
        self._tell()

    def _arm(self) -> None:
        """Expect the match. Only a guest that sets an alarm, or the clock, costs a thread."""
        self._due = int(self._now()) + ((self._match - self._count) & _MASK)
        if self._waiter is None and not self._closed:
            self._waiter = threading.Thread(target=self._wait, name="pl031", daemon=True)
            self._waiter.start()
        self._changed.notify()

    def _wait(self) -> None:
        with self._changed:
            while not self._closed:
                left = _LONGEST_WAIT if self._due is None else self._due - self._now()
                if left > 0:
                    self._changed.wait(min(left, _LONGEST_WAIT))
                    continue
                self._due, self._ris = None, 1
                self._lock.release()  # `irq` is not called under it
                try:
                    self._tell()
                finally:
                    self._lock.acquire()

    def _tell(self) -> None:
        irq = self._irq
        if irq is None or bool(self._ris & self._imsc) is self._level:
            return
        with self._line:
            level = bool(self._ris & self._imsc)
            if level is not self._level:
                self._level = level
                irq(level)

    def state(self) -> dict[str, Any]:
        """The registers; the counter as its difference from this machine's clock, so that it goes on meanwhile."""
        with self._lock:
            return {
                "offset": self._offset,
                "match": self._match,
                "load": self._load,
                "imsc": self._imsc,
                "ris": self._ris,
                "due": self._due,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; an alarm whose time has passed meanwhile is due at once."""
        with self._lock:
            self._offset, self._match, self._load = state["offset"], state["match"], state["load"]
            self._imsc, self._ris = state["imsc"], state["ris"]
            if state["due"] is not None:
                self._arm()
                self._due = state["due"]
        self._tell()

    def close(self) -> None:
        """No alarm any more."""
        with self._lock:
            self._closed = True
            self._changed.notify()

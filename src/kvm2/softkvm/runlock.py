"""One vCPU of a VM runs at a time, and whoever waits gets its turn.

The emulated cores do not make LDXR/STXR or LSE atomic between each other, so the vCPUs of a VM take turns. The same
lock is what a memslot change holds: while it is held no vCPU walks the stage-2 tables.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

# How long a vCPU may go on when another one waits: long enough that the switch (a TLB flush) stays cheap, short enough
# that a guest's spin lock held by a waiting vCPU costs little.
SLICE_SECONDS = 0.002


class RunLock:
    """A first-come lock whose holder can be asked to let go.

    The holder gives `acquire` a function that stops it (any thread may call it, at any time). A waiting vCPU calls it
    after a slice, again and again until the lock is passed on; an urgent waiter calls it at once.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[threading.Event, Callable[[], None]]] = deque()
        self._stop_holder: Callable[[], None] | None = None

    def acquire(self, stop: Callable[[], None], urgent: bool = False) -> None:
        """Waits for the lock; `stop` is what others call to make this holder release it soon."""
        with self._mutex:
            if self._stop_holder is None:
                self._stop_holder = stop
                return
            turn = threading.Event()
            entry = (turn, stop)
            self._waiting.append(entry)
        try:
            while not turn.wait(0.0 if urgent else SLICE_SECONDS):
                with self._mutex:
                    holder = self._stop_holder
                if holder is not None and not turn.is_set():
                    holder()
                urgent = False
        except BaseException:
            self._give_up(entry)
            raise

    def _give_up(self, entry: tuple[threading.Event, Callable[[], None]]) -> None:
        with self._mutex:
            if entry in self._waiting:
                self._waiting.remove(entry)
                return
        self.release()

    def release(self) -> None:
        """Passes the lock to the one who has waited longest."""
        with self._mutex:
            if self._waiting:
                turn, self._stop_holder = self._waiting.popleft()
                turn.set()
            else:
                self._stop_holder = None

    def contended(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def __enter__(self) -> RunLock:
        """For short work on the VM with all its vCPUs out of the guest."""
        self.acquire(_nothing, urgent=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def _nothing() -> None:
    """The one who holds the lock for short work is not stopped."""

"""One vCPU of a VM runs at a time, and whoever waits gets its turn.

The emulated cores do not make LDXR/STXR or LSE atomic between each other, so the vCPUs of a VM take turns. The same
lock is what a memslot change holds: while it is held no vCPU walks the stage-2 tables.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# How long a vCPU may go on when another one waits: long enough that the switch (a TLB flush) stays cheap, short enough
# that a guest's spin lock held by a waiting vCPU costs little.
SLICE_SECONDS = 0.002


class RunLock:
    """A first-come lock whose holder can be asked to let go.

    The holder gives `acquire` a function that stops it (any thread may call it, at any time). A waiting vCPU calls it
    after a slice, again and again until the lock is free; an urgent waiter calls it at once.

    An exception of a signal handler (Ctrl-C) may come at the start of any Python function and behind any call. It
    leaves no lock behind: `acquire` gives back what it got, and `unlock` is a function of C.
    """

    def __init__(self) -> None:
        # Not because it is taken twice, but because only its owner can release it: see `acquire`.
        self._lock = threading.RLock()
        self.unlock: Callable[[], None] = self._lock.release  # `pass_on` follows
        self._waiting: deque[threading.Event] = deque()
        self._stop_holder: Callable[[], None] | None = None

    def acquire(self, stop: Callable[[], None], urgent: bool = False) -> None:
        """Waits for the lock; `stop` is what others call to make this holder release it soon."""
        try:
            if self._waiting or not self._lock.acquire(False):
                self._wait(urgent)
            self._stop_holder = stop
        except BaseException:
            # Whether the lock was ours already, only the lock knows: it refuses where it was not.
            with contextlib.suppress(RuntimeError):
                self.unlock()
            raise

    def _wait(self, urgent: bool) -> None:
        turn = threading.Event()
        self._waiting.append(turn)
        try:
            while self._waiting[0] is not turn or not self._lock.acquire(False):
                holder = self._stop_holder
                if urgent and holder is not None:
                    holder()
                # Only the first in the queue counts the holder's slice. Also without a call to `set` it looks again:
                # the holder may have released just before it queued.
                first = self._waiting[0] is turn
                passed = not turn.wait(SLICE_SECONDS)
                turn.clear()
                urgent = urgent or (first and passed)
        finally:
            self._waiting.remove(turn)
            self._next()

    def _next(self) -> None:
        """Wakes the one who has waited longest; it takes the lock, if it is free."""
        with contextlib.suppress(IndexError):
            self._waiting[0].set()

    def pass_on(self) -> None:
        """After `unlock`: the next one need not find out by itself. The old holder may still be asked to stop, once."""
        if self._waiting:
            self._next()

    def release(self) -> None:
        """Lets the next one have it."""
        self.unlock()
        self.pass_on()

    def __enter__(self) -> RunLock:
        """For short work on the VM with all its vCPUs out of the guest."""
        self.acquire(_nothing, urgent=True)
        return self

    @property
    def __exit__(self) -> Callable[..., None]:
        # Looked up before the lock is taken, and called without Python. Who waits finds out by itself.
        return self._lock.__exit__


def _nothing() -> None:
    """The one who holds the lock for short work is not stopped."""

"""Alarms at times of the monotonic clock: one thread of the process wakes whoever asked (the kernel's hrtimers)."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Final, Protocol

_FOREVER: Final = 1 << 63
_LONGEST_SLEEP: Final = 3600.0  # seconds


class Sleeper(Protocol):
    """Who is woken. `fired` runs in the alarm's thread and should be short."""

    def fired(self) -> None:
        """The time has come."""


class Alarm:
    """The times that were asked for, at most one of each sleeper. Any thread may call `set`.

    A signal's exception (Ctrl-C) may end `set` behind any call: nothing stays locked then (in `with` there are locks of
    C, which a Condition is not), and the next `set` does what was left out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Lock()  # taken, except while the thread has been woken and is not yet awake
        self._wake.acquire()
        self._due: dict[Sleeper, int] = {}
        self._next = _FOREVER  # when the thread wakes up by itself
        self._thread: threading.Thread | None = None

    def set(self, sleeper: Sleeper, when: int | None) -> None:
        """`sleeper.fired()` is called at `when`, in nanoseconds of time.monotonic_ns, instead of earlier wishes; None
        only takes those back."""
        with self._lock:
            if when is None:
                self._due.pop(sleeper, None)
                return
            self._due[sleeper] = when
            # A later time than the next one costs nothing: the thread looks again when it is awake anyway.
            if when < self._next:
                if self._thread is None:
                    thread = threading.Thread(target=self._work, name="kvm2-timers", daemon=True)
                    thread.start()
                    self._thread = thread
                elif self._wake.locked():
                    self._wake.release()
                self._next = when

    def _work(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic_ns()
                due = [sleeper for sleeper, when in self._due.items() if when <= now]
                for sleeper in due:
                    del self._due[sleeper]
                self._next = min(self._due.values(), default=_FOREVER)
                pause = min((self._next - now) / 1e9, _LONGEST_SLEEP)
            if not due:
                self._wake.acquire(timeout=pause)
            for sleeper in due:
                try:
                    sleeper.fired()
                except Exception:
                    # The others are woken all the same.
                    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


_alarms: dict[int, Alarm] = {}


def alarm() -> Alarm:
    """This process's alarm; a child has its own."""
    found = _alarms.get(os.getpid())
    if found is None:
        _alarms.clear()
        found = _alarms.setdefault(os.getpid(), Alarm())
    return found

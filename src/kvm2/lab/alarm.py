"""The timer around KVM_RUN: gets a vCPU back that would stay in it.

A scenario's `run` is interrupted by a signal after a while. How long that is makes no difference to a vCPU that sleeps
or spins, so less time than was recorded may be allowed; but a busy machine must not cut short a guest that is merely
slow. So the time counts as used up only when the running thread spent it on the processor, or sleeps.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.hosts.backend import Backend

# A kick that arrives just before KVM_RUN begins is lost, as a signal is: it is sent again.
AGAIN_SECONDS = 0.05
# A thread that used less than this between two looks sleeps; waiting for its turn it would still get some.
IDLE_SECONDS = 0.0005
# However busy the machine is, after this many times the allowed time the guest does not merely wait for its turn.
PATIENCE_FACTOR = 10


class Alarm:
    """`with Alarm(backend, fd, milliseconds) as alarm: KVM_RUN`; then `alarm.rang` tells whether it was needed."""

    def __init__(self, backend: Backend, fd: int, milliseconds: int) -> None:
        self._backend, self._fd = backend, fd
        self._seconds = milliseconds / 1000
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.rang = False

    def __enter__(self) -> Alarm:
        self._clock = _cpu_clock()
        self._thread = threading.Thread(target=self._watch, name="kvm2-alarm", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._over.set()
        self._thread.join()

    def _used(self) -> float | None:
        return None if self._clock is None else time.clock_gettime(self._clock)

    def _watch(self) -> None:
        start, begun = time.monotonic(), self._used()
        last = begun
        wait = self._seconds
        while not self._over.wait(wait):
            now = self._used()
            if self._is_up(start, begun, last, now):
                self._kick()
            last, wait = now, AGAIN_SECONDS

    def _is_up(self, start: float, begun: float | None, last: float | None, now: float | None) -> bool:
        if self.rang or now is None or last is None or begun is None:
            return True
        waited = time.monotonic() - start
        used_up = now - begun >= self._seconds or waited >= PATIENCE_FACTOR * self._seconds
        return used_up or now - last < IDLE_SECONDS

    def _kick(self) -> None:
        with self._lock:  # never after the run is over: a backend may remember a kick until the next one
            if self._over.is_set():
                return
            self.rang = True
            try:
                self._backend.kick(self._fd)
            except KvmError:
                return  # not a vCPU: KVM_RUN on it fails by itself


def _cpu_clock() -> int | None:
    """The clock that counts this thread's time on the processor; None where the system has none."""
    try:
        return time.pthread_getcpuclockid(threading.get_ident())
    except (AttributeError, OSError):
        return None

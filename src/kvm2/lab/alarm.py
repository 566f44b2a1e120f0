"""The timer around KVM_RUN: gets a vCPU back that would stay in it.

A scenario's `run` is interrupted by a signal after a while. How long that is makes no difference to a vCPU that sleeps
or spins, so less time than was recorded may be allowed; but a busy machine must not cut short a guest that is merely
slow. So the time counts as used up only when the running thread spent it on the processor, or sleeps.

One thread watches every run of the process: most runs are over before it looks, and starting a thread for each would
cost more than they do.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.hosts.backend import Backend

# How often the watching thread looks. A kick that arrives just before KVM_RUN begins is lost, as a signal is: the next
# look sends it again.
AGAIN_SECONDS = 0.05
# So many looks at nothing, and the watching thread ends.
IDLE_LOOKS = 40
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
        self._over = False
        self.rang = False

    def __enter__(self) -> Alarm:
        self._clock = _cpu_clock()
        self._start, self._begun = time.monotonic(), self._used()
        self._last = self._begun
        _WATCH.add(self)
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._over = True
        _WATCH.remove(self)

    def _used(self) -> float | None:
        return None if self._clock is None else time.clock_gettime(self._clock)

    def look(self) -> None:
        """One look of the watching thread: kicks where the time is used up."""
        waited = time.monotonic() - self._start
        if waited < self._seconds:
            return
        try:
            now = self._used()
        except OSError:
            return  # the thread has ended, and so has its run
        if self._is_up(waited, now):
            self._kick()
        self._last = now

    def _is_up(self, waited: float, now: float | None) -> bool:
        if self.rang or now is None or self._last is None or self._begun is None:
            return True
        used_up = now - self._begun >= self._seconds or waited >= PATIENCE_FACTOR * self._seconds
        return used_up or now - self._last < IDLE_SECONDS

    def _kick(self) -> None:
        with self._lock:  # never after the run is over: a backend may remember a kick until the next one
            if self._over:
                return
            self.rang = True
            try:
                self._backend.kick(self._fd)
            except KvmError:
                return  # not a vCPU: KVM_RUN on it fails by itself


class _Watch:
    """The alarms that are set, and the thread that looks at them; it is started when one is set, and ends by itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alarms: list[Alarm] = []
        self._thread: threading.Thread | None = None

    def add(self, alarm: Alarm) -> None:
        with self._lock:
            self._alarms.append(alarm)
            # In the child of a fork the thread is not alive, whatever this process had.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="kvm2-alarm", daemon=True)
                self._thread.start()

    def remove(self, alarm: Alarm) -> None:
        with self._lock:
            self._alarms.remove(alarm)

    def _run(self) -> None:
        idle = 0
        while True:
            time.sleep(AGAIN_SECONDS)
            with self._lock:
                alarms = tuple(self._alarms)
                idle = 0 if alarms else idle + 1
                if idle > IDLE_LOOKS:
                    self._thread = None
                    return
            for alarm in alarms:
                alarm.look()


_WATCH = _Watch()


def _cpu_clock() -> int | None:
    """The clock that counts this thread's time on the processor; None where the system has none."""
    try:
        return time.pthread_getcpuclockid(threading.get_ident())
    except (AttributeError, OSError):
        return None

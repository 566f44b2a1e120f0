"""Signals of this process, as a vCPU that runs in the main thread must see them.

KVM_RUN returns EINTR when a signal arrives. Python delivers signals only between bytecodes of the main thread, which
sits in the emulated core then; but it writes a byte to the wake-up descriptor at once, in the C handler. A thread waits
for that byte and kicks the vCPU that the main thread runs. An application that has a wake-up descriptor of its own
(asyncio) keeps it: then the vCPU is interrupted in slices, so that Python's handlers run in time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FOREIGN_SLICE_SECONDS = 0.1

_main = threading.main_thread()


class _Watcher:
    """The thread that waits for the wake-up byte, and whom it kicks."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        for fd in (self.reader, self.writer):
            os.set_blocking(fd, False)
        self.pid = os.getpid()
        self.kick: Callable[[bool], None] | None = None
        self.foreign = False
        threading.Thread(target=self._watch, name="kvm2-signals", daemon=True).start()

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self.reader], [], [], FOREIGN_SLICE_SECONDS if self.foreign else None)
            if ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.reader, 4096)
            kick = self.kick
            if kick is not None and (ready or self.foreign):
                kick(bool(ready))

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self.writer, b"\0")


_watcher: _Watcher | None = None


def enter(kick: Callable[[bool], None]) -> bool:
    """From now on a signal calls `kick(True)`, and `kick(False)` only lets handlers run; True where `leave` is due.

    In any other thread than the main one it does nothing: Python gives signals to the main thread alone.
    """
    if threading.get_ident() != _main.ident:
        return False
    global _watcher
    watcher = _watcher
    if watcher is None or watcher.pid != os.getpid():
        watcher = _watcher = _Watcher()
    watcher.kick = kick
    previous = signal.set_wakeup_fd(watcher.writer, warn_on_full_buffer=False)
    if previous not in (-1, watcher.writer):
        signal.set_wakeup_fd(previous)
        watcher.foreign = True
        watcher.wake()
    return True


def leave() -> None:
    """The vCPU of the main thread is out of KVM_RUN."""
    watcher = _watcher
    if watcher is None:
        return
    watcher.kick = None
    if watcher.foreign:
        watcher.foreign = False
    else:
        signal.set_wakeup_fd(-1)

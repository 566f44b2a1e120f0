"""Signals of this process, as a vCPU that runs in the main thread must see them.

KVM_RUN returns EINTR when a signal arrives. Python delivers signals only between bytecodes of the main thread, which
sits in the emulated core then; but it writes a byte to the wake-up descriptor at once, in the C handler. A thread waits
for that byte and kicks the vCPU that the main thread runs. An application that has a wake-up descriptor of its own
(asyncio) keeps it: the vCPU is interrupted now and then anyway, so that Python's handlers run in time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from typing import TYPE_CHECKING

from kvm2.softkvm import process

if TYPE_CHECKING:
    from collections.abc import Callable

# Without a byte (the application has a wake-up descriptor of its own) handlers run at least this often.
POLL_SECONDS = 0.25
# The descriptor is looked at again every so many entries: to ask costs as much as to set it.
CHECK_MASK = 0x3F

_main = threading.main_thread()


class _Watcher:
    """The thread that waits for the wake-up byte, and whom it kicks."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        for fd in (self.reader, self.writer):
            os.set_blocking(fd, False)
        self.birth = process.birth
        self.kick: Callable[[bool], None] | None = None
        self.entries = 0
        threading.Thread(target=self._watch, name="kvm2-signals", daemon=True).start()

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self.reader], [], [], POLL_SECONDS)
            if ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.reader, 4096)
            kick = self.kick
            if kick is not None:
                kick(bool(ready))

    def install(self) -> None:
        """Makes our pipe the wake-up descriptor, unless the application has one."""
        previous = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        if previous not in (-1, self.writer):
            signal.set_wakeup_fd(previous)


_watcher: _Watcher | None = None


def enter(kick: Callable[[bool], None]) -> bool:
    """From now on a signal calls `kick(True)`, and `kick(False)` only lets handlers run; True where `leave` is due.

    In any other thread than the main one it does nothing: Python gives signals to the main thread alone.
    """
    if threading.get_ident() != _main.ident:
        return False
    global _watcher
    watcher = _watcher
    if watcher is None or watcher.birth is not process.birth:
        watcher = _watcher = _Watcher()
    watcher.kick = kick
    if not watcher.entries & CHECK_MASK:
        watcher.install()
    watcher.entries += 1
    return True


def leave() -> None:
    """The vCPU of the main thread is out of KVM_RUN."""
    if _watcher is not None:
        _watcher.kick = None

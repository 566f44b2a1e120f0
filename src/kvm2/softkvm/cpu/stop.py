"""Stopping a running core from any thread, so that no stop is lost and no instruction runs twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# A request that arrives while the emulator is just being entered is overwritten there; it is sent again this often.
_RESEND_SECONDS, _LONGEST_RESEND_SECONDS = 20e-6, 1e-3


class StopGate:
    """Whether a core is inside the emulator, and who wants it out.

    The interpreter lock orders the accesses: `stop` sets `wanted` and then looks at `running`, `enter` sets `running`
    and then looks at `wanted`, so at least one of the two sees the other.
    """

    __slots__ = ("_request", "_sending", "_thread", "in_hook", "running", "wanted")

    def __init__(self, request: Callable[[], None]) -> None:
        self._request = request  # writes the emulator's stop flags
        self._sending = threading.Lock()
        self._thread = 0
        self.wanted = False
        self.running = False
        # Inside a callback the emulator has certainly been entered: one request is enough, and waiting could deadlock.
        self.in_hook = False

    def enter(self) -> bool:
        """False: a stop is pending, it is used up and the emulator must not be entered.

        The core clears `running` itself when it is outside again.
        """
        self._thread = threading.get_ident()
        self.running = True
        if self.wanted:
            self.wanted = self.running = False
            return False
        return True

    def take(self) -> bool:
        """After the emulator returned: whether a stop was asked for; it is used up."""
        if self.wanted:
            self.wanted = False
            return True
        return False

    def close(self) -> None:
        """The core is about to be freed: wait for a request that is being written."""
        with self._sending:
            self.running = False

    def stop(self) -> None:
        """Ask for a stop; returns when the core is out, is in a callback that it will leave, or was not running."""
        self.wanted = True
        pause = _RESEND_SECONDS
        while self.running and self.wanted:
            in_hook = self.in_hook
            with self._sending:
                if self.running:
                    self._request()
            if in_hook or self._thread == threading.get_ident():
                return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_RESEND_SECONDS)  # the core's thread may be waiting for a CPU

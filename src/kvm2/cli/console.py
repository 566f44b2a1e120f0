"""The guest's console on this process's terminal: its output, and what is typed or piped in."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import tty
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

QUIET_SECONDS = 1.0
ESCAPE = 0x01  # Ctrl-a
CHUNK = 1024
# A pipe is read no further while the guest has this much to read, so that a long script is not held in memory.
ROOM = 4096
ROOM_SECONDS = 0.05
HELP = (
    "Ctrl-a x       leave: the guest stops where it is",
    "Ctrl-a Ctrl-a  send Ctrl-a to the guest",
    "Ctrl-a s       write a snapshot to the file of --save",
    "Ctrl-a h       this",
)
_DEADLY = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Console:
    """The guest's output on stdout: a line at a time, or each byte where somebody looks at a terminal.

    With `as_it_is` nothing is added at its end.
    """

    def __init__(self, live: bool, *, status: bool = True, as_it_is: bool = False) -> None:
        self._out = sys.stdout.buffer if live else None
        self._line = bytearray()
        self._lock = threading.Lock()  # vCPUs put, the main thread ticks
        self._each = live and sys.stdout.isatty()
        self._status = status and sys.stderr.isatty()
        self._shown = self._silent_since_tick = False
        self._column = 0
        self._as_it_is = as_it_is

    def put(self, byte: int) -> None:
        """One byte of the guest's."""
        self._silent_since_tick = False
        if self._out is None:
            return
        with self._lock:
            self._line.append(byte)
            if self._each or byte == 10 or len(self._line) > 4096:
                self._flush()

    def flush(self) -> None:
        """Everything so far."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._out is not None and self._line:
            self._wipe()
            self._column = 0 if self._line.endswith(b"\n") else 1
            self._out.write(self._line)
            self._out.flush()
            self._line.clear()

    def tick(self, seconds: float, exits: int) -> None:
        """A guest that says nothing: how long it runs and how many exits it made, on stderr."""
        self.flush()
        if self._status and seconds > QUIET_SECONDS and self._silent_since_tick and not self._column:
            self._shown = True
            print(f"\r\x1b[Krunning {seconds:.0f} s, {exits} exits (Ctrl-C stops)", end="", file=sys.stderr, flush=True)
        self._silent_since_tick = True

    def _wipe(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False

    def close(self) -> None:
        """The end of the guest's output, on a line of its own."""
        self.flush()
        self._wipe()
        if self._out is not None and self._column and not self._as_it_is:
            self._out.write(b"\n")
            self._out.flush()
            self._column = 0


class Escapes:
    """What is typed, without the keys that are meant for kvm2: those after Ctrl-a.

    >>> keys = Escapes({ord("x"): lambda: print("leave")})
    >>> keys.typed(b"ls" + bytes([1])), keys.typed(b"xa"), keys.typed(bytes([1, 1]))
    leave
    (b'ls', b'a', b'\\x01')
    """

    def __init__(self, actions: Mapping[int, Callable[[], object]]) -> None:
        self._actions = actions
        self._escaped = False

    def typed(self, data: bytes) -> bytes:
        """The bytes for the guest. Another key after Ctrl-a is dropped."""
        out = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in (ESCAPE, ord("a")):
                    out.append(ESCAPE)
                elif byte in self._actions:
                    self._actions[byte]()
            elif byte == ESCAPE:
                self._escaped = True
            else:
                out.append(byte)
        return bytes(out)


class RawTerminal:
    """A terminal in raw mode inside a `with` block: every key is the guest's. It is always put back.

    Also when the process ends by a signal, and while it is stopped; only the main thread hears of signals.
    """

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        self._before: list[Any] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._fd)
        if threading.current_thread() is threading.main_thread():
            for number in _DEADLY:
                self._handlers[number] = signal.signal(number, self._die)
            self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._stop)
        self._raw()
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _raw(self) -> None:
        tty.setraw(self._fd, termios.TCSADRAIN)

    def _restore(self) -> None:
        with contextlib.suppress(termios.error):  # a terminal that is gone needs nothing
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def _die(self, number: int, frame: object) -> None:
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _stop(self, number: int, frame: object) -> None:
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # goes on below when somebody continues this process
        signal.signal(number, self._stop)
        self._raw()


class Input:
    """A thread that gives what comes from a descriptor to the guest, inside a `with` block.

    `feed` takes it; where a pipe is read, `waiting` says how much the guest has not read yet. The end of the input is
    not the end of the guest.
    """

    def __init__(
        self,
        descriptor: int,
        feed: Callable[[bytes], object],
        waiting: Callable[[], int],
        escapes: Escapes | None = None,
        start: threading.Event | None = None,
    ) -> None:
        self._fd, self._feed, self._waiting, self._escapes = descriptor, feed, waiting, escapes
        self._start = start
        self._closed = threading.Event()
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._loop, name="console input", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        os.write(self._waker, b"\0")
        self._thread.join()
        os.close(self._wake)
        os.close(self._waker)

    def _loop(self) -> None:
        while self._start is not None and not self._start.wait(ROOM_SECONDS):
            if self._closed.is_set():
                return
        while not self._closed.is_set():
            if self._escapes is None and self._waiting() >= ROOM:
                self._closed.wait(ROOM_SECONDS)
                continue
            ready, _, _ = select.select([self._fd, self._wake], [], [])
            if self._wake in ready:
                return
            try:
                data = os.read(self._fd, CHUNK)
            except OSError:  # a terminal that has gone, or is another job's
                return
            if not data:
                return
            self._feed(self._escapes.typed(data) if self._escapes is not None else data)


def input_descriptor() -> int | None:
    """Standard input, where this process was started with one. Later its number may be another file's."""
    return None if sys.__stdin__ is None else 0

"""A gdb stub for any board with arm64 vCPUs: `serve(machine, 1234)`, then `target remote :1234` in gdb-multiarch.

The vCPUs are gdb's threads 1, 2, ... and stop together. The guest does not start before gdb says `continue`, unless
`wait` is False. One gdb at a time; when it goes, the guest runs on without breakpoints.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvm2.board.gdb_session import Session
from kvm2.board.gdb_target import Target
from kvm2.board.gdb_wire import Wire
from kvm2.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from kvm2.board.loop import Board

LOCALHOST: Final = "127.0.0.1"
UNIX: Final = "unix:"
ACCEPT_SECONDS: Final = 0.2
LAST_WORD_SECONDS: Final = 1.0


class GdbServer:
    """The listening side. `address` is what gdb's `target remote` takes."""

    def __init__(self, board: Board, where: int | str, wait: bool) -> None:
        self._board = board
        self._path: Path | None = None
        self._connection: socket.socket | None = None
        self._listener, self.address = self._listen(where)
        self._target = Target(board)
        self._closing = threading.Event()
        board.debugger = self._target
        if wait:
            board.pause(self._target)
        self._thread = threading.Thread(target=self._serve, name="gdb", daemon=True)
        self._thread.start()

    def _listen(self, where: int | str) -> tuple[socket.socket, str]:
        unix = isinstance(where, str) and where.startswith(UNIX)
        family = socket.AF_UNIX if unix else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            if unix:
                self._path = Path(str(where)[len(UNIX) :])
                listener.bind(str(self._path))
                address = str(self._path)
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((LOCALHOST, int(where)))
                address = f"{LOCALHOST}:{listener.getsockname()[1]}"
            listener.listen(1)
        except (OSError, OverflowError, ValueError) as error:
            listener.close()
            raise EnvironmentFault(
                f"gdb cannot be served at {where}: {error}; give a port of this machine that is free, or unix:PATH"
            ) from None
        listener.settimeout(ACCEPT_SECONDS)
        return listener, address

    def _serve(self) -> None:
        while not self._closing.is_set() and not self._target.over:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            with connection:
                if connection.family == socket.AF_INET:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connection = connection
                connection.settimeout(None)
                Session(self._target, Wire(connection)).run()

    def close(self) -> None:
        """No gdb is served any more; the guest goes on where it was stopped."""
        self._closing.set()
        self._listener.close()
        if self._target.over:
            self._thread.join(LAST_WORD_SECONDS)  # gdb is being told of the end
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._board.debugger = None
        self._board.resume(self._target)
        self._target.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> GdbServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve(board: Board, where: int | str, *, wait: bool = True) -> GdbServer:
    """Serve gdb at a TCP port of this machine (0: any free one) or at "unix:PATH"; close what is returned after `run`.

    With `wait` the guest stands still until gdb lets it go. UsageError on another architecture than arm64,
    EnvironmentFault where nothing can listen there.
    """
    if board.kvm.arch != "arm64":
        raise UsageError(f"the gdb stub knows arm64 guests, not {board.kvm.arch}")
    if isinstance(where, str) and where.startswith(UNIX) and os.path.lexists(where[len(UNIX) :]):
        raise EnvironmentFault(f"gdb cannot be served at {where}: the file is there already; remove it or take another")
    return GdbServer(board, where, wait)

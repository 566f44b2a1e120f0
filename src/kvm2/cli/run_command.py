"""The output of one command in a Linux guest, out of what its console says, and the command's status."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvm2.cli.console import Console

MARK = 0x1E  # RECORD SEPARATOR, as in lab.linux.initramfs


class CommandOutput:
    r"""Gets each byte of the guest's console; the command's own go to `console`.

    The first process of the guest writes MARK token MARK before the command, and MARK token SPACE status MARK after it.
    `token` is random, so that no output looks like it. `status` is None until the command has ended.

    >>> output = CommandOutput(None, "t")
    >>> for byte in b"boot \x1et\x1ehel\x1elo\x1et 3\x1eReboot": output.put(byte)
    >>> bytes(output.said), output.status
    (b'hel\x1elo', 3)
    """

    def __init__(self, console: Console | None, token: str = "") -> None:
        self.console: Console = console  # type: ignore[assignment]
        self.token = token or secrets.token_hex(8)
        self.status: int | None = None
        self.said = bytearray()
        self._begin = bytes([MARK]) + self.token.encode() + bytes([MARK])
        self._end = bytes([MARK]) + self.token.encode() + b" "
        self._held = bytearray()  # what may become a mark
        self._running = False

    def put(self, byte: int) -> None:
        """One byte of the console."""
        if self.status is not None:
            return
        if not self._running:
            self._before(byte)
        elif self._held or byte == MARK:
            self._maybe_end(byte)
        else:
            self._out(byte)

    def _before(self, byte: int) -> None:
        self._held.append(byte)
        del self._held[: -len(self._begin)]
        if self._held == self._begin:
            self._running = True
            self._held.clear()

    def _maybe_end(self, byte: int) -> None:
        held = self._held
        held.append(byte)
        rest = held[len(self._end) :]
        if held.startswith(self._end) and (found := re.fullmatch(rb"(\d{1,3})\x1e", rest)):
            self.status = int(found[1])
        elif not self._end.startswith(held) and not (held.startswith(self._end) and re.fullmatch(rb"\d{0,3}", rest)):
            again = held[1:]
            self._held = bytearray()
            self._out(held[0])
            for other in again:
                self.put(other)

    def _out(self, byte: int) -> None:
        self.said.append(byte)
        if self.console is not None:
            self.console.put(byte)

    def unmarked(self, console: bytes) -> bytes:
        """All that the guest said, without the mark before the command's output."""
        return console.replace(self._begin, b"")

    def as_dict(self, words: tuple[str, ...]) -> dict[str, Any]:
        """For --json."""
        return {"words": list(words), "status": self.status, "output": self.said.decode("utf-8", "replace")}

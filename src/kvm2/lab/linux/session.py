"""A conversation with a shell in a Linux guest: start, wait, send, commands with their output and status."""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING, Any

from kvm2.board.kernel_image import read_kernel
from kvm2.board.linux import LinuxMachine
from kvm2.errors import EnvironmentFault, GuestError, UsageError
from kvm2.lab.linux.initramfs import MARK, PROMPT, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    from kvm2.board.loop import RunResult
    from kvm2.kvm import Kvm
    from kvm2.lab.linux.files import LinuxFiles
    from kvm2.spec import VmSpec

APPEND = "console=ttyAMA0 quiet"
SECONDS = 120.0  # patience, on a machine that is shared with others
CLOSE_SECONDS = 10.0
MOST_LINE = 4095  # of a terminal that edits lines: N_TTY_BUF_SIZE - 1
_STATUS_PROMPT = MARK + "$?" + MARK
_ENDED_PROMPT = re.compile((MARK + r"(\d+)" + MARK).encode())
_POLL_SECONDS = 0.05


class Session:
    """A LinuxMachine that runs in a thread, with the initramfs of `linux_files`, and its console.

    Made running; ends with `close` (a `with` block does it). `machine` is for whoever looks inside, `console` all that
    the guest has said, `result` how it ended (None while it runs).

    with kvm2.open("graviton3") as kvm, Session(kvm, linux_files(), VmSpec(physaddr_bits="auto", memory=RAM)) as linux:
        linux.wait_for_prompt()
        output, status = linux.command("uname -r")
    """

    def __init__(
        self,
        kvm: Kvm,
        files: LinuxFiles,
        spec: VmSpec,
        *,
        append: str = APPEND,
        variables: Mapping[str, str] | None = None,
        make: Callable[..., LinuxMachine] = LinuxMachine,
        **options: Any,
    ) -> None:
        self.console = bytearray()
        self.result: RunResult | None = None
        self._heard = threading.Condition()
        self._from = 0  # what came before was waited for already
        self._asks_status = False
        self._error: BaseException | None = None
        self.machine = make(kvm, spec, sink=self._hear, **options)
        try:
            initrd = files.initrd.read_bytes() + settings({"KVM2_PLAIN": "1", **(variables or {})})
            self.machine.load_linux(read_kernel(files.kernel), initrd, append)
        except BaseException:
            self.machine.close()
            raise
        self._thread = threading.Thread(target=self._run, name="linux", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self.machine.run()
        except BaseException as error:  # to be raised where somebody waits
            self._error = error
        with self._heard:
            self._heard.notify_all()

    def _hear(self, byte: int) -> None:
        with self._heard:
            self.console.append(byte)
            self._heard.notify_all()

    # -- waiting

    @property
    def running(self) -> bool:
        """Whether the guest has not ended."""
        return self.result is None and self._error is None

    def wait_for(self, what: str | re.Pattern[bytes], timeout: float = SECONDS) -> str:
        """Wait until the guest has said `what` (a text or a pattern): what it said since the last wait, up to there.

        GuestError with its last words where it ends before that or takes longer than `timeout` seconds.
        """
        pattern = what if isinstance(what, re.Pattern) else re.compile(re.escape(what.encode()))
        return self._wait(pattern, timeout)[0].decode(errors="replace")

    def wait_for_prompt(self, timeout: float = SECONDS) -> str:
        """Wait until the shell is there for the first time: what was said before."""
        return self.wait_for(PROMPT, timeout)

    def wait_for_end(self, timeout: float = SECONDS) -> RunResult:
        """Wait until the guest has ended: how. GuestError where it does not."""
        deadline = time.monotonic() + timeout
        with self._heard:
            while self.running and time.monotonic() < deadline:
                self._heard.wait(_POLL_SECONDS)
        if self._error is not None:
            raise self._error
        if self.result is None:
            raise self._trouble(f"still running after {timeout:g} s")
        return self.result

    def _wait(self, pattern: re.Pattern[bytes], timeout: float) -> tuple[bytes, re.Match[bytes]]:
        deadline = time.monotonic() + timeout
        with self._heard:
            while True:
                said = bytes(self.console[self._from :])
                found = pattern.search(said)
                if found is not None:
                    self._from += found.end()
                    return said[: found.end()], found
                if self._error is not None:
                    raise self._error
                if not self.running:
                    raise self._trouble(f"ended ({self.result.ended if self.result else 'nobody knows how'})")
                if time.monotonic() >= deadline:
                    raise self._trouble(f"said nothing like {pattern.pattern!r} for {timeout:g} s")
                self._heard.wait(_POLL_SECONDS if timeout < 1 else 1.0)

    def _trouble(self, what: str) -> GuestError:
        lines = bytes(self.console[-2000:]).decode(errors="replace").replace("\r", "").splitlines()
        return GuestError("\n  ".join([f"the guest {what}; its last words:", *lines[-12:]]))

    # -- speaking

    def send(self, text: str | bytes) -> None:
        """Type something; nothing is added."""
        self.machine.feed(text.encode() if isinstance(text, str) else text)

    def command(self, text: str, timeout: float = SECONDS) -> tuple[str, int]:
        """Run a line of the shell (its prompt must be there): what it wrote, with \\n as the end of lines, its status.

        Standard output and standard error come as one; what the guest said before is passed over. UsageError for text
        that a terminal's line does not hold, GuestError where the guest has ended.
        """
        if "\n" in text or len(text.encode()) >= MOST_LINE:
            raise UsageError(f"a command of {len(text)} characters: one line of less than {MOST_LINE} is allowed")
        if not self._asks_status:
            self._asks_status = True
            self.send(f"PS1='{_STATUS_PROMPT}'\n")
            self._wait(_ENDED_PROMPT, timeout)
        with self._heard:
            self._from = len(self.console)  # a prompt that nobody waited for is not this command's end
        self.send(text + "\n")
        said, found = self._wait(_ENDED_PROMPT, timeout)
        output = said[: len(said) - (found.end() - found.start())]
        return output.decode(errors="replace").replace("\r\n", "\n"), int(found[1])

    # -- ending

    def close(self) -> None:
        """End the guest as it is, without its leave, and give everything back."""
        if self.running:
            self.machine.finish("interrupted", "closed", 0)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            raise EnvironmentFault(f"the guest's vCPUs did not stop within {CLOSE_SECONDS:g} s")
        self.machine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

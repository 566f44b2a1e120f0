"""The conversation, with a machine that is played."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvm2.board.loop import RunResult
from kvm2.errors import GuestError, UsageError
from kvm2.lab.linux import LinuxFiles, Session, session
from kvm2.lab.linux.initramfs import MARK
from kvm2.spec import VmSpec


class Shell:
    """A LinuxMachine with a shell that knows `say TEXT`, `end TEXT`, `silent`, and to set its prompt."""

    def __init__(self, kvm: Any, spec: VmSpec, *, sink: Callable[[int], object], trouble: str = "") -> None:
        self.sink, self.trouble = sink, trouble
        self.typed = b""
        self.closed = False
        self.ended: str | None = None
        self.prompt = b"kvm2:/# "
        self.over = threading.Event()

    def load_linux(self, kernel: object, initrd: bytes, append: str) -> None:
        self.initrd, self.append = initrd, append

    def say(self, data: bytes) -> None:
        for byte in data:
            self.sink(byte)

    def run(self) -> RunResult:
        if self.trouble == "raises":
            raise ZeroDivisionError
        self.say(b"booting\r\n")
        if self.trouble == "ends":
            self.finish("crash", "", 0)
        self.say(self.prompt)
        assert self.over.wait(20)
        return RunResult(self.ended or "?", 0.1, {}, b"")

    def feed(self, data: bytes) -> None:
        self.typed += data
        while b"\n" in self.typed:
            line, _, self.typed = self.typed.partition(b"\n")
            word, _, rest = line.partition(b" ")
            if line.startswith(b"PS1="):
                self.prompt = MARK.encode() + b"0" + MARK.encode()
            elif word == b"say":
                self.say(rest + b"\r\n")
            elif word == b"fail":
                self.prompt = MARK.encode() + b"42" + MARK.encode()
            if word == b"end":
                return self.finish("shutdown", "", 0)
            if word != b"silent":
                self.say(self.prompt)
        return None

    def finish(self, ended: str, reason: str, vcpu: int) -> None:
        self.ended = self.ended or ended
        self.over.set()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LinuxFiles:
    monkeypatch.setattr(session, "read_kernel", lambda path: path.read_bytes())
    for name in ("vmlinuz", "initrd"):
        (tmp_path / name).write_bytes(name.encode())
    return LinuxFiles("6.12-4k", tmp_path / "vmlinuz", tmp_path / "initrd", "6.12", 4096)


def open_session(files: LinuxFiles, **options: Any) -> Session:
    return Session(None, files, VmSpec(), make=Shell, **options)  # type: ignore[arg-type]


def test_a_conversation(files: LinuxFiles) -> None:
    with open_session(files, append="words", variables={"A": "b c"}) as linux:
        shell: Any = linux.machine
        assert linux.wait_for_prompt() == "booting\r\nkvm2:/# "
        assert linux.command("say hello") == ("hello\n", 0)
        assert linux.command("fail") == ("", 42)
        assert linux.command("say \udc80".encode("utf-8", "surrogateescape").decode("latin-1"))[1] == 42
        linux.send("say one\n")
        assert linux.wait_for(re.compile(rb"on.")) == "one"
        linux.send(b"end\n")
        assert linux.wait_for_end().ended == "shutdown" and not linux.running
    assert shell.closed and shell.append == "words"
    assert shell.initrd.startswith(b"initrd070701") and b"KVM2_PLAIN=1\nA='b c'\n" in shell.initrd


def test_a_prompt_of_an_earlier_line_ends_no_command(files: LinuxFiles) -> None:
    with open_session(files) as linux:
        assert linux.command("fail") == ("", 42)
        linux.send("say stale\n")
        linux.send("end\n")
        linux.wait_for_end()
        with pytest.raises(GuestError, match=r"ended \(shutdown\)"):
            linux.command("silent")


def test_what_does_not_come_is_said_with_the_last_words(files: LinuxFiles) -> None:
    with open_session(files) as linux:
        with pytest.raises(GuestError, match=r"said nothing like b'login' for 0.1 s; its last words:\n  booting"):
            linux.wait_for("login", 0.1)
        with pytest.raises(GuestError, match=r"still running after 0\.1 s"):
            linux.wait_for_end(0.1)
        with pytest.raises(GuestError, match="said nothing like"):
            linux.command("silent", 0.1)
        for text in ("a\nb", "x" * 5000):
            with pytest.raises(UsageError, match="one line of less than 4095"):
                linux.command(text)
        machine: Any = linux.machine
    assert machine.closed and machine.ended == "interrupted"


def test_a_guest_that_ends_while_somebody_waits(files: LinuxFiles) -> None:
    with open_session(files, trouble="ends") as linux, pytest.raises(GuestError, match=r"ended \(crash\)"):
        linux.wait_for("login")


def test_a_defect_is_raised_where_somebody_waits(files: LinuxFiles) -> None:
    with open_session(files, trouble="raises") as linux:
        with pytest.raises(ZeroDivisionError):
            linux.wait_for_prompt()
        with pytest.raises(ZeroDivisionError):
            linux.wait_for_end()


def test_a_kernel_that_cannot_be_loaded_leaves_nothing_behind(
    files: LinuxFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Shell] = []

    def make(*args: Any, **options: Any) -> Shell:
        made.append(Shell(*args, **options))
        return made[0]

    monkeypatch.setattr(Shell, "load_linux", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Session(None, files, VmSpec(), make=make)  # type: ignore[arg-type]
    assert made[0].closed

"""The console of `kvm2 run`: output from vCPU threads, keys that are meant for kvm2, terminals that are put back."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest

from kvm2.cli.console import ROOM, Console, Escapes, Input, RawTerminal
from kvm2.cli.run_command import CommandOutput


class SlowOutput:
    """A terminal that takes its time over each line, and holds on to it meanwhile, as a pipe that is full does."""

    def __init__(self):
        self.got = bytearray()

    def write(self, data):
        with memoryview(data) as held:
            time.sleep(0.0005)
            self.got += held

    def flush(self):
        pass


def test_putting_and_ticking_at_once_loses_nothing(monkeypatch):
    output = SlowOutput()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=output, isatty=lambda: False))
    console = Console(live=True)
    text = b"".join(b"line %d\n" % number for number in range(150))
    errors = []

    def guest():
        try:
            for byte in text:
                console.put(byte)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guest)
    thread.start()
    while thread.is_alive():
        console.tick(0.0, 0)
    console.close()
    assert not errors
    assert bytes(output.got) == text


def test_a_prompt_without_an_end_of_line_is_shown_at_the_next_tick_and_ended_at_the_end(monkeypatch):
    output = SlowOutput()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=output, isatty=lambda: False))
    console = Console(live=True)
    for byte in b"a\n# ":
        console.put(byte)
    assert output.got == b"a\n"
    console.tick(0.0, 0)
    assert output.got == b"a\n# "
    console.close()
    console.close()
    assert output.got == b"a\n# \n"


# -- keys


@pytest.mark.parametrize(
    ("typed", "guest", "done"),
    [
        (b"ls\r", b"ls\r", ""),
        (b"\x01x", b"", "x"),
        (b"a\x01hb", b"ab", "h"),
        (b"\x01\x01", b"\x01", ""),
        (b"\x01a", b"\x01", ""),
        (b"\x01\x01x", b"\x01x", ""),
        (b"\x01z", b"", ""),  # no such key: dropped, and the next is an ordinary one
        (b"\x01zx", b"x", ""),
        (b"\x03\x1a\xff\x00", b"\x03\x1a\xff\x00", ""),
        (b"\x01x\x01h", b"", "xh"),
    ],
)
def test_keys_after_ctrl_a_in_any_portions(typed, guest, done):
    for size in (1, 2, len(typed)):
        did = []
        keys = Escapes({ord(key): lambda key=key, did=did: did.append(key) for key in "xh"})
        got = b"".join(keys.typed(typed[at : at + size]) for at in range(0, len(typed), size))
        assert (got, "".join(did)) == (guest, done)


# -- terminals


@pytest.fixture
def terminal():
    """(the user's end, the program's end) of a terminal that echoes and waits for lines."""
    outer, inner = pty.openpty()
    yield outer, inner
    for end in (outer, inner):
        with contextlib.suppress(OSError):
            os.close(end)


def flags(descriptor):
    _, out, _, local, *_ = termios.tcgetattr(descriptor)
    return (
        bool(local & termios.ICANON),
        bool(local & termios.ECHO),
        bool(local & termios.ISIG),
        bool(out & termios.OPOST),
    )


def test_a_terminal_is_raw_inside_and_as_before_afterwards(terminal):
    _, inner = terminal
    before = termios.tcgetattr(inner)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)]
    with RawTerminal(inner):
        assert flags(inner) == (False, False, False, False)
        assert signal.getsignal(signal.SIGTERM) != handlers[0]
    assert termios.tcgetattr(inner) == before
    with pytest.raises(ZeroDivisionError), RawTerminal(inner):
        raise ZeroDivisionError
    assert termios.tcgetattr(inner) == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)] == handlers


def test_a_terminal_that_has_gone_is_no_error(terminal):
    _, inner = terminal
    with RawTerminal(inner):
        os.close(inner)


HOLDER = """
import sys, time
from kvm2.cli.console import RawTerminal
with RawTerminal(0):
    print("raw", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(terminal):
    """A process that holds a terminal raw."""
    _, inner = terminal
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=inner, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"raw\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_terminal_is_put_back_by_who_dies_of_a_signal(terminal, holder, number):
    _, inner = terminal
    assert flags(inner)[0] is False
    holder.send_signal(number)
    assert holder.wait(20) == -number or number == signal.SIGINT
    assert flags(inner) == (True, True, True, True)


def test_a_terminal_is_put_back_while_its_process_is_stopped(terminal, holder):
    _, inner = terminal
    holder.send_signal(signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(holder.pid, os.WUNTRACED)[1])
    assert flags(inner) == (True, True, True, True)
    holder.send_signal(signal.SIGCONT)
    until(lambda: flags(inner) == (False, False, False, False))
    holder.send_signal(signal.SIGTSTP)  # and once more
    assert os.WIFSTOPPED(os.waitpid(holder.pid, os.WUNTRACED)[1])
    assert flags(inner)[0] is True


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- input


def test_input_is_read_no_further_than_the_guest_reads():
    ours, theirs = os.pipe()
    taken, waiting = bytearray(), [ROOM]
    os.write(theirs, b"x" * 3000)
    with Input(ours, taken.extend, lambda: waiting[0]):
        time.sleep(0.2)
        assert not taken, "the guest has enough to read"
        waiting[0] = 0
        until(lambda: len(taken) == 3000)
        os.close(theirs)  # the end of the input is the guest's business no more
        time.sleep(0.05)
    os.close(ours)


def test_input_waits_for_its_start_and_ends_without_it():
    ours, theirs = os.pipe()
    taken, start = bytearray(), threading.Event()
    os.write(theirs, b"first")
    with Input(ours, taken.extend, lambda: 0, start=start):
        time.sleep(0.1)
        assert not taken
        start.set()
        until(lambda: taken == b"first")
    with Input(ours, taken.extend, lambda: 0, start=threading.Event()):
        pass
    with Input(ours, taken.extend, lambda: 0):
        assert not select.select([ours], [], [], 0)[0]  # ends though nothing comes
    os.close(ours)
    os.close(theirs)


def test_what_is_typed_is_never_held_back():
    ours, theirs = os.pipe()
    taken, did = bytearray(), threading.Event()
    with Input(ours, taken.extend, lambda: 10 * ROOM, Escapes({ord("x"): did.set})):
        os.write(theirs, b"ab\x01x")
        assert did.wait(20)
        until(lambda: taken == b"ab")
    os.close(ours)
    os.close(theirs)


def test_no_standard_input_at_all():
    script = "import os; from kvm2.cli.console import input_descriptor; os.open('/', 0); print(input_descriptor())"
    command = [sys.executable, "-c", script]
    for close, said in ((lambda: os.close(0), "None\n"), (lambda: None, "0\n")):
        assert subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=close).stdout == said


@pytest.mark.parametrize(("as_it_is", "end"), [(False, b"\n"), (True, b"")])
def test_a_commands_output_gets_no_end_of_line(monkeypatch, as_it_is, end):
    out = SlowOutput()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out, isatty=lambda: False))
    console = Console(live=True, as_it_is=as_it_is)
    for byte in b"no line":
        console.put(byte)
    console.close()
    assert bytes(out.got) == b"no line" + end


def test_last_words_are_without_the_mark():
    assert CommandOutput(None, "token").unmarked(b"boot\n\x1etoken\x1ehello") == b"boot\nhello"

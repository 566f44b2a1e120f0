"""The agent and the link to it, without a machine between them: the agent runs here as an ordinary process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvm2.lab.oracle.initramfs import application
from kvm2.lab.oracle.inside import PYTHON
from kvm2.lab.oracle.link import Finished, Gone, Link

AGENT = """
import os, sys
from kvm2.lab.oracle import agent
agent.APPLICATION = sys.argv[2]
agent.Agent(agent.Port(int(sys.argv[1]))).serve()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the agent is for Linux")


class Talk:
    """A link, and what came over it."""

    def __init__(self, link: Link, process: subprocess.Popen[bytes]) -> None:
        self.link, self.process = link, process
        self.out, self.err = bytearray(), bytearray()

    def run(self, code: str, *args: str, stdin: int | None = None, **more: object) -> Finished:
        self.out.clear()
        self.err.clear()
        get: Sequence[str] = more.get("get", ())  # type: ignore[assignment]
        self.link.start(PYTHON, ["python", "-c", code, *args], {"GREETING": "hello"}, more.get("files", {}), get)  # type: ignore[arg-type]
        return self.link.follow(stdin, self.out.extend, self.err.extend)


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    here, there = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(there.fileno()), str(tmp_path / "app")],
        pass_fds=[there.fileno()],
        cwd=tmp_path,
    )
    there.close()
    try:
        yield Talk(Link(here), process)
    finally:
        process.kill()
        process.wait()
        here.close()


def test_output_arguments_and_exit_codes(talk: Talk) -> None:
    code = "import os, sys; print(os.environ['GREETING'], *sys.argv[1:]); print('oh', file=sys.stderr); sys.exit(7)"
    assert talk.run(code, "a b", "c").code == 7
    assert (bytes(talk.out), bytes(talk.err)) == (b"hello a b c\n", b"oh\n")
    assert talk.run("pass").code == 0
    assert talk.run("import sys; sys.exit('text')").code == 1 and talk.err == b"text\n"
    assert talk.run("1 / 0").code == 1 and b"ZeroDivisionError" in talk.err
    assert talk.run("import os; os._exit(9)").code == 9
    assert talk.run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").code == -signal.SIGSEGV
    assert talk.run("import sys; sys.exit(300)").code == 300, "as it was said, not as the system cuts it"


def test_every_run_is_a_process_of_its_own(talk: Talk) -> None:
    talk.run("import builtins, os; builtins.left = 1; print(os.getpid())")
    first = bytes(talk.out)
    talk.run("import builtins, os; print(hasattr(builtins, 'left'), os.getpid())")
    assert talk.out.startswith(b"False") and not talk.out.endswith(first)


def test_files_in_and_out(talk: Talk) -> None:
    done = talk.run(
        "open('out', 'wb').write(open('d/in', 'rb').read()[::-1])", files={"d/in": b"\0abc"}, get=["out", "no"]
    )
    assert done == Finished(0, {"out": b"cba\0"})


def test_standard_input_is_passed_on_to_its_end(talk: Talk) -> None:
    data = os.urandom(1 << 20)
    read, write = os.pipe()

    def feed() -> None:
        with os.fdopen(write, "wb") as file:
            file.write(data)

    threading.Thread(target=feed).start()
    # As much comes back as goes in, so that neither side may wait for the other.
    done = talk.run("import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)", stdin=read)
    os.close(read)
    assert done.code == 0 and bytes(talk.out) == data


def test_nothing_to_read(talk: Talk) -> None:
    assert talk.run("import sys; print(repr(sys.stdin.read()))").code == 0
    assert talk.out == b"''\n"


def test_an_interrupt_reaches_the_process(talk: Talk) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    talk.link.start(PYTHON, ["python", "-c", code], {}, {}, [])

    def interrupt(data: bytes) -> None:
        talk.link.send(b"S", b"%d" % signal.SIGINT)

    assert talk.link.follow(None, interrupt, talk.err.extend).code == 130


def test_what_a_process_leaves_running_is_ended(talk: Talk) -> None:
    talk.run("import os, time\npid = os.fork()\nif pid == 0: time.sleep(600)\nprint(pid)")
    left = Path("/proc", str(int(talk.out)), "stat")
    talk.run("pass")  # the agent cleans up before it takes the next request
    # Its own parent is gone: whether anybody has waited for it is not the agent's business here.
    assert not left.exists() or left.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_loading_an_application(talk: Talk) -> None:
    sources = [
        ("thing/__init__.py", b"VALUE = 5\n"),
        ("thing/lacks.py", b"import unicorn_of_the_test\n"),
        ("thing/wrong.py", b"import another_that_lacks\n"),
        ("thing/broken.py", b"1 / 0\n"),
        ("thing/data.txt", b"text"),
    ]
    archive = zlib.compress(application(sources))
    modules = ["thing", "thing.lacks", "thing.wrong", "thing.broken"]
    done = talk.link.ask({"do": "load", "modules": modules, "missing": ["unicorn_of_the_test"]}, archive)
    assert done["left_out"] == ["thing.lacks", "thing.wrong"]
    assert set(done["failed"]) == {"thing.wrong", "thing.broken"} and "ZeroDivision" in done["failed"]["thing.broken"]
    code = "import thing, pathlib; print(thing.VALUE, pathlib.Path(thing.__file__).with_name('data.txt').read_text())"
    talk.run(code)
    assert talk.out == b"5 text\n"


def test_a_request_that_makes_no_sense_is_answered(talk: Talk) -> None:
    assert "KeyError" in talk.link.ask({"do": "run"})["error"]
    assert talk.run("print(1)").code == 0


def test_the_end_of_the_agent_is_told(talk: Talk) -> None:
    talk.link.start(PYTHON, ["python", "-c", "import time; print('up', flush=True); time.sleep(60)"], {}, {}, [])
    with pytest.raises(Gone):
        talk.link.follow(None, lambda data: talk.process.kill(), talk.err.extend)


def test_nobody_reads_any_more(talk: Talk) -> None:
    read, write = os.pipe()
    talk.link.start(PYTHON, ["python", "-c", "import time; print('up', flush=True); time.sleep(60)"], {}, {}, [])
    with pytest.raises(BrokenPipeError):
        talk.link.follow(None, lambda data: os.close(read), talk.err.extend, reader=write)
    os.close(write)

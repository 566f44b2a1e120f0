"""Saved machines: made again when they are stale or damaged, shared by processes, and nothing left of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.oracle import machine as machines
from kvm2.lab.oracle.inside import PYTHON
from kvm2.lab.oracle.machine import Job, Machine, State, build, open_machine
from kvm2.lab.oracle.shapes import Shape
from kvm2.lab.packages import cache_directory

SLEEP = "import time; print('up', flush=True); time.sleep(300)"
EXEC = [sys.executable, "-m", "kvm2", "oracle", "exec", "--shape", "neoverse-n1-4k", "--"]


def gone(pid: int) -> bool:
    """Whether a process has ended, within a while."""
    for _ in range(600):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def child_of(pid: int) -> int:
    """The QEMU that a process has started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, name = (path / "stat").read_text(), (path / "comm").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid and name.startswith("qemu"):
            return int(path.name)
    raise AssertionError("it has no QEMU")


@pytest.fixture
def own_cache(built: Callable[[str], Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shape:
    """A cache of the test's own, which has the base state of a machine already, and a small application to load."""
    shape = built("neoverse-n1-4k")
    cache = cache_directory()
    new = tmp_path / "kvm2" / "oracle"
    (new / "machines" / shape.name).mkdir(parents=True)
    for name in ("lists", "packages", "packages.json"):
        (new / name).symlink_to(cache / name)
    base = next((cache / "machines" / shape.name).glob("base-*"))
    copy = new / "machines" / shape.name / base.name
    copy.mkdir()
    for path in base.iterdir():
        machines._copy_sparse(path, copy / path.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machines, "application_sources", lambda: [("small.py", b"VALUE = 1\n")])
    monkeypatch.setattr(machines, "warm_modules", lambda: ["small"])
    return shape


def value(machine: Machine) -> bytes:
    """What the small application inside holds."""
    out = bytearray()
    machine.run(Job("small:main", ["small"]), None, out.extend, out.extend)
    return bytes(out)


def test_stale_and_damaged_states_are_made_again(own_cache: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    place = cache_directory() / "machines" / own_cache.name
    source = b"def main():\n    print(%d)\n"
    monkeypatch.setattr(machines, "application_sources", lambda: [("small.py", source % 1)])
    with open_machine(own_cache, said.append) as machine:
        assert value(machine) == b"1\n"
    assert said == ["neoverse-n1-4k: loading kvm2"], "the base state was taken as it is"
    with open_machine(own_cache, said.append):
        assert len(said) == 1, "nothing to make"
    monkeypatch.setattr(machines, "application_sources", lambda: [("small.py", source % 2)])
    with open_machine(own_cache, said.append) as machine:
        assert value(machine) == b"2\n"
    assert len(said) == 2
    kinds = ["base", "lock", "warm", "warm"]
    assert sorted(path.name.split("-")[0] for path in place.iterdir()) == kinds
    monkeypatch.setattr(machines, "application_sources", lambda: [("small.py", source % 3)])
    state = build(own_cache, said.append)
    assert sorted(path.name.split("-")[0] for path in place.iterdir()) == kinds, "the oldest is gone"
    state.devices.write_bytes(state.devices.read_bytes()[:2000])
    with open_machine(own_cache, said.append) as machine:
        assert value(machine) == b"3\n"
    assert "built again" in said[3] and len(said) == 5


def test_machines_do_not_see_each_other(own_cache: Shape) -> None:
    write = Job("builtins:print", ["x"], files={"left": b"here"}, get=["left"])
    look = Job("builtins:print", ["x"], get=["left"])
    with open_machine(own_cache) as one, open_machine(own_cache) as two:
        assert one.run(write, None, len, len).files == {"left": b"here"}
        assert one.run(look, None, len, len).files == {"left": b"here"}
        assert two.run(look, None, len, len).files == {}
    with open_machine(own_cache) as three:
        assert three.run(look, None, len, len).files == {}


def test_one_process_builds_and_the_others_wait(own_cache: Shape) -> None:
    said: list[str] = []
    place = cache_directory() / "machines" / own_cache.name
    done: list[State] = []
    with machines._locked(place, said.append):
        thread = threading.Thread(target=lambda: done.append(build(own_cache, said.append)))
        thread.start()
        while not said:
            time.sleep(0.01)
        assert "another process" in said[0] and not done
    thread.join()
    assert done[0].directory.is_dir()


def test_a_build_that_fails_leaves_nothing(own_cache: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    place = cache_directory() / "machines" / own_cache.name
    before = sorted(path.name for path in place.iterdir())

    def fail(sources: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(machines.initramfs, "application", fail)
    with pytest.raises(KeyboardInterrupt):
        build(own_cache)
    assert sorted(path.name for path in place.iterdir()) == sorted({*before, "lock"})


def test_a_machine_that_dies_says_what_it_said_last(machine: Machine) -> None:
    # Process 1 ends: the kernel panics, and the machine with it.
    code = "import os, signal; print('bye', flush=True); open('/proc/sysrq-trigger', 'w').write('c')"
    with pytest.raises(EnvironmentFault, match=r"it ended while it ran python"):
        machine.run(Job(PYTHON, ["python", "-c", code]), None, len, len)
    assert gone(machine.pid)


def test_a_machine_that_is_killed(machine: Machine) -> None:
    with pytest.raises(EnvironmentFault, match="it ended while it ran"):
        machine.run(Job(PYTHON, ["python", "-c", SLEEP]), None, lambda data: os.kill(machine.pid, signal.SIGKILL), len)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_machine_outlives_its_process(built: Callable[[str], Shape], number: signal.Signals) -> None:
    built("neoverse-n1-4k")
    process = subprocess.Popen([*EXEC, "python", "-c", SLEEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    qemu = child_of(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert gone(qemu)


def test_nothing_reads_the_output_any_more(built: Callable[[str], Shape]) -> None:
    built("neoverse-n1-4k")
    process = subprocess.Popen([*EXEC, "python", "-c", SLEEP], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    qemu = child_of(process.pid)
    process.stdout.close()
    assert process.wait(60) == 0 and gone(qemu)


def test_exec_passes_everything_through(built: Callable[[str], Shape], tmp_path: Path) -> None:
    built("neoverse-n1-4k")
    (tmp_path / "in").write_bytes(b"\0\1")
    code = """if True:
        import sys
        open('o', 'wb').write(open('i', 'rb').read() + sys.stdin.buffer.read())
        print('e', file=sys.stderr)
        sys.exit(5)"""
    command = [
        *EXEC[:-1],
        "--put",
        f"{tmp_path / 'in'}=i",
        "--get",
        f"o={tmp_path / 'out'}",
        "--",
        "python",
        "-c",
        code,
    ]
    done = subprocess.run(command, input=b"\2", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (5, b"", b"e\n")
    assert (tmp_path / "out").read_bytes() == b"\0\1\2"


def test_the_bridge_says_in_its_protocol_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvm2.lab.oracle.bridge", "no-such-shape"]
    setup = b'{"host": "oracle:no-such-shape", "guests": {}}\n'
    done = subprocess.run(command, input=setup, capture_output=True)
    assert b'"kind": "HostError"' in done.stdout and done.stdout.count(b"\n") == 1
    assert subprocess.run(command, input=b"", capture_output=True).stdout == b""
    assert subprocess.run(command[:-1], capture_output=True).returncode not in (0, -9)


def test_a_bridge_whose_machine_dies_gives_no_more_output(built: Callable[[str], Shape]) -> None:
    built("neoverse-n1-4k")
    command = [sys.executable, "-m", "kvm2.lab.oracle.bridge", "neoverse-n1-4k"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    step = '{"sc": "x", "steps": [{"op": "check_ext", "fd": "kvm", "cap": 165}], "patience_ms": 100}\n'
    process.stdin.write(b'{"host": "oracle:neoverse-n1-4k", "guests": {}}\n' + step.encode())
    process.stdin.flush()
    assert b'"r": [[48, 0]]' in process.stdout.readline()
    os.kill(child_of(process.pid), signal.SIGKILL)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 1 and b"it ended" in rest + said


def test_a_sparse_copy(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with open(old, "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"middle")
    machines._copy_sparse(old, new)
    assert new.stat().st_size == 1 << 30 and new.stat().st_blocks < 1000
    with open(new, "rb") as file:
        file.seek(1 << 29)
        assert file.read(8) == b"middle\0\0"
    shutil.copyfile(os.devnull, old)
    machines._copy_sparse(old, new)
    assert new.stat().st_size == 0

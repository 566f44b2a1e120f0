"""Debian's kernel to a shell and work in it: on the software KVM, and in QEMU's own emulation of the same core.

Both sides boot the same kernel and initramfs on one vCPU. What is judged is processor time of everything that the
machine is made of: QEMU is a process of its own, the software KVM this one. QEMU's device tree has a seed for KASLR,
with which Linux separates its page tables from those of programs (KPTI), and starting processes feels it; the software
KVM's has none. So that is measured without KASLR in both as well.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.measure import Figure, Measured, Unavailable
from kvm2.board.loop import RunResult

QEMU: Final = "qemu-system-aarch64"
# As the issue has it; no devices beyond those of the machine itself.
QEMU_MACHINE: Final = ("-M", "virt,gic-version=3", "-cpu", "cortex-a72", "-accel", "tcg", "-smp", "1", "-m", "512M")
QEMU_REST: Final = ("-nic", "none", "-display", "none", "-monitor", "none", "-serial", "stdio", "-no-reboot")
HOST: Final = "cortex-a72-4k"
RAM_BASE, RAM_SIZE = 1 << 30, 512 << 20
ROUNDS: Final = 3
APPEND: Final = "console=ttyAMA0 quiet"
SAME: Final = f"{APPEND} nokaslr"
FILE: Final = "dd if=/dev/zero of=/tmp/z bs=1M count=8 2>/dev/null"
SHA: Final = "sha256sum /tmp/z > /dev/null"
FORKS: Final = "i=0; while [ $i -lt 300 ]; do busybox true; i=$((i+1)); done"
# Sleeps are timers of the kernel.
NAPS: Final = "i=0; while [ $i -lt 200 ]; do usleep 10000; i=$((i+1)); done"
IDLE_SECONDS: Final = 10
VIRTUAL_TIMER_INTID: Final = 27


class QemuMachine:
    """What a `Session` needs of a machine, done by a QEMU."""

    def __init__(self, kernel: Path, sink: Callable[[int], None]) -> None:
        self._kernel, self._sink = kernel, sink
        self._folder = tempfile.TemporaryDirectory(prefix="kvm2-bench-")
        self.process: subprocess.Popen[bytes] | None = None

    def load_linux(self, kernel: object, initrd: bytes, append: str) -> None:
        """Starts it; the kernel is the file."""
        archive = Path(self._folder.name) / "initrd"
        archive.write_bytes(initrd)
        linux = ("-kernel", str(self._kernel), "-initrd", str(archive), "-append", append)
        command = (QEMU, *QEMU_MACHINE, *linux, *QEMU_REST)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)

    def run(self) -> RunResult:
        """Until QEMU ends."""
        assert self.process is not None and self.process.stdout is not None
        while data := self.process.stdout.read(4096):
            for byte in data:
                self._sink(byte)
        self.process.wait()
        return RunResult("shutdown", 0.0, {}, b"")

    def feed(self, data: bytes) -> None:
        """What is typed."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(data)

    def finish(self, ended: str, why: str, status: int) -> None:
        """Ends it."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """Gives everything back."""
        if self.process is not None:
            self.process.wait()
        self._folder.cleanup()


def _cpu_of(pid: int) -> float:
    """Processor time of a process's threads, in seconds."""
    try:
        rows = [(task / "schedstat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError as error:
        raise Unavailable(f"processor time of QEMU cannot be read: {error}") from error
    return sum(int(row.split()[0]) for row in rows) / 1e9


@functools.cache
def _files() -> Any:
    from kvm2.errors import EnvironmentFault
    from kvm2.lab.linux.files import linux_files

    try:
        return linux_files()
    except EnvironmentFault as error:
        raise Unavailable(str(error)) from error


def _spec() -> Any:
    from kvm2.spec import MemoryRange, VmSpec

    return VmSpec(physaddr_bits="auto", memory=(MemoryRange(RAM_BASE, RAM_SIZE),))


@contextmanager
def _ours(append: str = APPEND) -> Iterator[tuple[Any, Callable[[], float]]]:
    import kvm2
    from kvm2.lab.linux.session import Session

    files, start = _files(), time.process_time()
    with kvm2.open(HOST, guest_ids="core") as kvm, Session(kvm, files, _spec(), append=append) as session:
        yield session, lambda: time.process_time() - start


@contextmanager
def _qemu(append: str = APPEND) -> Iterator[tuple[Any, Callable[[], float]]]:
    from kvm2.lab.linux.session import Session

    if shutil.which(QEMU) is None:
        raise Unavailable(f"there is no {QEMU} here (Debian and Ubuntu: apt-get install qemu-system-arm)")
    files = _files()
    made: list[QemuMachine] = []

    def make(kvm: object, spec: object, sink: Callable[[int], None]) -> Any:
        made.append(QemuMachine(files.kernel, sink))
        return made[0]

    with Session(None, files, _spec(), append=append, make=make) as session:  # type: ignore[arg-type]

        def seconds() -> float:
            assert made[0].process is not None
            return _cpu_of(made[0].process.pid)

        yield session, seconds


@dataclass(frozen=True)
class _Round:
    """Seconds of processor time: to the prompt, for the digest, for the processes."""

    boot: float
    sha: float
    forks: float


def _round(machine: Callable[[str], Any], append: str) -> _Round:
    with machine(append) as (session, seconds):
        session.wait_for_prompt()
        marks = [seconds()]
        session.command(FILE)
        for work in (SHA, FORKS):
            before = seconds()
            session.command(work)
            marks.append(seconds() - before)
    return _Round(*marks)


@functools.cache
def _rounds(append: str) -> tuple[list[_Round], list[_Round]]:
    ours, qemu = [], []
    for _ in range(ROUNDS):
        qemu.append(_round(_qemu, append))
        ours.append(_round(_ours, append))
    return ours, qemu


def _ratio(name: str, append: str = APPEND) -> Measured:
    """The best of each side: other work on the machine only ever adds."""
    ours, qemu = (min(getattr(one, name) for one in side) for side in _rounds(append))
    return Measured(ours / qemu, ours, qemu, "s")


def restore() -> Measured:
    """From opening a snapshot of a booted guest until it has answered a line, against the boot itself."""
    import kvm2
    from kvm2.board import snapshot

    with tempfile.TemporaryDirectory(prefix="kvm2-bench-") as folder:
        path = Path(folder) / "booted"
        with _ours() as (session, seconds):
            session.wait_for_prompt()
            boot = seconds()
            time.sleep(1)  # the shell waits for its first line
            snapshot.save(session.machine, path)
        took = min(_restored(kvm2.open(HOST, guest_ids="core"), path) for _ in range(ROUNDS))
    return Measured(took / boot, took, boot, "s")


def _restored(kvm: Any, path: Path) -> float:
    from kvm2.board import snapshot
    from kvm2.lab.linux import PROMPT

    said, answered = bytearray(), threading.Event()

    def sink(byte: int) -> None:
        said.append(byte)
        if said.endswith(PROMPT.encode()):
            answered.set()

    start = time.process_time()
    with kvm, snapshot.restore(kvm, snapshot.read(path), sink=sink) as machine:
        thread = threading.Thread(target=machine.run)
        thread.start()
        machine.feed(b"\n")
        if not answered.wait(60):
            raise AssertionError("the restored guest does not answer")
        took = time.process_time() - start
        machine.finish("interrupted", "", 0)
        thread.join()
    return took


def timer_latency() -> Measured:
    """From the time that the guest's timer was set to, until the guest acknowledges its interrupt."""
    from kvm2.softkvm.timers import VIRTUAL

    with _ours() as (session, _):
        session.wait_for_prompt()
        session.command("true")
        vm = session.machine.vm.backend.inspect(session.machine.vm.fd)
        timer = vm.vcpus[0].timers[VIRTUAL]
        late: list[int] = []

        def observer(what: str, facts: dict[str, int]) -> None:
            if what == "irq-ack" and facts["intid"] == VIRTUAL_TIMER_INTID and (when := timer.deadline()) is not None:
                late.append(time.monotonic_ns() - when)

        vm.observer = observer
        session.command(NAPS)
        vm.observer = None
    late.sort()
    if not late:
        raise AssertionError("no timer interrupt was seen")
    p99, median = late[len(late) * 99 // 100] / 1e6, late[len(late) // 2] / 1e6
    return Measured(p99, p99, median, "ms")


def idle() -> Measured:
    """Processor time of a guest that waits at its prompt, in hundredths of a core."""
    with _ours() as (session, _):
        session.wait_for_prompt()
        session.command("true")
        time.sleep(2)
        start, before = time.monotonic(), time.process_time()
        time.sleep(IDLE_SECONDS)
        used, passed = time.process_time() - before, time.monotonic() - start
    return Measured(100 * used / passed, used, passed, "s")


FIGURES: Final = (
    Figure("boot", "Linux to its prompt, software KVM / QEMU's emulation", 1.5, lambda: _ratio("boot")),
    Figure("boot-sha", "sha256 of 8 MiB in it", 1.3, lambda: _ratio("sha")),
    Figure("boot-fork", "300 processes started in it", 1.8, lambda: _ratio("forks")),
    Figure("boot-fork-same", "the same without KASLR in either", 1.8, lambda: _ratio("forks", SAME)),
    Figure("restore", "a snapshot to its answering prompt / the boot", 0.1, restore),
    Figure("timer", "timer interrupt, late at p99 / median", 2.0, timer_latency, unit="ms"),
    Figure("idle", "an idle guest's share of a core", 2.0, idle, unit="%"),
)

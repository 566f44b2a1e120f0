"""A warm machine: built once for each shape, saved as it waits, and restored whenever it is wanted.

Two states are kept for each shape. `base`: Debian's kernel and Python, waiting; it depends on packages and QEMU.
`warm`: the same after kvm2 was loaded and imported; it depends on kvm2's own files too, so a change of one of them
costs some seconds of importing and no boot.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import pkgutil
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm2.errors import EnvironmentFault
from kvm2.lab import cpio, kernel_package
from kvm2.lab.oracle import agent, elf, initramfs, qemu
from kvm2.lab.oracle.link import Finished, Gone, Link, Sink
from kvm2.lab.packages import Archive, cache_directory, need

if TYPE_CHECKING:
    from types import TracebackType

    from kvm2.lab.oracle.shapes import Shape

Say = Callable[[str], None]

# Inside: what the command line needs. What they import only to colour source code stays out, and so does the emulated
# core, which has no business on a real KVM.
PACKAGES = ("kvm2", "click", "rich")
MISSING = ("unicorn", "pygments", "markdown_it")
ALSO_IMPORTED = (
    "rich.console",
    "rich.table",
    "rich.text",
    "rich.progress",
    "runpy",
    "lzma",
    "difflib",
    "mmap",
    "fcntl",
)

# After its answer the machine has some things to finish. Whatever is left then would be done after every restore.
SETTLE_SECONDS = 0.5


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class State:
    """A saved state: the directory with `memory`, `devices`, `kernel` (a stub) and `info.json`."""

    directory: Path

    @property
    def memory(self) -> Path:
        """The machine's memory."""
        return self.directory / "memory"

    @property
    def devices(self) -> Path:
        """What QEMU saved besides."""
        return self.directory / "devices"

    @property
    def info(self) -> dict[str, Any]:
        """What the machine said of itself."""
        found: dict[str, Any] = json.loads((self.directory / "info.json").read_text())
        return found


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be run inside: the function `module:function`, as a process with arguments, environment and files.

    `files` are written first (path inside -> contents); those of `get` are brought back.
    """

    entry: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    get: Sequence[str] = ()


class Machine:
    """A running machine of a shape: `with open_machine(shape) as machine: machine.run(...)`."""

    def __init__(self, shape: Shape, state: State, info: dict[str, Any]) -> None:
        self.shape = shape
        self.info = info
        self._qemu = qemu.Qemu(_command(shape, state, shared=False), incoming=state.devices)
        self.link = Link(self._qemu.port)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self, job: Job, stdin: int | None, out: Sink, err: Sink, first: bytes = b"", reader: int | None = None
    ) -> Finished:
        """Runs a job inside. What it writes goes to `out` and `err`; it reads `first`, then from descriptor `stdin`.

        EnvironmentFault where the machine dies of it. A first interrupt is handed on, as on a terminal; the second one
        is the machine's end. BrokenPipeError when nobody reads the pipe `reader` any more.
        """
        try:
            self.link.start(job.entry, job.argv, job.env, job.files, job.get)
            if first:
                self.link.send(b"I", first)
            try:
                return self.link.follow(stdin, out, err, reader)
            except KeyboardInterrupt:
                self.link.send(b"S", b"%d" % signal.SIGINT)
                return self.link.follow(None, out, err)
        except Gone as error:
            raise self._qemu.death(f"it ended while it ran {' '.join(job.argv)}: {error}") from error

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._qemu.pid

    def close(self) -> None:
        """Ends the machine; nothing is left of it."""
        self._qemu.kill()


def _command(shape: Shape, state: State, shared: bool) -> list[str]:
    kernel, initrd = state.directory / "kernel", state.directory / "initrd"
    return qemu.command_line(shape, str(kernel), str(initrd) if initrd.exists() else None, str(state.memory), shared)


def open_machine(shape: Shape, say: Say = _silent) -> Machine:
    """A machine of a shape, warm; built first where there is none yet, or where it is stale.

    A saved machine that cannot be restored (a file of it was damaged) is built again, once. The machine ends with the
    thread that opens it, if nobody closes it before.
    """
    state = build(shape, say)
    try:
        return Machine(shape, state, state.info)
    except (EnvironmentFault, OSError, ValueError) as error:
        say(f"{shape.name}: what was saved is of no use, so it is built again: {str(error).splitlines()[0]}")
    with _locked(cache_directory() / "machines" / shape.name, say):
        shutil.rmtree(state.directory, ignore_errors=True)
    state = build(shape, say)
    return Machine(shape, state, state.info)


def build(shape: Shape, say: Say = _silent) -> State:
    """The warm state of a shape, made where it is missing or something that it depends on has changed."""
    need(qemu.PROGRAM, "apt-get", "apt-cache", "dpkg-deb", whose="the oracle")
    cache = cache_directory()
    archive = Archive(cache, say)
    sources = application_sources()
    place = cache / "machines" / shape.name
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place, say):
        kernel, python = archive.kernel(shape.kernel), [archive.package(name) for name in initramfs.PYTHON]
        base_key = _base_key(shape, kernel, python)
        warm_key = _key(base_key, *(part for name, data in sources for part in (name, data)))
        warm = State(place / f"warm-{warm_key}")
        if not warm.directory.is_dir():
            base = State(place / f"base-{base_key}")
            if not base.directory.is_dir():
                _clear(place)
                _make(base, say, lambda state: _make_base(shape, state, kernel, python, say))
            _clear(place, keep=base)
            _make(warm, say, lambda state: _make_warm(shape, base, state, sources, say))
    return warm


def built(shape: Shape) -> bool:
    """Whether there is a saved machine of a shape; it may be stale."""
    place = cache_directory() / "machines" / shape.name
    return place.is_dir() and any(path.name.startswith("warm-") for path in place.iterdir())


def update_packages(say: Say = _silent) -> None:
    """Reads what packages there are now; machines of older ones are stale from then on."""
    need("apt-get", "apt-cache", whose="the oracle")
    Archive(cache_directory(), say).update()


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _base_key(shape: Shape, kernel: Path, python: list[Path]) -> str:
    """Of everything that the base state is made from. QEMU by its file: asking it for its version takes longer."""
    program = Path(shutil.which(qemu.PROGRAM) or "").resolve()
    seen = program.stat()
    return _key(
        json.dumps(qemu.command_line(shape, "kernel", "initrd", "memory", True)),
        f"{program} {seen.st_size} {seen.st_mtime_ns}",
        *(path.name for path in (kernel, *python)),
        *(Path(module.__file__ or "").read_bytes() for module in (agent, initramfs, kernel_package, cpio, elf)),
        str(initramfs.can_compile()),
    )


def application_sources() -> list[tuple[str, bytes]]:
    """Every file of the packages that go inside: its path there, and its contents."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentFault(f"the package {name} cannot be found in this Python")
        root = Path(next(iter(spec.submodule_search_locations)))
        found += [(f"{name}/{path.relative_to(root)}", path.read_bytes()) for path in initramfs.files_of(root)]
    return found


def warm_modules() -> list[str]:
    """The modules that are imported before the snapshot: all of kvm2 that is not about other machines."""
    import kvm2

    found = [
        module.name
        for module in pkgutil.walk_packages(kvm2.__path__, "kvm2.", onerror=lambda name: None)
        if not module.name.startswith(("kvm2.softkvm.cpu", "kvm2.lab.oracle", "kvm2.__main__", "kvm2.pytest_plugin"))
    ]
    return [*ALSO_IMPORTED, *found, "kvm2.lab.oracle.inside"]


@contextmanager
def _locked(place: Path, say: Say) -> Iterator[None]:
    """One process at a time works on a shape's states; the lock goes with the process."""
    with open(place / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting: another process builds this machine")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear(place: Path, keep: State | None = None) -> None:
    """Takes away states that nobody will ask for again, and what a build that was killed left.

    With the base state one other warm state is kept, the newest: two versions of kvm2 may be in use at once.
    """
    left = {keep.directory} if keep is not None else set()
    if keep is not None:
        left |= set(sorted(place.glob("warm-*"), key=lambda path: path.stat().st_mtime)[-1:])
    for path in place.iterdir():
        if path.is_dir() and path not in left:
            shutil.rmtree(path)


def _make(state: State, say: Say, fill: Callable[[State], None]) -> None:
    """Fills a new directory, which gets its name only when all is in it."""
    new = State(state.directory.with_name(f"new-{state.directory.name}"))
    shutil.rmtree(new.directory, ignore_errors=True)
    new.directory.mkdir()
    try:
        fill(new)
        new.directory.rename(state.directory)
    except BaseException:
        shutil.rmtree(new.directory, ignore_errors=True)
        raise


def _make_base(shape: Shape, state: State, kernel: Path, python: list[Path], say: Say) -> None:
    say(f"{shape.name}: putting together Linux ({kernel.name.split('_')[0]}) and Python")
    image, found = kernel_package.kernel_and_modules(kernel)
    modules = kernel_package.in_order(initramfs.WANTED_MODULES, found)
    (state.directory / "kernel").write_bytes(image)
    source = Path(agent.__file__ or "").read_bytes()
    (state.directory / "initrd").write_bytes(initramfs.base(python, source, modules))
    say(f"{shape.name}: starting it")
    machine = qemu.Qemu(_command(shape, state, shared=True))
    try:
        info = _ask(machine, {"do": "describe"})
        if not info["kvm"]:
            raise EnvironmentFault(f"{shape.name}: its kernel offers no /dev/kvm; {info['dmesg'][-3:]}")
        info["qemu"] = qemu.version()
        (state.directory / "info.json").write_text(json.dumps(info, indent=1) + "\n")
        machine.save(state.devices)
    finally:
        machine.quit()
    # From now on both are in the memory: loading them again would only take time and room.
    (state.directory / "kernel").write_bytes(qemu.stub_kernel())
    (state.directory / "initrd").unlink()


def _make_warm(shape: Shape, base: State, state: State, sources: list[tuple[str, bytes]], say: Say) -> None:
    say(f"{shape.name}: loading kvm2")
    for name in ("kernel", "info.json"):
        os.link(base.directory / name, state.directory / name)
    _copy_sparse(base.memory, state.memory)
    machine = qemu.Qemu(_command(shape, state, shared=True), incoming=base.devices)
    try:
        request = {"do": "load", "modules": warm_modules(), "missing": list(MISSING)}
        done = _ask(machine, request, zlib.compress(initramfs.application(sources), 1))
        # Whoever needs such a module inside will be told; the others need not care.
        for name, why in done["failed"].items():
            say(f"{shape.name}: {name} cannot be imported inside: {why.strip().splitlines()[-1]}")
        time.sleep(SETTLE_SECONDS)
        machine.save(state.devices)
    finally:
        machine.quit()


def _ask(machine: qemu.Qemu, request: dict[str, Any], data: bytes | None = None) -> dict[str, Any]:
    try:
        reply = Link(machine.port).ask(request, data)
    except Gone as error:
        raise machine.death(f"it ended: {error}") from error
    if "error" in reply:
        raise EnvironmentFault(f"the emulated machine: its agent failed: {reply['error']}")
    return reply


def _copy_sparse(source: Path, target: Path) -> None:
    """A copy with the same holes: of a gigabyte of memory most was never touched."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        at = 0
        while at < size:
            try:
                start = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:
                break  # only a hole is left
            at = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            while start < at:
                start += os.copy_file_range(old.fileno(), new.fileno(), at - start, start, start)

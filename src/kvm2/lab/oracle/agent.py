"""What runs inside the machine as its first process: waits at the port, and starts what it is told to.

It stands alone (no import of kvm2 before it was told to load it), because it is there before kvm2 is. A snapshot of the
machine is taken while it waits with everything imported, so what is started is a fork and not a new interpreter.

A frame is a kind (one letter), a length (four bytes, little-endian) and that many bytes.

    to the machine    R  a request, JSON         I  standard input, empty: its end       S  a signal, in decimal
    from the machine  O  standard output         E  standard error                       X  the end of a request, JSON
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import platform
import re
import select
import signal
import struct
import sys
import tarfile
import time
import traceback
import zlib

HEADER = struct.Struct("<cI")
CHUNK = 1 << 16
APPLICATION = "/app"
MODULES = "/modules"
TIMER_ABSTIME = 1
READY = b"+"
SIGNALS = {int(signal.SIGINT), int(signal.SIGTERM), int(signal.SIGKILL)}


def mount_all() -> None:
    """The file systems that the kernel offers, at their places."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, place in ((b"devtmpfs", b"/dev"), (b"proc", b"/proc"), (b"sysfs", b"/sys"), (b"tmpfs", b"/tmp")):
        os.makedirs(place, exist_ok=True)
        if libc.mount(kind, place, kind, 0, None):
            raise OSError(ctypes.get_errno(), f"mount of {kind.decode()}")


def load_modules() -> None:
    """Kernel modules that came along, in the order of their names."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in sorted(os.listdir(MODULES)) if os.path.isdir(MODULES) else ():
        with open(f"{MODULES}/{name}", "rb") as file:
            image = file.read()
        if libc.init_module(image, ctypes.c_ulong(len(image)), b""):
            raise OSError(ctypes.get_errno(), f"init_module of {name}")


class Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def revive_timers() -> None:
    """Gets the kernel to program its timer again.

    QEMU does not save the EL2 physical timer, which is the one that a kernel with VHE uses. A restored kernel waits for
    an interrupt that will not come, and programs only what is due before it: so something due long ago.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.clock_nanosleep(time.CLOCK_MONOTONIC, TIMER_ABSTIME, ctypes.byref(Timespec(0, 1)), None):
        raise OSError("clock_nanosleep failed")


def open_port() -> int:
    """The descriptor of the port to the outside."""
    for _ in range(1000):
        ports = os.listdir("/sys/class/virtio-ports") if os.path.isdir("/sys/class/virtio-ports") else []
        if ports:
            return os.open(f"/dev/{ports[0]}", os.O_RDWR | os.O_CLOEXEC)
        time.sleep(0.01)
    raise OSError("no virtio port appeared")


class Port:
    """Frames on a descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, kind: bytes, data: bytes = b"") -> None:
        """One frame out."""
        left = memoryview(HEADER.pack(kind, len(data)) + data)
        while left:
            left = left[os.write(self.fd, left) :]

    def reply(self, **values: object) -> None:
        """The end of a request."""
        self.send(b"X", json.dumps(values).encode())

    def receive(self) -> tuple[bytes, bytes]:
        """One frame in; waits for it."""
        kind, length = HEADER.unpack(self._exactly(HEADER.size))
        return kind, self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            found = os.read(self.fd, min(length - len(data), 1 << 20))
            if not found:
                time.sleep(0.01)  # nobody is connected outside
            data += found
        return bytes(data)


def describe() -> dict[str, object]:
    """What this machine is: kernel, page size, and what the kernel said about its processor and KVM."""
    lines: list[str] = []
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            text = os.read(fd, 8192).decode("utf-8", "replace").split(";", 1)[-1].splitlines()[0]
            if re.search(r"kvm|CPU features|Kernel command line", text):
                lines.append(text)
    os.close(fd)
    return {
        "kernel": platform.release(),
        "page": os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "kvm": os.path.exists("/dev/kvm"),
        "dmesg": lines,
    }


def load(archive: bytes, modules: list[str], missing: list[str]) -> dict[str, object]:
    """Unpacks an application and imports its modules; what needs one of the packages `missing` is left out."""
    with tarfile.open(fileobj=io.BytesIO(zlib.decompress(archive))) as tar:
        tar.extractall(APPLICATION)
    sys.path.insert(0, APPLICATION)
    left_out, failed = [], {}
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in missing:
                failed[name] = str(error)
            left_out.append(name)
        except Exception:
            failed[name] = traceback.format_exc()
    gc.collect()
    gc.freeze()  # a child that collects would copy every page of ours
    return {"left_out": left_out, "failed": failed}


class Child:
    """A process that is ready and waits to be told what to run: forking takes long here, and need not be waited for."""

    def __init__(self, port_fd: int) -> None:
        pipes = {name: os.pipe() for name in ("job", "stdin", "stdout", "stderr", "status")}
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                for number, name in enumerate(("stdin", "stdout", "stderr")):
                    os.dup2(pipes[name][min(number, 1)], number)
                job, status = pipes["job"][0], pipes["status"][1]
                os.close(port_fd)
                for fd in {fd for pair in pipes.values() for fd in pair} - {job, status}:
                    os.close(fd)  # of the others, what was imported may need some
                child(job, status)
            finally:
                os._exit(1)
        self.job, self.stdin = pipes["job"][1], pipes["stdin"][1]
        self.stdout, self.stderr, self.status = (pipes[name][0] for name in ("stdout", "stderr", "status"))
        for fd in (pipes["job"][0], pipes["stdin"][0], *(pipes[name][1] for name in ("stdout", "stderr", "status"))):
            os.close(fd)
        os.read(self.status, len(READY))  # what it has to do first is not left to the one who restores us

    def start(self, request: dict[str, object]) -> None:
        """Tells it what to run."""
        with os.fdopen(self.job, "w") as file:
            json.dump(request, file)


def child(job: int, status: int) -> None:
    """In the child: waits for its job, and reports how it ended before the system takes the process down."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.write(status, READY)
    with os.fdopen(job) as file:
        request = json.load(file)
    code = run_entry(request)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(status, b"%d" % code)
    os._exit(code & 0xFF)


def run_entry(request: dict[str, object]) -> int:
    """Calls the entry point with the request's arguments and environment; its exit code."""
    try:
        os.environ.update(request["env"])  # type: ignore[call-overload]
        sys.argv = list(request["argv"])  # type: ignore[call-overload]
        module, function = str(request["entry"]).split(":")
        result = getattr(importlib.import_module(module), function)()
        return result if isinstance(result, int) else 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


class Session:
    """One child at work, and what goes between it and the port until it ends."""

    def __init__(self, port: Port, child: Child) -> None:
        self.port = port
        self.child = child
        self.stdin: int | None = child.stdin
        self.outputs = {child.stdout: b"O", child.stderr: b"E"}
        self.pending = bytearray()
        self.input_ended = False
        for fd in (child.stdin, child.status, *self.outputs):
            os.set_blocking(fd, False)

    def serve(self) -> int:
        """Passes on until the child ends; its exit code, -N where signal N ended it."""
        pidfd = os.pidfd_open(self.child.pid)
        code = b""
        while not code:
            poll = select.poll()
            for fd in (pidfd, self.child.status, self.port.fd, *self.outputs):
                poll.register(fd, select.POLLIN)
            if self.stdin is not None and self.pending:
                poll.register(self.stdin, select.POLLOUT)
            ready = dict(poll.poll())
            for fd in [fd for fd in self.outputs if fd in ready]:
                self._pass_output(fd)
            if ready.get(self.port.fd, 0) & select.POLLIN:
                self._take_frame()
            elif self.port.fd in ready and len(ready) == 1:
                time.sleep(0.01)  # nobody is connected outside: poll would spin
            self._feed()
            if self.child.status in ready or pidfd in ready:
                code = os.read(self.child.status, 16) or self._code_of_the_dead()
        for fd in list(self.outputs):
            while self._pass_output(fd):
                pass
        for fd in (pidfd, self.child.status, *self.outputs, *([] if self.stdin is None else [self.stdin])):
            os.close(fd)
        return int(code)

    def _code_of_the_dead(self) -> bytes:
        found = os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        killed = found is not None and found.si_code != os.CLD_EXITED
        return b"%d" % (0 if found is None else -found.si_status if killed else found.si_status)

    def clear(self) -> None:
        """Ends whatever the child left running, and waits for all of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        os.waitpid(self.child.pid, 0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _pass_output(self, fd: int) -> bool:
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            del self.outputs[fd]
            os.close(fd)
            return False
        self.port.send(self.kind_of(fd), data)
        return True

    def kind_of(self, fd: int) -> bytes:
        """The frame's kind for what comes from a pipe."""
        return self.outputs[fd]

    def _take_frame(self) -> None:
        kind, data = self.port.receive()
        if kind == b"I":
            self.pending += data
            self.input_ended = self.input_ended or not data
        elif kind == b"S" and int(data) in SIGNALS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, int(data))

    def _feed(self) -> None:
        if self.stdin is None:
            return
        try:
            while self.pending:
                del self.pending[: os.write(self.stdin, self.pending[:CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.pending.clear()
            self.input_ended = True
        if self.input_ended:
            os.close(self.stdin)
            self.stdin = None


class Agent:
    """Answers requests. `spare` is a child that was forked before it was needed."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.spare: Child | None = None

    def serve(self) -> None:
        """For ever. What arrives too late for a child that has ended is dropped."""
        while True:
            kind, data = self.port.receive()
            if kind != b"R":
                continue
            revive_timers()
            request = json.loads(data)
            try:
                if request["do"] == "describe":
                    self.port.reply(**describe())
                elif request["do"] == "load":
                    done = load(self.port.receive()[1], request["modules"], request["missing"])
                    self.spare = Child(self.port.fd)
                    self.port.reply(**done)
                else:
                    self.run(request)
            except Exception:
                self.port.reply(error=traceback.format_exc())

    def run(self, request: dict[str, object]) -> None:
        """One request to start something: files in, the child, files out."""
        for path, text in request["files"].items():  # type: ignore[attr-defined]
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "wb") as file:
                file.write(base64.b64decode(text))
        child, self.spare = self.spare or Child(self.port.fd), None
        child.start({name: request[name] for name in ("entry", "argv", "env")})
        session = Session(self.port, child)
        code = session.serve()
        found = {}
        for path in request["get"]:  # type: ignore[attr-defined]
            with contextlib.suppress(OSError), open(path, "rb") as file:
                found[path] = base64.b64encode(file.read()).decode()
        self.port.reply(exit=code, files=found)
        session.clear()


def main() -> None:
    """Process 1: whatever goes wrong is said on the console, and ends the machine."""
    try:
        os.environ.update(PATH="/usr/bin:/bin", HOME="/tmp", LANG="C.UTF-8")
        mount_all()
        os.chdir("/tmp")
        load_modules()
        Agent(Port(open_port())).serve()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the kernel panics, and the machine with it


if __name__ == "__main__":
    main()

"""A backend that tells of every call: wrapped around another one, it changes nothing and hides nothing.

One `Tracer` may wrap several backends that stand on each other: calls made on behalf of a call are inside of it
(`Call.inner`), so that a KVM_CREATE_VM2 that was lowered shows what the kernel was really asked.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvm2.abi import ioctls, onereg, show_ioctl
from kvm2.abi.exits import EXIT_REASON_OFFSET, KVM_EXIT_MEMORY_FAULT
from kvm2.abi.ioctls import KVM_RUN
from kvm2.abi.structs import OneReg
from kvm2.errors import KvmError
from kvm2.hosts.backend import Runner
from kvm2.softkvm.memory import ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvm2.abi.findings import Finding
    from kvm2.abi.ioctls import Ioctl
    from kvm2.abi.show import Record, Value
    from kvm2.hosts.backend import Backend

PC = onereg.core("regs.pc")
# What a descriptor is that an ioctl returns, by what its row says of the result.
_MADE = {"a VM fd": "vm", "a vCPU fd": "vcpu", "a statistics fd": "stats", "a guest_memfd": "guest_memfd"}


@dataclass(frozen=True)
class Call:
    """One call: an "ioctl", "open", "close", "dup2" or "kick" (`what`).

    `on` names the descriptor ("vcpu#1.0": vCPU 0 of vm#1). `name` is the ioctl's, or its number in
    the form of a macro; `argument`, `output` and `exit` are for `abi.show`.
    `result` is None where the call was refused (`error`) or did not come back (`stopped` says what interrupted it).
    `pc`: where the guest stood at an exit, where that was asked for.
    `made` names a new descriptor, `made_fd` is its number. `seconds` is how long whoever answers took.
    """

    what: str
    on: str
    name: str
    request: int = 0
    arg: int = 0
    argument: Value | None = None
    result: int | None = None
    made: str = ""
    made_fd: int = -1
    output: Value | None = None
    exit: Record | None = None
    pc: int | None = None
    error: KvmError | None = None
    stopped: str = ""
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0
    thread: str = ""
    inner: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Event:
    """Something that happened inside the software KVM: an interrupt (`what` is "irq-line", "irq-ack", "irq-eoi", "sgi",
    ...) of the VM or vCPU `on`, with its numbers."""

    what: str
    on: str
    facts: dict[str, int]
    thread: str = ""


class Tracer:
    """Wraps backends, and gives `sink` every outermost call once it has come back. Any thread may call.

    With `events`, a software KVM's interrupts go there, in the same order; a kernel has none to tell. With `pcs`, the
    guest's PC is read after each exit.
    """

    def __init__(
        self, sink: Callable[[Call], None], *, events: Callable[[Event], None] | None = None, pcs: bool = False
    ) -> None:
        self._sink = sink
        self._events = events
        self.pcs = pcs
        # A handle may be collected, and so closed, while its own thread is in here or in the sink.
        self._lock = threading.RLock()
        self._waiting: deque[Call | Event] = deque()
        self._telling = False
        self._local = threading.local()
        self._counts: dict[str, int] = {}
        self.latest: dict[int, tuple[str, str]] = {}
        self.memory = ProcessMemory()

    def wrap(self, backend: Backend) -> Traced:
        """The backend, traced."""
        return Traced(backend, self)

    def begin(self) -> list[Call]:
        """A call begins in this thread: the list that the calls made for it will be in."""
        inner: list[Call] = []
        self._stack().append(inner)
        return inner

    def end(self, call: Call) -> None:
        """It is over: told to the call that it was made for, or to the sink."""
        stack = self._stack()
        stack.pop()
        if stack:
            stack[-1].append(call)
            return
        self._tell(call)

    def _tell(self, what: Call | Event) -> None:
        with self._lock:
            self._waiting.append(what)
            if self._telling:
                return
            self._telling = True
            try:
                while self._waiting:
                    one = self._waiting.popleft()
                    if isinstance(one, Call):
                        self._sink(one)
                    elif self._events is not None:
                        self._events(one)
            finally:
                self._telling = False

    def observe(self, vm: object, name: str) -> None:
        """Hear of a software VM's interrupts, from now on."""
        if self._events is None or not hasattr(vm, "observer"):
            return

        def observer(what: str, facts: dict[str, int]) -> None:
            number = facts.get("vcpu", -1)
            on = f"vcpu#{name.partition('#')[2]}.{number}" if number >= 0 else name
            self._tell(Event(what, on, facts, _thread()))

        vm.observer = observer

    def _stack(self) -> list[list[Call]]:
        stack: list[list[Call]] = self._local.__dict__.setdefault("stack", [])
        return stack

    def name(self, kind: str, parent: str = "", number: int = 0) -> str:
        """A name for a new descriptor: kvm#1, vm#1, vcpu#1.0 (vCPU 0 of vm#1), device#1. None is given twice."""
        if kind == "vcpu":
            return f"vcpu#{parent.partition('#')[2] or '?'}.{number}"
        with self._lock:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            return f"{_prefix(kind)}{self._counts[kind]}"


def _thread() -> str:
    """The name of a thread, if it is not the main one."""
    thread = threading.current_thread()
    return "" if thread is threading.main_thread() else thread.name


def _prefix(kind: str) -> str:
    return "kvm#" if kind == "system" else f"{kind}#"


@dataclass
class _Open:
    """A call that is still going on, and what is known of it."""

    facts: dict[str, Any]
    inner: list[Call]
    start: float


class Traced:
    """A `hosts.backend.Backend` around another one. What else that one has (`profile`, `inspect`) is passed on."""

    def __init__(self, backend: Backend, tracer: Tracer) -> None:
        self._inner = backend
        self._tracer = tracer
        self._arch = backend.arch
        self._areas: dict[int, memoryview] = {}
        self._known: dict[int, tuple[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def _call(self, **facts: Any) -> Iterator[_Open]:
        """One call, told when it is over, however it ends."""
        facts["thread"] = _thread()
        opened = _Open(facts, self._tracer.begin(), time.perf_counter())
        try:
            yield opened
        except KvmError as error:
            facts["error"] = error
            facts["findings"] = facts.get("findings") or error.findings
            raise
        except BaseException as stop:
            facts["stopped"] = type(stop).__name__
            raise
        finally:
            facts.setdefault("seconds", time.perf_counter() - opened.start)
            self._tracer.end(Call(**facts, inner=tuple(opened.inner)))

    def _of(self, fd: int) -> tuple[str, str]:
        """(kind, name) of a descriptor; one that was closed keeps its name until the number is used again."""
        return self._known.get(fd, ("", f"fd {fd}"))

    def _new(self, opened: _Open, fd: int, kind: str, parent: str = "", number: int = 0) -> None:
        """A descriptor was made. What a call inside reported already keeps the name it has."""
        known = [call.made for call in opened.inner if call.made_fd == fd and call.made.startswith(_prefix(kind))]
        name = known[-1] if known else self._tracer.name(kind, parent, number)
        self._known[fd] = self._tracer.latest[fd] = (kind, name)
        opened.facts |= {"made": name, "made_fd": fd}
        inspect = getattr(self._inner, "inspect", None)
        if kind == "vm" and inspect is not None:
            self._tracer.observe(inspect(fd), name)

    def open(self) -> int:
        """A new descriptor of /dev/kvm."""
        with self._call(what="open", on="", name="open", argument="/dev/kvm") as opened:
            fd = self._inner.open()
            opened.facts["result"] = fd
            self._new(opened, fd, "system")
        return fd

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """The inner backend's answer; told with everything that goes in and comes out."""
        kind, name = self._of(fd)
        number, where = request & 0xFFFF_FFFF, arg & 0xFFFF_FFFF_FFFF_FFFF
        # Of another architecture is still worth a name: that is why it is refused.
        row = ioctls.by_number(number, kind, self._arch) or ioctls.by_number(number, kind, None)
        if row is None:
            macro = show_ioctl.macro_text(request)
            with self._call(what="ioctl", on=name, name=macro, request=request, arg=where, argument=where) as opened:
                result = opened.facts["result"] = self._inner.ioctl(fd, request, arg)
            return result
        with self._call(what="ioctl", on=name, name=row.name, request=request, arg=where) as opened:
            if request == KVM_RUN:
                return self._run(fd, opened)
            return self._declared(fd, row, where, opened)

    def _declared(self, fd: int, row: Ioctl, arg: int, opened: _Open) -> int:
        memory, facts, arch = self._tracer.memory, opened.facts, self._arch
        asked = facts["argument"] = show_ioctl.before(row, arg, memory, arch)
        opened.start = time.perf_counter()
        ok = False
        try:
            result = self._inner.ioctl(fd, row.number, arg)
            ok = True
            facts["result"] = result
        finally:
            facts["seconds"] = time.perf_counter() - opened.start
            facts["output"] = show_ioctl.after(row, arg, memory, arch, asked, ok)
            if row.number in show_ioctl.LISTS:
                facts["findings"] = show_ioctl.findings(arg, memory)
        self._made(row, fd, arg, result, opened)
        return result

    def _made(self, row: Ioctl, fd: int, arg: int, result: int, opened: _Open) -> None:
        memory = self._tracer.memory
        if row.number == ioctls.KVM_CREATE_DEVICE:
            from kvm2.abi.structs import KVM_CREATE_DEVICE_TEST, CreateDevice

            made = CreateDevice.unpack(memory.read(arg, CreateDevice.SIZE))
            if not made.flags & KVM_CREATE_DEVICE_TEST:
                self._new(opened, made.fd, "device")
            return
        kind = _MADE.get(row.returns.partition(";")[0], "")
        if kind and not (row.number in show_ioctl.LISTS and self._dry(arg)):
            self._new(opened, result, kind, self._of(fd)[1], arg)

    def _dry(self, arg: int) -> bool:
        from kvm2.abi.vm2 import KVM_CREATE_VM_ATTR_DRY_RUN

        return KVM_CREATE_VM_ATTR_DRY_RUN in show_ioctl.types_of(arg, self._tracer.memory)

    def _run(self, fd: int, opened: _Open) -> int:
        facts, area = opened.facts, self._area(fd)
        if area is not None:
            facts["argument"] = show_ioctl.answer_of(area)
        opened.start = time.perf_counter()
        try:
            facts["result"] = self._inner.ioctl(fd, KVM_RUN, 0)
        finally:
            facts["seconds"] = time.perf_counter() - opened.start
            if area is not None and ("result" in facts or _is_memory_fault(area)):
                facts["exit"] = show_ioctl.exit_of(area, self._arch)
                if self._tracer.pcs:
                    facts["pc"] = self._pc(fd)
        return int(facts["result"])

    def _pc(self, fd: int) -> int | None:
        if self._arch != "arm64":
            return None
        value = ctypes.c_uint64()
        asked = ctypes.create_string_buffer(OneReg(PC, ctypes.addressof(value)).pack())
        try:
            self._inner.ioctl(fd, ioctls.KVM_GET_ONE_REG, ctypes.addressof(asked))
        except KvmError:
            return None
        return value.value

    def _area(self, fd: int) -> memoryview | None:
        area = self._areas.get(fd)
        if area is None:
            try:
                area = self._areas[fd] = self._inner.kvm_run(fd)
            except KvmError:
                return None
        return area

    def kvm_run(self, fd: int) -> memoryview:
        """The shared area of a vCPU."""
        area = self._areas[fd] = self._inner.kvm_run(fd)
        return area

    def runner(self, fd: int, explained: Callable[[KvmError], KvmError] | None = None) -> Runner:
        """The way of `ioctl(fd, KVM_RUN)`: the short one of a kernel would go past the trace."""

        def run(fd: int, request: int) -> int:
            try:
                return self.ioctl(fd, request)
            except KvmError as error:
                if explained is None:
                    raise
                raise explained(error) from None

        return Runner(run)

    def fill(self, fd: int, made: int) -> None:
        """A VM that was negotiated gets the number that was kept for it, and the name that it has had since."""
        kind, name = self._of(made)
        with self._call(what="dup2", on=name, name="dup2") as opened:
            self._inner.fill(fd, made)  # type: ignore[attr-defined]
            self._known[fd] = self._tracer.latest.get(fd, (kind, name))
            opened.facts |= {"result": fd, "made": self._known[fd][1], "made_fd": fd}

    def kick(self, fd: int) -> None:
        """Get a vCPU's KVM_RUN back."""
        with self._call(what="kick", on=self._of(fd)[1], name="kick"):
            self._inner.kick(fd)

    def memory_gone(self, address: int, size: int) -> None:
        """Passed on: no call of the kernel's."""
        self._inner.memory_gone(address, size)

    def memory_written(self, fd: int, address: int, size: int) -> None:
        """Passed on: no call of the kernel's."""
        self._inner.memory_written(fd, address, size)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        self._areas.pop(fd, None)
        with self._call(what="close", on=self._of(fd)[1], name="close") as opened:
            self._inner.close(fd)
            opened.facts["result"] = 0


def _is_memory_fault(area: memoryview) -> bool:
    reason = int.from_bytes(area[EXIT_REASON_OFFSET : EXIT_REASON_OFFSET + 4], "little")
    return reason == KVM_EXIT_MEMORY_FAULT

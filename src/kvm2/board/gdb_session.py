"""What gdb asks, packet by packet, until it goes. Appendix E of the GDB manual names the packets."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.board import gdb_monitor, gdb_registers
from kvm2.board.gdb_memory import Unmapped
from kvm2.board.gdb_points import Point, TooMany
from kvm2.board.gdb_target import SIGINT, SIGTRAP, Stop
from kvm2.board.gdb_wire import INTERRUPT, MAX_PACKET, unescaped
from kvm2.errors import KvmError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.board.gdb_target import Target
    from kvm2.board.gdb_wire import Wire
    from kvm2.vcpu import Vcpu

OK: Final = b"OK"
UNKNOWN: Final = b""
SUPPORTED: Final = (
    f"PacketSize={MAX_PACKET // 4:x};qXfer:features:read+;QStartNoAckMode+;swbreak+;hwbreak+;vContSupported+"
)
SOFTWARE: Final = "0"
A64_BYTES: Final = 4
MAX_READ: Final = MAX_PACKET // 8
GENERAL: Final = (*gdb_registers.CORE, *gdb_registers.FPU)  # what a g packet has


class _Refused(Exception):
    """An E packet."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.reply = b"E%02x" % number


def _failure(number: int | None) -> bytes:
    return b"E%02x" % ((number or errno.EIO) & 0xFF)


class Session:
    """One connection. Threads of gdb's are vCPU numbers plus one."""

    def __init__(self, target: Target, wire: Wire) -> None:
        self._target, self._wire = target, wire
        self._selected = self._stopped_at = min(target.vcpus)
        self._leaving = False
        self._handlers: dict[bytes, Callable[[str, bytes], bytes | None]] = {
            b"?": lambda rest, raw: self._stop_reply(Stop(SIGTRAP, self._stopped_at)),
            b"g": self._read_all,
            b"G": self._write_all,
            b"p": self._read_one,
            b"P": self._write_one,
            b"m": self._read_memory,
            b"M": lambda rest, raw: self._write_memory(rest.partition(":")[0], bytes.fromhex(rest.partition(":")[2])),
            b"X": lambda rest, raw: self._write_memory(rest.partition(":")[0], unescaped(raw.partition(b":")[2])),
            b"Z": self._insert,
            b"z": self._remove,
            b"H": self._select,
            b"T": lambda rest, raw: OK if self._vcpu_number(rest) is not None else _failure(errno.ESRCH),
            b"c": lambda rest, raw: self._go_on(rest, step=False),
            b"C": lambda rest, raw: self._go_on(rest.partition(";")[2], step=False),
            b"s": lambda rest, raw: self._go_on(rest, step=True),
            b"S": lambda rest, raw: self._go_on(rest.partition(";")[2], step=True),
            b"D": self._detach,
            b"k": self._kill,
            b"v": self._v,
            b"q": self._q,
            b"Q": self._set,
        }

    def run(self) -> None:
        """Until gdb detaches, kills the guest or closes the connection; the guest ends and gdb hears of it."""
        self._target.pause()
        try:
            while not self._leaving:
                packet = self._wire.wait(self._target.wake)
                if packet is None:
                    self._target.next_stop()
                    self._leaving = self._target.over
                elif packet and packet != INTERRUPT:
                    reply = self._answer(packet)
                    if reply is not None:
                        self._wire.send(reply)
        except (OSError, EOFError):
            pass  # gdb is gone: as if it had detached
        finally:
            self._target.leave()

    def _answer(self, packet: bytes) -> bytes | None:
        handler = self._handlers.get(packet[:1])
        if handler is None:
            return UNKNOWN
        try:
            return handler(packet[1:].decode("latin-1"), packet[1:])
        except _Refused as refused:
            return refused.reply
        except Unmapped:
            return _failure(errno.EFAULT)
        except TooMany:
            return _failure(errno.ENOSPC)
        except KvmError as error:
            return _failure(error.errno)
        except (UsageError, ValueError, OverflowError):
            return _failure(errno.EINVAL)

    # ---- threads

    @property
    def _vcpu(self) -> Vcpu:
        return self._target.vcpus[self._selected]

    def _vcpu_number(self, thread: str) -> int | None:
        number = int(thread, 16) - 1
        return number if number in self._target.vcpus else None

    def _select(self, rest: str, raw: bytes) -> bytes:
        thread = rest[1:]
        if thread in ("0", "-1"):
            self._selected = self._stopped_at
            return OK
        number = self._vcpu_number(thread)
        if number is None:
            return _failure(errno.ESRCH)
        self._selected = number
        return OK

    # ---- registers

    def _read_all(self, rest: str, raw: bytes) -> bytes:
        return b"".join(self._register(register) for register in GENERAL)

    def _register(self, register: gdb_registers.Register) -> bytes:
        data = gdb_registers.read(self._vcpu, register)
        return b"x" * 2 * register.size if data is None else data.hex().encode()

    def _write_all(self, rest: str, raw: bytes) -> bytes:
        data = bytes.fromhex(rest)
        if len(data) > sum(register.size for register in GENERAL):
            raise _Refused(errno.EINVAL)
        at = 0
        for register in GENERAL:
            part = data[at : at + register.size]
            at += register.size
            if len(part) == register.size and part != gdb_registers.read(self._vcpu, register):
                gdb_registers.write(self._vcpu, register, part)
        self._target.memory.forget()
        return OK

    def _numbered(self, text: str) -> gdb_registers.Register:
        number = int(text, 16)
        if not 0 <= number < len(gdb_registers.ALL):
            raise _Refused(errno.EINVAL)
        return gdb_registers.ALL[number]

    def _read_one(self, rest: str, raw: bytes) -> bytes:
        return self._register(self._numbered(rest))

    def _write_one(self, rest: str, raw: bytes) -> bytes:
        number, _, value = rest.partition("=")
        register, data = self._numbered(number), bytes.fromhex(value)
        if len(data) != register.size:
            raise _Refused(errno.EINVAL)
        gdb_registers.write(self._vcpu, register, data)
        self._target.memory.forget()
        return OK

    # ---- memory and breakpoints

    def _read_memory(self, rest: str, raw: bytes) -> bytes:
        address, _, size = rest.partition(",")
        data = self._target.memory.read(self._vcpu, int(address, 16), min(int(size, 16), MAX_READ))
        return data.hex().encode()

    def _write_memory(self, where: str, data: bytes) -> bytes:
        address, _, size = where.partition(",")
        if len(data) != int(size, 16):
            raise _Refused(errno.EINVAL)
        self._target.memory.write(self._vcpu, int(address, 16), data)
        return OK

    def _insert(self, rest: str, raw: bytes) -> bytes:
        kind, address, length = _point(rest)
        if kind == SOFTWARE:
            if length != A64_BYTES:
                raise _Refused(errno.EINVAL)
            self._target.memory.insert(self._vcpu, address)
        else:
            self._target.add(Point(kind, address, length))
        return OK

    def _remove(self, rest: str, raw: bytes) -> bytes:
        kind, address, length = _point(rest)
        if kind == SOFTWARE:
            self._target.memory.remove(address)
        else:
            self._target.remove(Point(kind, address, length))
        return OK

    # ---- running

    def _go_on(self, address: str, *, step: bool) -> bytes:
        if address:
            self._vcpu.set_reg("pc", int(address, 16))
        everyone = frozenset(self._target.vcpus)
        steps = frozenset((self._selected,)) if step else frozenset()
        return self._until_stop(steps, everyone - steps)

    def _v(self, rest: str, raw: bytes) -> bytes | None:
        if rest == "Cont?":
            return b"vCont;c;C;s;S"
        if rest.startswith("Cont;"):
            steps, runs = self._actions(rest[len("Cont;") :])
            return self._until_stop(steps, runs)
        if rest.startswith("Kill"):
            return self._kill(rest, raw)
        return UNKNOWN

    def _actions(self, text: str) -> tuple[frozenset[int], frozenset[int]]:
        """The first action that names a thread, or all, is its: (vCPUs that step, vCPUs that run)."""
        left, steps, runs = set(self._target.vcpus), set[int](), set[int]()
        for action in text.split(";"):
            what, _, thread = action.partition(":")
            number = self._vcpu_number(thread) if thread not in ("", "-1") else None
            if thread not in ("", "-1") and number is None:
                raise _Refused(errno.ESRCH)
            which = left.copy() if number is None else left & {number}
            if what[:1] in ("s", "S"):
                steps |= which
            elif what[:1] in ("c", "C"):
                runs |= which
            else:
                raise _Refused(errno.EINVAL)
            left -= which
        return frozenset(steps), frozenset(runs)

    def _until_stop(self, steps: frozenset[int], runs: frozenset[int]) -> bytes:
        target = self._target
        target.go(steps, runs)
        while True:
            packet = self._wire.wait(target.wake)
            if packet is None:
                stop = target.next_stop()
                if target.over:
                    return self._ended()
                if stop is not None:
                    return self._stop_reply(stop)
            elif packet == INTERRUPT:
                target.pause()
                stop = target.next_stop()
                return self._stop_reply(stop or Stop(SIGINT, self._selected))

    def _stop_reply(self, stop: Stop) -> bytes:
        if self._target.over:
            return self._ended()
        self._stopped_at = self._selected = stop.vcpu
        pc = gdb_registers.read(self._vcpu, gdb_registers.ALL[gdb_registers.PC]) or b""
        number = gdb_registers.PC
        return f"T{stop.signal:02x}{stop.reason}{number:02x}:{pc.hex()};thread:{stop.vcpu + 1:x};".encode()

    def _ended(self) -> bytes:
        self._leaving = True
        return b"W00"

    def _detach(self, rest: str, raw: bytes) -> bytes:
        self._leaving = True
        return OK

    def _kill(self, rest: str, raw: bytes) -> bytes | None:
        self._leaving = True
        self._target.board.finish("interrupted", "killed by gdb", self._selected)
        return OK if raw.startswith(b"Kill") else None

    # ---- questions and settings

    def _q(self, rest: str, raw: bytes) -> bytes:
        name, _, arguments = rest.partition(":")
        if name == "Supported":
            return SUPPORTED.encode()
        if name == "Xfer":
            return self._transfer(arguments)
        if name == "fThreadInfo":
            return b"m" + ",".join(f"{number + 1:x}" for number in sorted(self._target.vcpus)).encode()
        if name == "sThreadInfo":
            return b"l"
        if name == "C":
            return f"QC{self._selected + 1:x}".encode()
        if name == "Attached":
            return b"1"
        if name == "Symbol":
            return OK
        if rest.startswith("ThreadExtraInfo,"):
            number = self._vcpu_number(rest.partition(",")[2])
            return _failure(errno.ESRCH) if number is None else _text(gdb_monitor.state_of(self._target, number))
        if rest.startswith("Rcmd,"):
            command = bytes.fromhex(rest.partition(",")[2]).decode("utf-8", "replace")
            return _text(gdb_monitor.answer(self._target, self._vcpu, command))
        return UNKNOWN

    def _transfer(self, arguments: str) -> bytes:
        kind, _, rest = arguments.partition(":")
        if kind != "features" or not rest.startswith("read:target.xml:"):
            return UNKNOWN if kind != "features" else b"E00"
        offset, size = (int(text, 16) for text in rest.rpartition(":")[2].split(","))
        text = gdb_registers.target_xml()
        part = text[offset : offset + min(size, MAX_READ)]
        return (b"l" if offset + len(part) >= len(text) else b"m") + part

    def _set(self, rest: str, raw: bytes) -> bytes:
        if rest == "StartNoAckMode":
            self._wire.acknowledges = False
            return OK
        return UNKNOWN


def _text(text: str) -> bytes:
    return text.encode().hex().encode()


def _point(rest: str) -> tuple[str, int, int]:
    kind, address, length = rest.partition(";")[0].split(",")
    if kind not in ("0", "1", "2", "3", "4"):
        raise _Refused(errno.EINVAL)
    return kind, int(address, 16), int(length, 16)

"""What `hosts.traced` tells, as lines: for people like strace's, for programs JSON objects (schema kvm2.trace/1).

With `summary` the KVM_RUNs that follow each other become one line that counts their exits: a guest that prints a
sentence makes hundreds.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from kvm2.abi import exits, show

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.board.symbols import Symbols
    from kvm2.hosts.traced import Call, Event

SCHEMA = "kvm2.trace/1"
INDENT = "    "
WITHIN_A_KERNEL = "are the kernel's own affair and not in the trace"
# What boards for KVM use private interrupts for (the device tree of `board.linux`, as of QEMU and kvmtool).
_PPIS = {23: "PMU", 25: "vGIC maintenance", 27: "virtual timer", 30: "physical timer"}
_WAYS = {exits.KVM_EXIT_IO_IN: "in", exits.KVM_EXIT_IO_OUT: "out"}


class Ran(NamedTuple):
    """A row of KVM_RUNs of one vCPU: exits counted by what they were, and the seconds in the guest and the host."""

    first: Call
    exits: dict[str, int]
    seconds: float

    @property
    def total(self) -> int:
        """How many KVM_RUNs."""
        return sum(self.exits.values())


class Report:
    """A sink for a `Tracer`: writes a line, or several, for every call; `finish` writes what is still held back."""

    def __init__(
        self,
        write: Callable[[str], object],
        *,
        as_json: bool = False,
        summary: bool = False,
        symbols: Symbols | None = None,
    ) -> None:
        self._write = write
        self._symbols = symbols
        self._json = as_json
        self._summary = summary
        self._held: dict[str, Ran] = {}
        self._over = False
        self.calls = 0
        self.exit_code = 0  # for whoever calls `finish`

    def __call__(self, call: Call) -> None:
        """One call. After `finish` nothing is written: handles that somebody still holds are closed some time."""
        if self._over:
            return
        self.calls += 1
        if self._summary and _is_plain_run(call):
            held = self._held.get(call.on, Ran(call, {}, 0.0))
            key = exit_key(call)
            held.exits[key] = held.exits.get(key, 0) + 1
            self._held[call.on] = held._replace(seconds=held.seconds + call.seconds)
            return
        self._flush()
        self._call(call)

    def event(self, event: Event) -> None:
        """An interrupt, of a software KVM that was asked for them."""
        if not self._over:
            self._flush()
            self._line(json.dumps(event_dict(event)) if self._json else event_text(event))

    def start(self, host: str, *, interrupts: bool) -> None:
        """The first line: whose trace it is, and what is in it."""
        source = self._symbols.source if self._symbols is not None else None
        if self._json:
            first = {"schema": SCHEMA, "event": "start", "host": host, "interrupts": interrupts, "symbols": source}
            return self._line(json.dumps(first))
        what = "ioctls, exits and interrupts" if interrupts else f"ioctls and exits; interrupts {WITHIN_A_KERNEL}"
        return self._line(f"# {host}: {what}" + (f"; symbols of {source}" if source else ""))

    def _flush(self) -> None:
        for ran in self._held.values():
            if ran.total == 1:
                self._call(ran.first)
            else:
                self._line(json.dumps(ran_dict(ran)) if self._json else ran_text(ran))
        self._held.clear()

    def _call(self, call: Call) -> None:
        symbol = None if call.pc is None or self._symbols is None else self._symbols.name(call.pc)
        self._line(json.dumps(call_dict(call, symbol)) if self._json else "\n".join(call_lines(call, symbol=symbol)))

    def _line(self, text: str) -> None:
        self._write(text + "\n")

    def finish(self, exit_code: int) -> None:
        """The command is over."""
        self._flush()
        self._over = True
        if self._json:
            self._line(json.dumps({"schema": SCHEMA, "event": "end", "exit_code": exit_code, "calls": self.calls}))


def _is_plain_run(call: Call) -> bool:
    return call.exit is not None and call.error is None and not inner_of(call)


def inner_of(call: Call) -> tuple[Call, ...]:
    """The calls that were made for a call; () where it was passed on as it was, to the same end."""
    if len(call.inner) == 1 and _essence(call.inner[0]) == _essence(call):
        return ()
    return call.inner


def _essence(call: Call) -> tuple[object, ...]:
    error = None if call.error is None else call.error.errno
    return call.what, call.on, call.request, call.arg, call.result, call.made, error, call.stopped


def exit_key(call: Call) -> str:
    """An exit without its data: what repeats in a flood."""
    if call.exit is None:
        return call.name
    values = call.exit.fields
    match call.exit.name:
        case "KVM_EXIT_MMIO":
            way = "write" if values["is_write"] else "read"
            return f"KVM_EXIT_MMIO {way} {values['phys_addr']:#x}/{values['len']}"
        case "KVM_EXIT_IO":
            way = values["direction"]
            return f"KVM_EXIT_IO {_WAYS.get(way.number, '?')} {values['port'].name}/{values['size']}"
    return show.text(call.exit)


# -- text


def ran_text(ran: Ran) -> str:
    """One line for a row of KVM_RUNs."""
    counted = ", ".join(f"{count} x {key}" if count > 1 else key for key, count in ran.exits.items())
    return f"{ran.first.on} KVM_RUN x {ran.total} => {counted} <{ran.seconds:.6f}>"


def call_lines(call: Call, indent: str = "", symbol: str | None = None) -> list[str]:
    """The line of a call; below it, further in, its findings or its reason, and the calls that were made for it."""
    lines = [indent + _call_text(call, symbol)]
    lines += [f"{indent}{INDENT}{finding.name:<10} {finding.path}: {finding}" for finding in call.findings]
    if call.error is not None and not call.findings and call.error.reason:
        lines.append(f"{indent}{INDENT}{call.error.reason}")
    for one in inner_of(call):
        lines += call_lines(one, indent + INDENT)
    return lines


def _call_text(call: Call, symbol: str | None) -> str:
    where = " ".join(part for part in (call.thread and f"[{call.thread}]", call.on) if part)
    argument = "" if call.argument is None else show.text(call.argument)
    if isinstance(call.argument, bytes):
        argument = f"reply={call.argument.hex()}"  # what a KVM_RUN brings to the guest's read
    text = f"{where} {call.name}({argument})".lstrip() + result_text(call)
    if call.output is not None:
        text += f" => {show.text(call.output)}"
    if call.exit is not None:
        text += f" => {show.text(call.exit)}"
    if call.pc is not None:
        text += f" at {symbol or hex(call.pc)}"
    return f"{text} <{call.seconds:.6f}>"


def result_text(call: Call) -> str:
    """` = vm#1`, ` = -1 EINVAL (Invalid argument)`."""
    if call.error is not None:
        return f" = -1 {call.error.name} ({os.strerror(call.error.errno or 0)})"
    if call.stopped:
        return f" = ? ({call.stopped})"
    if call.made:
        return f" = {call.made}" if call.result == call.made_fd else f" = {call.result} ({call.made})"
    return "" if call.result is None else f" = {show.text(call.result)}"


def event_text(event: Event) -> str:
    """`vcpu#1.0 irq-ack intid=27 (PPI 11, virtual timer)`."""
    values = " ".join(_fact(key, value) for key, value in event.facts.items() if key != "vcpu")
    where = " ".join(part for part in (event.thread and f"[{event.thread}]", event.on) if part)
    return f"{where} {event.what} {values}".rstrip()


def _fact(key: str, value: int) -> str:
    if key == "intid":
        return f"intid={value} ({interrupt_name(value)})"
    return f"{key}={value if -10 < value < 10 else hex(value)}"


def interrupt_name(intid: int) -> str:
    """What an interrupt of the GIC is, by its number.

    >>> [interrupt_name(intid) for intid in (3, 27, 40, 1023, 8193)]
    ['SGI 3', 'PPI 11, virtual timer', 'SPI 8', 'none', 'LPI 8193']
    """
    if intid < 16:
        return f"SGI {intid}"
    if intid < 32:
        known = _PPIS.get(intid)
        return f"PPI {intid - 16}" + (f", {known}" if known else "")
    if intid >= 8192:
        return f"LPI {intid}"
    return "none" if 1020 <= intid < 1024 else f"SPI {intid - 32}"


# -- JSON


def event_dict(event: Event) -> dict[str, Any]:
    """The JSON object of an interrupt."""
    shown: dict[str, Any] = {"schema": SCHEMA, "event": "interrupt", "name": event.what, "on": event.on, **event.facts}
    if "intid" in event.facts:
        shown["interrupt"] = interrupt_name(event.facts["intid"])
    if event.thread:
        shown["thread"] = event.thread
    return shown


def call_dict(call: Call, symbol: str | None = None) -> dict[str, Any]:
    """The JSON object of a call; calls made for it are in `inner`, in the same form."""
    shown: dict[str, Any] = {"schema": SCHEMA, "event": call.what, "on": call.on, "name": call.name}
    if call.what == "ioctl":
        shown |= {"request": call.request, "arg": call.arg}
    shown["argument"] = show.plain(call.argument)
    shown |= {"result": call.result, "made": call.made or None, "seconds": round(call.seconds, 9)}
    if call.output is not None:
        shown["output"] = show.plain(call.output)
    if call.exit is not None:
        shown["exit"] = show.plain(call.exit)
    if call.pc is not None:
        shown |= {"pc": call.pc, "symbol": symbol}
    if call.error is not None:
        shown |= {"errno": call.error.name, "reason": call.error.reason}
    if call.stopped:
        shown["stopped"] = call.stopped
    if call.thread:
        shown["thread"] = call.thread
    shown["findings"] = [one.to_dict() for one in call.findings]
    shown["inner"] = [call_dict(one) for one in inner_of(call)]
    return shown


def ran_dict(ran: Ran) -> dict[str, Any]:
    """The JSON object of a row of KVM_RUNs."""
    counted = [{"exit": key, "count": count} for key, count in ran.exits.items()]
    return {
        "schema": SCHEMA,
        "event": "runs",
        "on": ran.first.on,
        "count": ran.total,
        "exits": counted,
        "seconds": round(ran.seconds, 9),
    }

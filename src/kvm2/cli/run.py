"""`kvm2 run`: run a guest."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from kvm2.cli.options import Seconds, host_option, json_option, spec_options, working_caps_option
from kvm2.cli.render import emit, table

if TYPE_CHECKING:
    from kvm2.board.loop import Board, RunResult, Unclaimed
    from kvm2.kvm import Kvm

QUIET_SECONDS = 1.0


@click.command("run", short_help="Run a guest.")
@click.argument("guest", required=False, type=click.Path(dir_okay=False))
@host_option
@working_caps_option
@spec_options
@click.option("--cpus", type=click.IntRange(min=1), default=1, show_default=True, help="vCPUs; PSCI starts the others.")
@click.option("--top", is_flag=True, help="Map 64K at the end of the IPA space (always done for the demonstration).")
@click.option("--no-params", is_flag=True, help="Enter the guest with x0 = 0, without a parameter block.")
@click.option("--timeout", type=Seconds(), metavar="SECONDS", help="Stop the guest after this time.")
@json_option
def command(host: str | None, working_caps: bool, guest: str | None, as_json: bool, cpus: int, **wanted: Any) -> int:
    """Run GUEST (an ELF64 or a flat image) on a host of its architecture, through KVM_CREATE_VM2.

    AArch64 runs on the described hosts, and where this machine is AArch64 on /dev/kvm; x86-64 on an x86-64 machine's
    /dev/kvm. Without --host the guest's architecture decides. The guest's console comes live on stdout, then a
    summary. Without GUEST the host's demonstration guest runs, which shows what the VM looks like from inside and what
    is at the edges of its address space. RAM is 64M@1G (x86-64: 64M@0) unless --memory says otherwise; docs/guest.md
    is the guest's contract.
    """
    from pathlib import Path

    from kvm2.board.loader import architecture_of, parse_image, read_file
    from kvm2.cli import choosing
    from kvm2.cli.making import call_of, make_vm, spec_of
    from kvm2.kvm import open as open_host

    call = call_of(wanted, spec_of(wanted))
    data = read_file(Path(guest)) if guest is not None else b""
    of_guest = architecture_of(data)
    console = Console(live=not as_json)
    with open_host(choosing.host_for(host, of_guest), working_caps=working_caps) as kvm:
        choosing.check_runs(kvm, Path(guest or "").name, of_guest)
        arch = kvm.arch
        spec = spec_of(wanted, choosing.default_memory(arch))
        choosing.check_memory(arch, spec.memory)
        image = parse_image(*(_demo(arch) if guest is None else (Path(guest).name, data)), spec.memory, arch)
        vm = make_vm(kvm, spec, call, wanted["type_word"])
        options: dict[str, Any] = {"cpus": cpus, "sink": console.put, "top": wanted["top"] or guest is None}
        with choosing.board_for(arch, kvm, spec, vm=vm, **options) as machine:
            machine.load(image, params=not wanted["no_params"])
            try:
                result = machine.run(wanted["timeout"], console.tick)
            except KeyboardInterrupt as stop:
                console.close()
                if not stop.args:  # a second Ctrl-C, while the vCPUs were being stopped
                    raise
                _report(kvm, machine, stop.args[0], guest, as_json)
                if as_json:
                    from kvm2.cli.main import JsonWritten

                    raise JsonWritten from None
                raise KeyboardInterrupt from None
            console.close()
            _report(kvm, machine, result, guest, as_json)
    return 0 if result.ok else 1


def _demo(arch: str) -> tuple[str, bytes]:
    from kvm2.guests import DEMO, DEMO_X86

    path = DEMO_X86 if arch == "x86_64" else DEMO
    return path.name, path.read_bytes()


class Console:
    """The guest's console on stdout: a line at a time, or each byte where somebody looks at a terminal."""

    def __init__(self, live: bool) -> None:
        self._out = sys.stdout.buffer if live else None
        self._line = bytearray()
        self._lock = threading.Lock()  # vCPUs put, the main thread ticks
        self._each = live and sys.stdout.isatty()
        self._status = sys.stderr.isatty()
        self._shown = self._silent_since_tick = False
        self._column = 0

    def put(self, byte: int) -> None:
        """One byte of the guest's."""
        self._silent_since_tick = False
        if self._out is None:
            return
        with self._lock:
            self._line.append(byte)
            if self._each or byte == 10 or len(self._line) > 4096:
                self._flush()

    def flush(self) -> None:
        """Everything so far."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._out is not None and self._line:
            self._wipe()
            self._column = 0 if self._line.endswith(b"\n") else 1
            self._out.write(self._line)
            self._out.flush()
            self._line.clear()

    def tick(self, seconds: float, exits: int) -> None:
        """A guest that says nothing: how long it runs and how many exits it made, on stderr."""
        self.flush()
        if self._status and seconds > QUIET_SECONDS and self._silent_since_tick and not self._column:
            self._shown = True
            print(f"\r\x1b[Krunning {seconds:.0f} s, {exits} exits (Ctrl-C stops)", end="", file=sys.stderr, flush=True)
        self._silent_since_tick = True

    def _wipe(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False

    def close(self) -> None:
        """The end of the guest's output, on a line of its own."""
        self.flush()
        self._wipe()
        if self._out is not None and self._column:
            self._out.write(b"\n")
            self._out.flush()


def _report(kvm: Kvm, machine: Board, result: RunResult, guest: str | None, as_json: bool) -> None:
    if as_json:
        return emit("run", _as_dict(kvm, machine, result, guest), ok=result.ok)
    sys.stdout.flush()
    print(f"\nended: {result.ended}{': ' + result.reason if result.reason else ''}, after {result.seconds:.2f} s")
    total = sum(result.exits.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in result.exits.items())
    size = f"{machine.ipa_bits} {machine.bits_name}"
    print(f"host {kvm.name}, {size}, {len(machine.vcpus)} vCPU; {total} exits: {kinds or 'none'}")
    if result.unclaimed_count:
        count, reads = result.unclaimed_count, machine.nothing_reads
        print(f"{count} accesses to addresses with nothing behind them (reads gave {reads}):")
        rows = [(_place(u), u.size, "write" if u.is_write else "read", u.count) for u in result.unclaimed[:16]]
        table(("address", "bytes", "access", "count"), rows)
        if len(result.unclaimed) > 16:
            print(f"... and {len(result.unclaimed) - 16} more addresses (--json has them)")
    if result.error is not None and result.error.findings:
        from kvm2.cli.render import show_findings

        show_findings(result.error.findings)
    return None


def _place(where: Unclaimed) -> str:
    return hex(where.address) if where.space == "memory" else f"{where.space} {where.address:#x}"


def _as_dict(kvm: Kvm, machine: Board, result: RunResult, guest: str | None) -> dict[str, Any]:
    unclaimed = [
        {
            "space": u.space,
            "address": u.address,
            "size": u.size,
            "access": "write" if u.is_write else "read",
            "count": u.count,
        }
        for u in result.unclaimed
    ]
    error = result.error
    return {
        "host": kvm.name,
        "arch": kvm.arch,
        "guest": guest or "demo",
        "ipa_bits": machine.ipa_bits,
        "cpus": len(machine.vcpus),
        "memory": [{"base": piece.base, "size": piece.size} for piece in machine.memory],
        "top": {"base": machine.top.base, "size": machine.top.size} if machine.top else None,
        "ended": result.ended,
        "reason": result.reason,
        "vcpu": result.vcpu,
        "seconds": round(result.seconds, 6),
        "exits": result.exits,
        "unclaimed": unclaimed,
        "unclaimed_count": result.unclaimed_count,
        "console": result.console.decode("utf-8", "replace"),
        "errno": error.name if error else None,
        "findings": [finding.to_dict() for finding in error.findings] if error else [],
    }

"""`kvm2 run` with a Linux: `--kernel FILE`, or `kvm2 run linux` with Debian's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO

from kvm2.cli.console import HELP, ROOM, Console, Escapes, Input, RawTerminal, input_descriptor
from kvm2.cli.linux_options import GICS, devices_of
from kvm2.cli.main import FAILED
from kvm2.cli.render import emit
from kvm2.cli.run_attached import attached, traced
from kvm2.cli.run_command import CommandOutput
from kvm2.cli.run_report import as_dict, show
from kvm2.cli.run_snapshot import UNFINISHED, check_save, machine_of, name_of, read_snapshot, save_to
from kvm2.errors import GuestError, Kvm2Error, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvm2.board.kernel_image import KernelImage
    from kvm2.board.linux import LinuxMachine
    from kvm2.board.loop import RunResult
    from kvm2.board.snapshot import Snapshot
    from kvm2.kvm import Kvm
    from kvm2.spec import VmSpec

# With the early console a kernel that stops early has said why.
CONSOLE = "console=ttyAMA0 earlycon"
# A kernel that panics while it has a command to run must end the machine, and messages would be among the output.
QUIET = "quiet loglevel=0 panic=-1"
LEFT = "left"  # by Ctrl-a x
LAST_WORDS = 12  # lines
PROMPT = b"kvm2:/# "  # of lab.linux.initramfs, whose import is for those who need it
PROMPT_END = PROMPT[-1]
CORE_BITS = 48  # of addresses that the emulated core executes
# By the kernel's page size: the field that says whether a vCPU has such a granule, and what it is where it has not.
MMFR0 = "ID_AA64MMFR0_EL1"
GRANULES = {4096: ("TGran4", -1), 16384: ("TGran16", 0), 65536: ("TGran64", -1)}


@dataclass(frozen=True, slots=True)
class Boot:
    """What is booted: the kernel, the initrd, the command line; `shown` is the kernel's name for people.

    Or a snapshot that is gone on with, without a kernel.
    """

    shown: str
    kernel: KernelImage | None
    initrd: bytes = b""
    append: str = ""
    snapshot: Snapshot | None = None


def run_linux(
    host: str | None, working_caps: bool, words: tuple[str, ...], as_json: bool, cpus: int, wanted: dict[str, Any]
) -> int:
    """Boot, give the console to whoever is there, and boot again as often as the guest wants; the exit code."""
    from kvm2.cli import choosing
    from kvm2.cli.making import call_of, spec_of
    from kvm2.kvm import open as open_host

    call = call_of(wanted, spec_of(wanted))
    if wanted["save"]:
        check_save(wanted["save"])
    snapshot = read_snapshot(wanted) if wanted["restore"] else None
    if snapshot is not None and host is None:
        name = str(snapshot.state["host"])
        _say(f"host {name} (the snapshot's; choose with --host or KVM2_HOST)")
    else:
        name = choosing.host_for(host, "arm64")
    terminal = not as_json and not words and input_descriptor() is not None and os.isatty(0)
    command = CommandOutput(Console(live=not as_json, as_it_is=True)) if words else None
    if snapshot is not None:
        boot = Boot(name_of(snapshot), None, snapshot=snapshot)
    else:
        boot = boot_of(words, command.token if command else "", terminal, wanted)
    # A Linux that is shown more uses it, and stops.
    shown: Literal["core", "profile"] = wanted["id_registers"] or "core"
    with traced(wanted, name) as ended, open_host(name, working_caps=working_caps, guest_ids=shown) as kvm:
        choosing.check_runs(kvm, boot.shown, "arm64")
        choosing.check_cpus(kvm, cpus)
        spec = spec_for(kvm, wanted) if snapshot is None else spec_of(wanted)  # the snapshot has its own
        check_reach(kvm, spec)
        run = Run(kvm, boot, spec, call, cpus, wanted, as_json)
        if command is not None:
            return ended(run.command(words, command))
        return ended(run.interactive() if terminal else run.piped())


def boot_of(words: tuple[str, ...], token: str, terminal: bool, wanted: dict[str, Any]) -> Boot:
    """The files, read; Debian's fetched first where they are wanted."""
    from kvm2.board.kernel_image import read_kernel
    from kvm2.board.loader import read_file

    more = wanted["append"] or ""
    if wanted["kernel"]:
        kernel = read_kernel(wanted["kernel"])
        initrd = read_file(wanted["initrd"]) if wanted["initrd"] else b""
        return Boot(wanted["kernel"].name, kernel, initrd, f"{CONSOLE} {more}".rstrip())
    from kvm2.lab.linux.files import DEFAULT_FLAVOUR, linux_files
    from kvm2.lab.linux.initramfs import settings

    files = linux_files(wanted["flavour"] or DEFAULT_FLAVOUR, _say)
    append = f"{CONSOLE} {QUIET if words else ''} {more}"
    initrd = files.initrd.read_bytes() + settings(_variables(words, token, terminal))
    return Boot(files.version, read_kernel(files.kernel), initrd, " ".join(append.split()))


def _variables(words: tuple[str, ...], token: str, terminal: bool) -> dict[str, str]:
    import shutil

    if words:
        # One word is a line for the shell, several are a program and its arguments.
        return {"KVM2_COMMAND": words[0] if len(words) == 1 else shlex.join(words), "KVM2_TOKEN": token}
    if terminal:
        size = shutil.get_terminal_size()
        return {"KVM2_ROWS": str(size.lines), "KVM2_COLUMNS": str(size.columns)}
    return {"KVM2_PLAIN": "1", "KVM2_SHELL": "-v"}  # nobody edits lines; what is read is shown


def _say(text: str) -> None:
    print(f"kvm2: {text}", file=sys.stderr, flush=True)


def spec_for(kvm: Kvm, wanted: dict[str, Any]) -> VmSpec:
    """The VM that the options ask for. Unless said otherwise its IPA size is the least that the memory needs."""
    from kvm2.board.linux_layout import DEFAULT_MEMORY
    from kvm2.cli.making import spec_of

    spec = spec_of(wanted, DEFAULT_MEMORY)
    by_memory = dataclasses.replace(spec, physaddr_bits="auto")
    chooses = spec.physaddr_bits is None and wanted["type_word"] is None and 2 in kvm.known_of(by_memory)
    return by_memory if chooses else spec


def check_reach(kvm: Kvm, spec: VmSpec) -> None:
    """UsageError for RAM above what a described host's vCPUs execute: Linux counts pages to there, and never ends."""
    from kvm2.hosts.soft import profile_of

    for piece in spec.memory:
        if piece.end > 1 << CORE_BITS and profile_of(kvm.backend) is not None:
            raise UsageError(
                f"memory {piece} ends above 2^{CORE_BITS}: the emulated core has {CORE_BITS} bits of addresses, "
                f"whatever the IPA size of {kvm.name}: give Linux RAM below"
            )


def check_granule(machine: LinuxMachine, kernel: KernelImage) -> None:
    """GuestError where vCPUs lack the translation granule of the kernel's page size: it would stop without a word."""
    from kvm2.abi import sysreg_fields

    if kernel.page_size is None:
        return
    name, absent = GRANULES[kernel.page_size]
    found = sysreg_fields.get(MMFR0, name, int(machine.vcpus[0].get_reg(MMFR0)))
    if found == absent:
        raise GuestError(
            f"{kernel.name} has pages of {kernel.page_size // 1024}K, which the vCPUs of {machine.kvm.name} cannot "
            f"translate ({MMFR0}.{name} is {found:#x}): take a kernel with other pages, or another host"
        )


@dataclass
class Run:
    """One `kvm2 run`, however often the guest boots. `machine` is there while the guest runs."""

    kvm: Kvm
    boot: Boot
    spec: VmSpec
    call: str
    cpus: int
    wanted: dict[str, Any]
    as_json: bool
    machine: LinuxMachine | None = None
    boots: int = 0
    left: bool = False
    quiet: bool = False  # a command's output is all that anybody wants
    lowered: list[str] = field(default_factory=list)
    last: LinuxMachine = field(init=False)  # the one of the last boot, also when it has ended
    saving: threading.Lock = field(default_factory=threading.Lock)  # held by Ctrl-a s: no machine is closed meanwhile

    # -- the three ways to run

    def interactive(self) -> int:
        """A terminal is the guest's, until the guest ends or somebody leaves."""
        console = Console(live=True, status=False)
        actions = {ord("x"): self._leave, ord("h"): _help, ord("s"): self._save_now}
        _say("Ctrl-a x leaves, Ctrl-a h helps")
        with RawTerminal(0), Input(0, self.feed, self.waiting, Escapes(actions)):
            result = self._run_guarded(console, console.put)
        return self._report(result, sys.stderr)

    def piped(self) -> int:
        """Output as it comes; what is piped in is typed once the shell is there, by whoever has no terminal."""
        console = Console(live=not self.as_json)
        ready = threading.Event()
        descriptor = input_descriptor()
        own = self.wanted["kernel"] is not None or self.boot.snapshot is not None
        if own:
            ready.set()  # nobody knows what it says before it reads; the UART keeps the input until it listens

        def put(byte: int) -> None:
            console.put(byte)
            if byte == PROMPT_END and self.machine is not None and self.machine.console.endswith(PROMPT):
                ready.set()

        with contextlib.ExitStack() as stack:
            if descriptor is not None:
                stack.enter_context(Input(descriptor, self.feed, self.waiting, start=ready))
            result = self._run_guarded(console, console.put if own else put)
        return self._report(result)

    def command(self, words: tuple[str, ...], output: CommandOutput) -> int:
        """One command: its output and its status; 1 with the guest's last words where it has none."""
        self.wanted["no_reboot"], self.quiet = True, True
        result = self._run_guarded(output.console, output.put)
        if self.as_json:
            emit("run", {**self._as_dict(result), "command": output.as_dict(words)}, ok=output.status == 0)
        elif output.status is None:
            reason = f" ({result.reason})" if result.reason else ""
            _say(
                f"{shlex.join(words)} has no status: the guest ended by itself, {result.ended}{reason}; its last words:"
            )
            for line in (
                output.unmarked(result.console).decode(errors="replace").replace("\r", "").splitlines()[-LAST_WORDS:]
            ):
                print(f"  {line}", file=sys.stderr)
        return FAILED if output.status is None else output.status

    # -- what they share

    def feed(self, data: bytes) -> None:
        """Input for the guest; between two boots there is nobody to take it."""
        if (machine := self.machine) is not None:
            try:
                machine.feed(data)
            except Kvm2Error:
                if machine is self.machine:  # else it has just ended
                    raise

    def waiting(self) -> int:
        """How much input the guest has not read."""
        machine = self.machine
        return ROOM if machine is None else machine.uart.waiting

    def _leave(self) -> None:
        self.left = True
        if (machine := self.machine) is not None:
            machine.finish(LEFT, "Ctrl-a x", 0)

    def _save_now(self) -> None:
        """Ctrl-a s: the guest stands still meanwhile, and goes on."""
        path = self.wanted["save"]
        if path is None:
            return _say_raw("Ctrl-a s: nowhere to save to; give --save FILE")
        with self.saving:
            if (machine := self.machine) is not None:
                try:
                    _say_raw(save_to(machine, path, self.boot.shown, self.wanted))
                except Kvm2Error as error:
                    _say_raw(f"not saved: {error}")
        return None

    def _run_guarded(self, console: Console, sink: Callable[[int], object]) -> RunResult:
        """`_run`; what was interrupted is reported, and the interrupt goes on."""
        try:
            return self._run(console, sink)
        except KeyboardInterrupt as stop:
            console.close()
            if not stop.args:  # before the guest ran, or a second Ctrl-C while the vCPUs were being stopped
                raise
            self._report(stop.args[0], sys.stderr)
            if self.as_json:
                from kvm2.cli.main import JsonWritten

                raise JsonWritten from None
            raise KeyboardInterrupt from None
        finally:
            console.close()

    def _run(self, console: Console, sink: Callable[[int], object]) -> RunResult:
        started, timeout = time.monotonic(), self.wanted["timeout"]
        while True:
            with self._made(sink) as machine:
                self.machine, self.last = machine, machine
                self.boots += 1
                if self.boots == 1:
                    self._say_lowered(machine)
                try:
                    if self.left:
                        machine.finish(LEFT, "Ctrl-a x", 0)
                    left = None if timeout is None else max(0.0, timeout - (time.monotonic() - started))
                    with attached(machine, self.wanted, wait=self.boots == 1):
                        result = machine.run(left, console.tick)
                    if result.ended == "timeout":  # of all boots together, not what was left for this one
                        result = dataclasses.replace(result, reason=f"still running after {timeout:g} s")
                except KeyboardInterrupt:
                    self._save_at_end(machine, "interrupted")
                    raise
                finally:
                    with self.saving:
                        self.machine = None
                self._save_at_end(machine, result.ended)
            if result.ended != "reset" or self.wanted["no_reboot"] or self.boot.kernel is None:
                return result
            console.flush()

    def _say_lowered(self, machine: LinuxMachine) -> None:
        """What the guest is shown less of than the host has: said where somebody reads it, and at its first boot."""
        from kvm2.hosts.soft import lowered_for

        self.lowered = [str(one) for one in lowered_for(self.kvm.backend, machine.vcpus[0].fd)]
        if self.lowered and not self.as_json and not self.quiet and self.boot.snapshot is None:
            names = ", ".join(sorted({one.split(" ")[0].partition(".")[2] for one in self.lowered}))
            _say_raw(
                f"not shown to the guest, as the emulated core does not execute it: {names} (--json has the values, "
                "--id-registers profile shows all)"
            )

    def _save_at_end(self, machine: LinuxMachine, ended: str) -> None:
        if self.wanted["save"] is not None and ended in UNFINISHED:
            _say_raw(save_to(machine, self.wanted["save"], self.boot.shown, self.wanted))

    def _made(self, sink: Callable[[int], object]) -> LinuxMachine:
        """A machine with the kernel in it, as every boot begins."""
        from kvm2.board.linux import LinuxMachine
        from kvm2.cli.making import make_vm

        devices = devices_of(self.wanted)
        kernel = self.boot.kernel
        try:
            if kernel is None:
                assert self.boot.snapshot is not None
                return machine_of(self.kvm, self.boot.snapshot, sink, devices)
            vm = make_vm(self.kvm, self.spec, self.call, self.wanted["type_word"])
            gic = GICS[self.wanted["gic"]] if self.wanted["gic"] else None
            machine = LinuxMachine(self.kvm, self.spec, vm=vm, cpus=self.cpus, sink=sink, virtio=devices, gic=gic)
        except BaseException:
            for device in devices:
                device.close()
            raise
        try:
            check_granule(machine, kernel)
            machine.load_linux(kernel, self.boot.initrd, self.boot.append)
            if self.wanted["dtb_out"] and not self.boots:
                write_file(self.wanted["dtb_out"], machine.dtb)
        except BaseException:
            machine.close()
            raise
        return machine

    # -- the end

    def _report(self, result: RunResult, file: TextIO | None = None) -> int:
        ok = result.ok or result.ended == LEFT
        if self.as_json:
            emit("run", self._as_dict(result), ok=ok)
        else:
            show(self.kvm, self.last, result, file)
        return 0 if ok else FAILED

    def _as_dict(self, result: RunResult) -> dict[str, Any]:
        linux = {"append": self.boot.append, "gic": self.last.gic.version, "boots": self.boots, "lowered": self.lowered}
        return {**as_dict(self.kvm, self.last, result, self.boot.shown), "linux": linux}


def write_file(path: Path, data: bytes) -> None:
    """UsageError where it cannot be written, in words."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _say_raw(text: str) -> None:
    """Words for people whose terminal may be raw."""
    raw = input_descriptor() is not None and os.isatty(0)
    print(f"\r\nkvm2: {text}\r" if raw else f"kvm2: {text}", file=sys.stderr, flush=True)


def _help() -> None:
    print("".join(f"\r\n{line}" for line in HELP), end="\r\n", file=sys.stderr, flush=True)

"""`kvm2 run`: run a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kvm2.cli.linux_options import check_linux, check_none, linux_options
from kvm2.cli.options import Seconds, host_option, json_option, spec_options, working_caps_option
from kvm2.cli.run_attached import attach_options
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from kvm2.board.loop import Board, RunResult
    from kvm2.kvm import Kvm

LINUX = "linux"


@click.command("run", short_help="Run a guest, or boot Linux.")
@click.argument("guest", required=False, type=click.Path(dir_okay=False))
@click.argument("words", nargs=-1, metavar="[-- COMMAND...]", type=click.UNPROCESSED)
@host_option
@working_caps_option
@spec_options
@click.option("--cpus", type=click.IntRange(min=1), default=1, show_default=True, help="vCPUs; PSCI starts the others.")
@click.option("--top", is_flag=True, help="Map 64K at the end of the IPA space (always done for the demonstration).")
@click.option("--no-params", is_flag=True, help="Enter the guest with x0 = 0, without a parameter block.")
@click.option("--timeout", type=Seconds(), metavar="SECONDS", help="Stop the guest after this time.")
@attach_options
@linux_options
@json_option
def command(
    host: str | None,
    working_caps: bool,
    guest: str | None,
    words: tuple[str, ...],
    as_json: bool,
    cpus: int,
    **wanted: Any,
) -> int:
    """Run GUEST (an ELF64 or a flat image), or boot Linux: `kvm2 run linux`, or --kernel with a kernel of yours.

    AArch64 runs on the described hosts, and where this machine is AArch64 on /dev/kvm; x86-64 on an x86-64 machine's
    /dev/kvm. Without --host the guest's architecture decides. The guest's console comes live on stdout, then a
    summary. Without GUEST the host's demonstration guest runs, which shows what the VM looks like from inside and what
    is at the edges of its address space. RAM is 64M@1G (x86-64: 64M@0) unless --memory says otherwise; docs/guest.md
    is the guest's contract.

    `kvm2 run linux` fetches Debian's arm64 kernel and busybox with apt, and boots to a shell, or runs COMMAND in it and
    ends with its status. On a terminal Ctrl-a x leaves. RAM is 512M@1G and the IPA size the least that the RAM needs,
    unless --memory and --ipa-bits say otherwise; docs/linux.md has the rest. A file of that name is ./linux.
    """  # fmt: skip
    if guest == LINUX or wanted["kernel"] or wanted["restore"]:
        from kvm2.cli.run_linux import run_linux

        given = click.get_current_context().get_parameter_source("cpus") is not ParameterSource.DEFAULT
        check_linux(guest, words, {**wanted, "cpus": cpus if given else None})
        return run_linux(host, working_caps, words, as_json, cpus, wanted)
    check_none(wanted)
    if words:
        raise UsageError(f"{' '.join(words)}: a COMMAND runs in Linux only, as in `kvm2 run linux -- COMMAND`")
    return _run_image(host, working_caps, guest, as_json, cpus, wanted)


def _run_image(
    host: str | None, working_caps: bool, guest: str | None, as_json: bool, cpus: int, wanted: dict[str, Any]
) -> int:
    from pathlib import Path

    from kvm2.board.loader import architecture_of, parse_image, read_file
    from kvm2.cli import choosing
    from kvm2.cli.console import Console
    from kvm2.cli.making import call_of, make_vm, spec_of
    from kvm2.cli.run_attached import attached, traced
    from kvm2.kvm import open as open_host

    call = call_of(wanted, spec_of(wanted))
    data = read_file(Path(guest)) if guest is not None else b""
    of_guest = architecture_of(data)
    console = Console(live=not as_json)
    name = choosing.host_for(host, of_guest)
    with traced(wanted, name) as ended, open_host(name, working_caps=working_caps) as kvm:
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
                with attached(machine, wanted):
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
        return ended(0 if result.ok else 1)


def _demo(arch: str) -> tuple[str, bytes]:
    from kvm2.guests import DEMO, DEMO_X86

    path = DEMO_X86 if arch == "x86_64" else DEMO
    return path.name, path.read_bytes()


def _report(kvm: Kvm, machine: Board, result: RunResult, guest: str | None, as_json: bool) -> None:
    from kvm2.cli.render import emit
    from kvm2.cli.run_report import as_dict, show

    if as_json:
        emit("run", as_dict(kvm, machine, result, guest or "demo"), ok=result.ok)
    else:
        show(kvm, machine, result)

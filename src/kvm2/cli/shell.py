"""`kvm2 shell`: a Python prompt with kvm, vm, vcpu and ram made."""

from __future__ import annotations

from typing import Any

import click

from kvm2.cli.options import chosen_host, host_option, json_option, spec_options, working_caps_option

PROGRAM = "<kvm2 shell>"  # what tracebacks call the program of -c


@click.command("shell", short_help="A Python prompt with kvm, vm and vcpu made.")
@host_option
@working_caps_option
@spec_options
@click.option("-c", "code", metavar="PROGRAM", help="Run this program instead of prompting.")
@json_option
def command(host: str | None, working_caps: bool, code: str | None, as_json: bool, **wanted: Any) -> int:
    """Open a Python prompt with `kvm`, `vm`, `vcpu` (initialised) and `ram` (64M@1G, or --memory) made.

    Without --ipa-bits an arm64 VM is as large as its memory needs ('auto'). On an x86-64 /dev/kvm `ram` is 64M@0, and
    the vCPU is as after a reset, with all CPUID leaves that the host can give.
    """
    import kvm2
    from kvm2.cli import choosing
    from kvm2.cli.making import call_of, make_vm, spec_of
    from kvm2.errors import UsageError
    from kvm2.kvm import open as open_host

    if as_json and code is None:
        raise UsageError("--json needs a program: kvm2 shell --json -c 'print(...)'; a prompt has no JSON form")
    call_of(wanted, spec_of(wanted))
    with open_host(chosen_host(host), working_caps=working_caps) as kvm:
        choosing.check_runs(kvm, "", None)
        if kvm.arch == "arm64" and wanted["ipa_bits"] is None and wanted["type_word"] is None:
            wanted["ipa_bits"] = "auto"
        spec = spec_of(wanted, choosing.default_memory(kvm.arch))
        choosing.check_memory(kvm.arch, spec.memory)
        with make_vm(kvm, spec, call_of(wanted, spec), wanted["type_word"]) as vm, vm.create_vcpu(0) as vcpu:
            rams = [vm.map(piece.base, piece.size) for piece in spec.memory]
            if kvm.arch == "arm64":
                vcpu.init(["psci_0_2"] + ["sve"] * (spec.sve is not None))
            else:
                vcpu.set_cpuid(kvm.supported_cpuid())
            names = {"kvm2": kvm2, "kvm": kvm, "vm": vm, "vcpu": vcpu, "ram": rams[0], "rams": rams}
            if code is None:
                return _prompt(names)
            return _program_as_json(code, names) if as_json else _program(code, names)


def _prompt(names: dict[str, Any]) -> int:
    import code
    import contextlib
    import sys

    if sys.stdin is None:
        from kvm2.errors import UsageError

        raise UsageError("standard input is closed: a prompt needs one; give a program with -c")

    with contextlib.suppress(ImportError):
        import readline
        import rlcompleter

        readline.set_completer(rlcompleter.Completer(names).complete)
        readline.parse_and_bind("tab: complete")
    banner = f"kvm2 on {names['kvm'].name}: kvm, vm, vcpu, ram (at {names['ram'].gpa:#x}). Ctrl-D leaves."
    code.interact(banner=banner, local=names, exitmsg="")
    return 0


def _program(code: str, names: dict[str, Any]) -> int:
    from kvm2.cli.main import FAILED, OK
    from kvm2.cli.render import program_failed
    from kvm2.errors import Kvm2Error

    try:
        exec(compile(code, PROGRAM, "exec"), names)
    except (Kvm2Error, BrokenPipeError):
        raise
    except Exception as error:
        program_failed(error, PROGRAM)
        return FAILED
    return OK


def _program_as_json(code: str, names: dict[str, Any]) -> int:
    import contextlib
    import io

    from kvm2.cli.main import FAILED, OK, code_of
    from kvm2.cli.render import emit, failure

    said = io.StringIO()
    result: dict[str, Any] = {}
    exit_code = OK
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(code, PROGRAM, "exec"), names)
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else FAILED * (stop.code is not None)
        result = failure(stop) if exit_code else {}
    except Exception as error:
        result, exit_code = failure(error), code_of(error) or FAILED
    emit("shell", {"host": names["kvm"].name, "output": said.getvalue(), **result}, ok=not exit_code)
    return exit_code

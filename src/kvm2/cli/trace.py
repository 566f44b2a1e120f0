"""`kvm2 trace`: another command, or a script, with every ioctl that it makes."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvm2.cli.options import host_option, json_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO


@click.command(
    "trace",
    short_help="Run a command, and show its ioctls decoded.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@host_option
@click.option("-o", "--output", type=click.Path(dir_okay=False), metavar="FILE", help="Write to FILE, not to stderr.")
@click.option(
    "--exits",
    type=click.Choice(["summary", "all"]),
    default="summary",
    show_default=True,
    help="Count the exits of KVM_RUNs that follow each other, or show each.",
)
@json_option
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARGS]...")
def command(host: str | None, output: str | None, exits: str, as_json: bool, words: tuple[str, ...]) -> int:
    """Run COMMAND, a command of kvm2 or a script PATH.py that uses kvm2, and show every ioctl that it makes.

    One line a call: descriptor, ioctl, argument, result, what came back, seconds; below it the findings of a refusal,
    and the calls that the kernel got for it. With --host the command has this host as its default (KVM2_HOST).
    --json writes JSON lines. The exit code is the command's.

    \b
    kvm2 trace create --host apple-m1
    kvm2 trace --host /dev/kvm -o trace.txt -- my_vmm.py --verbose
    """
    from kvm2.hosts import watched
    from kvm2.hosts.traced import Tracer
    from kvm2.lab.trace import Report

    name, *args = words
    _check(name)
    with _opened(output) as file:
        report = Report(_writer(file), as_json=as_json, summary=exits == "summary")
        with watched(Tracer(report).wrap), _default_host(host):
            code = _script(Path(name), args) if name.endswith(".py") else _command([name, *args])
        report.finish(code)
    if not report.calls and code == 0:
        print(f"kvm2: {name} made no ioctl in this process (replay, conform and scenarios let others)", file=sys.stderr)
    return code


def _check(name: str) -> None:
    from kvm2.cli.main import COMMANDS

    if name == "trace":
        raise click.UsageError("a trace of a trace: give the command itself")
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise click.UsageError(f"there is no script {name}")
    elif name not in COMMANDS:
        raise click.UsageError(
            f"{name!r} is neither a command of kvm2 nor a script: give {', '.join(COMMANDS)}, or PATH.py"
        )


@contextlib.contextmanager
def _opened(output: str | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stderr
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(output, "w", encoding="utf-8"))
        except OSError as error:
            from kvm2.errors import EnvironmentFault

            raise EnvironmentFault(f"{output} cannot be written: {error.strerror}; choose another --output") from error
        yield file


def _writer(file: TextIO) -> Callable[[str], None]:
    def write(text: str) -> None:
        if file is sys.stderr:
            sys.stdout.flush()  # in one terminal the two stay in order
        file.write(text)
        file.flush()

    return write


@contextlib.contextmanager
def _default_host(host: str | None) -> Iterator[None]:
    before = os.environ.get("KVM2_HOST")
    if host is not None:
        os.environ["KVM2_HOST"] = host
    try:
        yield
    finally:
        if host is not None:
            if before is None:
                del os.environ["KVM2_HOST"]
            else:
                os.environ["KVM2_HOST"] = before


def _command(words: list[str]) -> int:
    from kvm2.cli.main import main

    return main(words)


def _script(path: Path, args: list[str]) -> int:
    """Run a script as Python would: its own sys.argv and directory, and its traceback if it fails."""
    import runpy

    from kvm2.cli.main import FAILED, INTERRUPTED, OK
    from kvm2.cli.render import program_failed

    argv, paths = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(path), *args], [str(path.resolve().parent)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or OK
        print(stop.code, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        program_failed(error, str(path))
        return FAILED
    finally:
        sys.argv = argv
        sys.path[:] = paths
    return OK

"""The `kvm2` command: which subcommands there are, and what becomes of an error.

A subcommand's module is imported when it is used, and nothing else is: `kvm2 --help` must stay fast. Exit codes: 0 ok,
1 the thing asked for failed, 2 usage, 3 environment, 130 interrupt.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

OK, FAILED, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

OF_THE_SYSTEM = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
)

COMMANDS = {
    "hosts": "The described hosts: list them, or show one.",
    "describe": "What a host takes at VM creation: KVM_DESCRIBE_VM2.",
    "create": "Create a VM, or see why not, and show what it got.",
    "run": "Run a guest: create, load, run, show how it ended.",
    "plan": "Which hosts can take a VM, and what to ask for.",
    "explain": "What a type word of KVM_CREATE_VM means in each encoding.",
    "abi": "The interface: header, reference, numbers.",
    "scenarios": "The catalogue of users' pains: list, show, run.",
    "conform": "All recorded scenarios on a host, compared with a kernel or a model.",
    "replay": "Run a recorded sequence of ioctls on a host.",
    "trace": "Run a command, and show its ioctls decoded.",
    "oracle": "A live arm64 kernel in an emulated machine, with kvm2 inside.",
    "shell": "A Python prompt with kvm, vm and vcpu made.",
    "probe": "Record a host, this machine or another, as a described one.",
    "compare": "What differs between hosts, and the largest VM valid on all.",
    "completion": "Print the completion script of a shell.",
}


class NobodyReads(Exception):
    """A BrokenPipeError on its way through click, which would end with 1 for it."""


class LazyGroup(click.Group):
    """Subcommands by name; each is `command` in the module of its name in `kvm2.cli`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        module: Any = import_module(f"kvm2.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise NobodyReads from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from kvm2 import __version__

        click.echo(f"kvm2 {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def cli() -> None:
    """The KVM API with KVM_CREATE_VM2, on any described arm64 host and on the real /dev/kvm.

    Every command takes --json. Exit codes: 0 ok, 1 what was asked for failed, 2 usage, 3 environment, 130 interrupt.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    words = list(sys.argv[1:] if args is None else args)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us: what is said goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        code = _run(words)
        sys.stdout.flush()
    except (BrokenPipeError, NobodyReads):
        _no_more_output()  # whoever read it has seen enough
        return OK
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _no_more_output()
        print(f"kvm2: standard output cannot be written: {error.strerror}; write it to another place", file=sys.stderr)
        return ENVIRONMENT
    return code


def _no_more_output() -> None:
    # Python would complain once more when it flushes at exit.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> int:
    try:
        result = cli.main(args=words, prog_name="kvm2", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt) as stop:
        return _interrupted(words, stop)
    except (BrokenPipeError, NobodyReads):
        raise
    except Exception as error:
        return _failed(words, error)
    return result if isinstance(result, int) else OK


def _interrupted(words: list[str], stop: BaseException) -> int:
    if "--json" in words and not isinstance(stop.__cause__, JsonWritten) and not isinstance(stop, JsonWritten):
        from kvm2.cli.render import refusal

        refusal(words, stop, "interrupted")
    else:
        print("interrupted", file=sys.stderr)
    return INTERRUPTED


class JsonWritten(KeyboardInterrupt):
    """An interrupt after the command has written its one JSON object."""


def code_of(error: Exception) -> int | None:
    """The exit code for an error; None for one that is a defect."""
    from kvm2 import errors

    if isinstance(error, click.ClickException | errors.UsageError):
        return USAGE
    if isinstance(error, errors.EnvironmentFault) or _is_of_the_system(error):
        return ENVIRONMENT
    return FAILED if isinstance(error, errors.Kvm2Error) else None


def _is_of_the_system(error: Exception) -> bool:
    """A file that this user or this machine cannot have: nobody's defect."""
    return isinstance(error, OSError) and error.filename is not None and error.errno in OF_THE_SYSTEM


def _failed(words: list[str], error: Exception) -> int:
    code = code_of(error)
    if code is None:
        raise error
    from kvm2.cli.render import complaint, refusal

    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())) and "--json" not in words:
        print(error, file=sys.stderr)  # a group without a subcommand: its help
    elif "--json" in words:
        refusal(words, error)
    else:
        complaint(error)
    return code


if __name__ == "__main__":
    sys.exit(main())

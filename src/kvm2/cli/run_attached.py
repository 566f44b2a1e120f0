"""What is attached to a machine while it runs: a gdb stub, a trace. Each thing has one place here."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvm2.board.loop import Board

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

UNIX = "unix:"


class Address(_ParamType):
    """A TCP port of this machine, or unix:PATH."""

    name = "port|unix:path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int) or (value.startswith(UNIX) and value != UNIX):
            return value  # type: ignore[no-any-return]
        if value.isdecimal() and int(value) < 1 << 16:
            return int(value)
        return self.fail(f"{value!r}: allowed are a port up to 65535 (0: any that is free) and unix:PATH", param, ctx)


def attach_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options; in `wanted` under their names."""
    file = click.Path(dir_okay=False, path_type=Path)
    for option in reversed(
        (
            click.option("--gdb", type=Address(), help="Serve gdb at this port of localhost, or unix:PATH, and wait."),
            click.option("--trace", metavar="FILE", help="Write every ioctl, exit and interrupt here, '-' is stderr."),
            click.option("--trace-format", type=click.Choice(("text", "json")), help="Of --trace. [default: text]"),
            click.option("--system-map", type=file, help="Symbols for --trace: a System.map, or a vmlinux."),
        )
    ):
        command = option(command)
    return command


@contextmanager
def traced(wanted: dict[str, Any], host: str) -> Iterator[Callable[[int], int]]:
    """Hosts that are opened inside are traced, where --trace asks for it; the exit code goes through what is given."""
    if wanted["trace"] is None:
        others = [name for name in ("trace_format", "system_map") if wanted[name] is not None]
        if others:
            raise UsageError(f"--{others[0].replace('_', '-')} is about --trace FILE: give that too")
        yield lambda code: code
        return
    from kvm2.lab.run_trace import tracing

    as_json = wanted["trace_format"] == "json"
    with tracing(wanted["trace"], host, as_json=as_json, system_map=wanted["system_map"]) as report:

        def ended(code: int) -> int:
            report.exit_code = code
            return code

        yield ended


@contextmanager
def attached(board: Board, wanted: dict[str, Any], *, wait: bool = True) -> Iterator[None]:
    """What the options ask for is attached to a board that does not run yet. With `wait` the guest waits for gdb."""
    with ExitStack() as stack:
        if wanted["gdb"] is not None:
            from kvm2.board.gdb import serve

            server = stack.enter_context(serve(board, wanted["gdb"], wait=wait))
            if wait:
                print(f"kvm2: the guest waits for gdb: target remote {server.address}", file=sys.stderr, flush=True)
        yield

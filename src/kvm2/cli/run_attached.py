"""What is attached to a machine while it runs: a gdb stub. Each thing has one place here."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

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
    return click.option(
        "--gdb", type=Address(), help="Serve gdb at this port of localhost, or unix:PATH; the guest waits for it."
    )(command)


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

"""`kvm2 run --trace`: everything that a run asks of its host, with the guest's place in its code at each exit."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TextIO

from kvm2.errors import EnvironmentFault
from kvm2.hosts import is_real, watched
from kvm2.hosts.traced import Tracer
from kvm2.lab.trace import Report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STDERR = "-"


@contextmanager
def tracing(
    where: str, host: str | Path, *, as_json: bool = False, system_map: Path | None = None, summary: bool = False
) -> Iterator[Report]:
    """Trace every host that is opened inside of the block: to the file `where`, or to stderr for "-".

    `system_map` is a System.map or vmlinux whose symbols name the PC of each exit. With `summary` the KVM_RUNs that
    follow each other become one line. EnvironmentFault where the file cannot be written, GuestError where there are no
    symbols in `system_map`. Set `exit_code` of what is given to say how the command ended (0 unless it raises).
    """
    symbols = None
    if system_map is not None:
        from kvm2.board.symbols import read_symbols

        symbols = read_symbols(system_map)
    with ExitStack() as stack:
        file = sys.stderr if where == STDERR else stack.enter_context(_opened(where))

        def write(text: str) -> None:
            file.write(text)
            if file is sys.stderr:
                file.flush()

        report = Report(write, as_json=as_json, summary=summary, symbols=symbols)
        report.start(str(host), interrupts=not is_real(host))
        tracer = Tracer(report, events=report.event, pcs=True)
        try:
            with watched(tracer.wrap):
                yield report
        except BaseException:
            report.exit_code = report.exit_code or 1
            raise
        finally:
            report.finish(report.exit_code)


def _opened(where: str) -> TextIO:
    try:
        return open(where, "w", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{where} cannot be written: {error.strerror}; give --trace another file") from error

"""`kvm2 conform`: every recorded scenario on a host, and where its answers differ from those of a kernel or a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvm2.lab.conform import Conform, Conformance

OUT = click.Path(path_type=Path, dir_okay=False)


@click.command("conform")
@click.option("--host", required=True, metavar="H", help="A described host, a TOML file, /dev/kvm, or oracle:SHAPE.")
@click.option("--against", metavar="H2", help="Another host, recorded:NAME, or a file of answers. Default: the machine "
              "recorded under that name; for a real kernel the model that `kvm2 probe` makes of it.")  # fmt: skip
@click.option("--only", multiple=True, metavar="GLOB", help="Play only scenarios of such names. May be repeated.")
@click.option("--skip", multiple=True, metavar="GLOB", help="Leave out scenarios of such names. May be repeated.")
@click.option("--all", "everything", is_flag=True, hidden=True, help="For older scripts: all are played anyway.")
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Play on so many processes.")
@click.option("--patience", type=click.IntRange(1), default=150, show_default=True, metavar="MS",
              help="Interrupt a vCPU that sleeps or spins after so many milliseconds.")  # fmt: skip
@click.option("--html", type=OUT, help="Write the report as one HTML file.")
@click.option("--record", type=OUT, help="Write the host's answers to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (schema kvm2.conform/1).")
def command(
    host: str,
    against: str | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    everything: bool,
    jobs: int,
    patience: int,
    html: Path | None,
    record: Path | None,
    as_json: bool,
) -> int:
    """Play all recorded scenarios on a host, and say where it differs from a real kernel or a model.

    Exit code 0 when every difference has a name in the differences file, 1 otherwise.
    """
    from kvm2.cli.verdicts import check_writable, write_answers, write_file
    from kvm2.lab.conform import Conform, Wanted

    check_writable(html, record)
    prepared = Conform(Wanted(host, against, only, skip, patience, jobs))
    done, interrupted = _run(prepared)
    write_answers(done.report, record)
    if html is not None:
        from kvm2.lab.conform_html import page

        write_file(html, page(done))
    _print(done, as_json)
    if interrupted:
        if as_json:
            from kvm2.cli.main import JsonWritten

            raise JsonWritten
        raise KeyboardInterrupt
    return 0 if done.report.ok else 1


def _run(prepared: Conform) -> tuple[Conformance, bool]:
    """What was played, and whether an interrupt ended it early."""
    from kvm2.cli.progress import Progress
    from kvm2.lab.conform import Conformance

    try:
        with Progress(prepared.total) as progress:
            return prepared.run(progress), False
    except KeyboardInterrupt as stop:
        if not stop.args or not isinstance(stop.args[0], Conformance):
            raise
        return stop.args[0], True


def _print(done: Conformance, as_json: bool) -> None:
    """The report on standard output."""
    if as_json:
        from kvm2.cli.render import emit

        emit("conform", done.json(), ok=done.report.ok)
        return
    from kvm2.cli.verdicts import show_differences, totals_line

    show_differences(done.report, "recorded" if done.judge.record is not None else "against")
    for note in done.why:
        click.echo(note)
    click.echo(totals_line(done.report, f"{done.place.name} against {done.judge.name}"))
    if done.report.without_record:
        click.echo(f"without answers to compare with: {', '.join(done.report.without_record)}")

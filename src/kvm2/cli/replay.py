"""`kvm2 replay`: recorded scenarios on a described host, compared with what a real kernel answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvm2.lab.replay import Plan, Report

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("replay")
@click.argument("scenarios", type=FILE, required=False)
@click.option(
    "--host",
    help="The host to play on: described, a TOML file, /dev/kvm, oracle:SHAPE. Default: the one that --expect is from.",
)
@click.option("--expect", type=FILE, help="Recorded answers (.jsonl, also .xz or .gz) to compare with.")
@click.option("--untrusted", type=FILE, help="Rules of what not to believe of the records.")
@click.option("--only", multiple=True, metavar="GLOB", help="Play only scenarios of such names. May be repeated.")
@click.option("--skip", multiple=True, metavar="GLOB", help="Leave out scenarios of such names. May be repeated.")
@click.option("--guests", type=FILE, help="The guest programs. Default: guests.json beside SCENARIOS.")
@click.option("--record", type=click.Path(path_type=Path), help="Write the answers to this file.")
@click.option("--stage2", type=FILE, help="Compare stage-2 tables with the dumps of this file instead.")
@click.option("--patience", type=click.IntRange(1), default=150, show_default=True, metavar="MS",
              help="Interrupt a vCPU that sleeps or spins after so many milliseconds.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Play on so many processes.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (schema kvm2.replay/1).")
def command(
    scenarios: Path | None,
    host: str | None,
    expect: Path | None,
    untrusted: Path | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    guests: Path | None,
    record: Path | None,
    stage2: Path | None,
    patience: int,
    jobs: int,
    as_json: bool,
) -> int:
    """Play recorded SCENARIOS on a host and compare its answers with those of a real kernel.

    Without --expect the answers are printed, a line of JSON for each scenario. Exit code 1 when a step differs in a way
    that no entry of the differences file names.
    """
    from kvm2.cli.verdicts import check_writable
    from kvm2.errors import UsageError

    if (scenarios is None) == (stage2 is None):
        raise UsageError("give a file of scenarios, or --stage2 and a file of dumps")
    if stage2 is not None:
        return _stage2(stage2, host, as_json)
    assert scenarios is not None
    check_writable(record)
    plan = _plan(scenarios, host, expect, untrusted, only, skip, guests, patience, jobs)
    try:
        report = _play(plan, record)
    except Interrupted as stop:
        _print(stop.report, expect is not None, record is not None, as_json)
        if as_json:
            from kvm2.cli.main import JsonWritten

            raise JsonWritten from None
        raise KeyboardInterrupt from None
    _print(report, expect is not None, record is not None, as_json)
    return 0 if report.ok else 1


class Interrupted(Exception):
    """Ctrl-C, with what was played until then."""

    def __init__(self, report: Report) -> None:
        self.report = report


def _plan(
    scenarios: Path,
    host: str | None,
    expect: Path | None,
    untrusted: Path | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    guests: Path | None,
    patience: int,
    jobs: int,
) -> Plan:
    """Everything read from its files."""
    from kvm2.errors import UsageError
    from kvm2.lab.compare import load_differences, load_untrusted
    from kvm2.lab.engine import find_guests, load_guests
    from kvm2.lab.replay import Plan
    from kvm2.lab.scenarios import load_record, load_scenarios, select

    recorded = load_record(expect) if expect else None
    if host is None and recorded is None:
        raise UsageError("--host is needed: `kvm2 hosts` lists the described hosts")
    return Plan(
        host=host or (recorded.host if recorded else ""),
        scenarios=select(load_scenarios(scenarios), only, skip),
        guests=load_guests(guests or find_guests(scenarios)),
        record=recorded,
        untrusted=load_untrusted(untrusted) if untrusted else (),
        named=tuple(rule for rule in load_differences() if not rule.arch),
        patience_ms=patience,
        jobs=jobs,
    )


def _play(plan: Plan, record: Path | None) -> Report:
    """Plays; what was played until an interrupt is recorded too."""
    from kvm2.cli.progress import Progress
    from kvm2.cli.verdicts import write_answers
    from kvm2.lab.replay import Report, replay

    interrupted = False
    try:
        with Progress(len(plan.scenarios)) as progress:
            report = replay(plan, progress)
    except KeyboardInterrupt as interrupt:
        if not interrupt.args or not isinstance(interrupt.args[0], Report):
            raise
        report, interrupted = interrupt.args[0], True
    write_answers(report, record)
    if interrupted:
        raise Interrupted(report)
    return report


def _print(report: Report, compared: bool, recorded: bool, as_json: bool) -> None:
    """The report on standard output."""
    from kvm2.cli.verdicts import show_differences, totals_line

    if as_json:
        from kvm2.cli.render import emit

        answers = {} if compared else {"answers": {o.played.name: list(o.played.answers) for o in report.outcomes}}
        emit("replay", {**report.json(), **answers}, ok=report.ok)
        return
    show_differences(report)
    if not compared:
        if not recorded:
            click.echo("\n".join(report.record_lines()))
        return
    click.echo(totals_line(report, report.host))
    if report.without_record:
        click.echo(f"without recorded answers: {', '.join(report.without_record)}")


def _stage2(dumps: Path, host: str | None, as_json: bool) -> int:
    """Stage-2 tables against dumps of real ones."""
    from kvm2.errors import UsageError
    from kvm2.lab.stage2_replay import replay_stage2
    from kvm2.softkvm import profile

    if host is None:
        raise UsageError("--host is needed: the described host whose tables are compared")
    report = replay_stage2(dumps, profile.load(host))
    if as_json:
        from kvm2.cli.render import emit

        emit("replay", report.as_json(), ok=report.equal)
    else:
        for difference in report.differences:
            where = f"{difference.ipa_bits} bits, {difference.what}"
            click.echo(f"{where}: recorded {difference.recorded}, here {difference.here}")
        click.echo(
            f"{report.host}: {report.dumps} VMs, {report.compared} values compared, {len(report.differences)} different"
        )
    return 0 if report.equal else 1

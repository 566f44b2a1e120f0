"""Comparisons of answers as text: every difference, and the line of totals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

    from kvm2.lab.compare import Difference
    from kvm2.lab.replay import Report


def check_writable(*paths: Path | None) -> None:
    """UsageError where a file could not be written: said before anything is played, not after."""
    import os

    from kvm2.errors import UsageError

    for path in paths:
        if path is None:
            continue
        if os.path.isdir(path):
            raise UsageError(f"{path} is a directory: give the name of a file")
        existing = path if os.path.exists(path) else path.parent
        if not os.path.exists(existing):
            raise UsageError(f"{path}: there is no directory {path.parent}, or none that you may look into")
        if not os.access(existing, os.W_OK):
            raise UsageError(f"{path}: cannot be written: no permission")


def write_answers(report: Report, path: Path | None) -> None:
    """The answers of a report into a file of answers, where one is wanted."""
    if path is not None:
        write_file(path, "".join(line + "\n" for line in report.record_lines()))


def write_file(path: Path, text: str) -> None:
    """A file of UTF-8. EnvironmentFault where the system has no place for it."""
    from kvm2.errors import EnvironmentFault

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be written: {error.strerror}; choose another place") from error


def show_differences(report: Report, other: str = "recorded") -> None:
    """Every step that differs on stdout, and what went wrong inside on stderr. `other` is what the expected is."""
    for verdict in report.verdicts:
        if verdict.differences:
            click.echo(f"{verdict.scenario}: {verdict.equal} of {verdict.steps} steps equal")
            for difference in verdict.differences:
                click.echo(difference_text(difference, other))
    for name, lines in report.faults.items():
        click.echo(f"{name}: went wrong inside:\n  " + "\n  ".join(lines), err=True)


def totals_line(report: Report, sides: str) -> str:
    """The totals of a comparison on one line, after what was compared."""
    totals = report.totals()
    return (
        f"{sides}: {len(report.verdicts)} scenarios, {totals['steps']} steps: {totals['equal']} equal, "
        f"{totals['different']} different ({totals['named']} of them named), {totals['untrusted']} not believed"
    )


def difference_text(difference: Difference, other: str) -> str:
    """One step that differs, on three lines; of a register dump only the registers that do."""
    from kvm2.lab.compare import register_changes

    changes = register_changes(difference)
    name = f"  [{difference.name}]" if difference.name else ""
    head = f"  {difference.step:4} {difference.brief}{name}"
    if changes is not None:
        lines = [f"         {key}: {other} {want}, here {have}" for key, want, have in changes]
        return "\n".join([head, *lines])
    return f"{head}\n         {other:<8} {short(difference.expected)}\n         here     {short(difference.got)}"


def short(answer: object) -> str:
    import json

    text = json.dumps(answer)
    return text if len(text) <= 160 else f"{text[:150]}... ({len(text)} characters)"

"""`kvm2 scenarios`: the catalogue of users' pains, each of them played on the hosts that it is about, or elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvm2.cli.options import json_option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvm2.lab.catalogue.entries import Pain
    from kvm2.lab.catalogue.play import Outcome


@click.group("scenarios")
def command() -> None:
    """The catalogue of users' pains: list it, show one, play them."""


@command.command("list", short_help="List the entries.")
@json_option
def list_(as_json: bool) -> None:
    """List the entries: what each is about, where, and how many issues tell of it."""
    from kvm2.cli.render import emit, table
    from kvm2.lab.catalogue.entries import pains

    found = pains()
    if as_json:
        emit("scenarios", {"scenarios": [_summary(pain) for pain in found]})
        return
    rows = [(pain.name, pain.title, len(pain.hosts), len(pain.issues)) for pain in found]
    table(("name", "what happens", "hosts", "issues"), rows)


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from kvm2.lab.catalogue.entries import pains

    return [pain.name for pain in pains() if pain.name.startswith(incomplete)]


@command.command("show", short_help="Show one entry: story, issues, steps, expected answers.")
@click.argument("name", shell_complete=_complete)
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one entry: its story, the issues, what is asked and expected, and the command to try it."""
    from kvm2.cli.render import emit
    from kvm2.lab.catalogue.entries import find

    pain = find(name)
    if as_json:
        emit("scenarios", {**_summary(pain), "steps": list(pain.steps)})
        return
    click.echo(f"{pain.name}: {pain.title}\n")
    for title, text in (("what happens", pain.story), ("today", pain.today), ("instead", pain.instead)):
        click.echo(f"{title:<13}{text}")
    for title, lines in (("issues", pain.links), ("hosts", (", ".join(pain.hosts),))):
        for index, line in enumerate(lines):
            click.echo(f"{title if not index else '':<13}{line}")
    if pain.source:
        click.echo(f"{'comes from':<13}{pain.source}")
    click.echo(f"{'holds where':<13}{pain.applies}\n{'try it':<13}{pain.command}\n\nsteps:")
    for step in pain.steps:
        click.echo(f"  {_step(step)}\n      -> {_expected(step.get('expect', 'ok'))}")


@command.command("run", short_help="Play entries, on their hosts or on any other.")
@click.argument("names", nargs=-1, shell_complete=_complete)
@click.option("--host", metavar="H", help="Play them on this host: a described one, a TOML file, /dev/kvm, "
              "oracle:SHAPE. Default: on the hosts that each is about.")  # fmt: skip
@json_option
def run(names: tuple[str, ...], host: str | None, as_json: bool) -> int:
    """Play entries (all of them without NAMES) and say where an answer is not the expected one.

    With --host an entry is judged where it says something of that host. Exit code 1 when an answer is another one, or
    when nothing could be judged.
    """
    from kvm2.cli.progress import Progress
    from kvm2.cli.render import emit
    from kvm2.lab.catalogue.entries import find, pains
    from kvm2.lab.catalogue.play import ok
    from kvm2.lab.catalogue.play import run as play

    chosen = tuple(find(name) for name in dict.fromkeys(names)) or pains()
    total = len(chosen) if host is not None else sum(len(pain.hosts) for pain in chosen)
    outcomes: list[Outcome] = []
    with Progress(total) as progress:
        outcomes.extend(play(chosen, host, progress))
    good = ok(outcomes)
    if as_json:
        emit("scenarios", {"outcomes": [outcome.json() for outcome in outcomes], "totals": _totals(outcomes)}, ok=good)
    else:
        _print(outcomes, [pain.name for pain in chosen], by_host=host is not None)
    return 0 if good else 1


def _summary(pain: Pain) -> dict[str, Any]:
    keys = ("name", "title", "hosts", "applies", "source", "story", "today", "instead", "command")
    return {**{key: getattr(pain, key) for key in keys}, "issues": list(pain.links)}


def _totals(outcomes: Sequence[Outcome]) -> dict[str, int]:
    verdicts = [outcome.verdict for outcome in outcomes]
    return {"as_expected": verdicts.count("yes"), "not": verdicts.count("no"), "not_about_it": verdicts.count("-")}


def _print(outcomes: Sequence[Outcome], names: Sequence[str], by_host: bool) -> None:
    from kvm2.cli.render import table

    if by_host:
        rows = [(outcome.pain.name, outcome.verdict, outcome.pain.title) for outcome in outcomes]
        table(("scenario", "as expected", "what happens"), rows)
    else:
        found = {name: [o for o in outcomes if o.pain.name == name] for name in names}
        rows = [(name, _overall(some), ", ".join(some[0].pain.hosts)) for name, some in found.items()]
        table(("scenario", "as expected", "hosts"), rows)
    for outcome in outcomes:
        for line in _complaints(outcome):
            click.echo(line)
    totals = _totals(outcomes)
    text = f"{totals['as_expected']} as expected, {totals['not']} not"
    more = f", {totals['not_about_it']} say nothing of this host" if totals["not_about_it"] else ""
    click.echo(f"\n{len(outcomes)} played: {text}{more}")


def _overall(outcomes: Sequence[Outcome]) -> str:
    verdicts = {outcome.verdict for outcome in outcomes}
    return "no" if "no" in verdicts else "yes" if "yes" in verdicts else "-"


def _complaints(outcome: Outcome) -> list[str]:
    wrong = [f"  step {number}, {step.brief}: {step.wrong}" for number, step in enumerate(outcome.steps) if step.wrong]
    wrong += [f"  went wrong inside: {fault}" for fault in outcome.faults]
    return [f"\n{outcome.pain.name} on {outcome.host}:", *wrong] if wrong else []


def _step(step: Mapping[str, Any]) -> str:
    from kvm2.lab.compare import brief

    condition = f"  (where {step['when']})" if "when" in step else ""
    return brief({key: value for key, value in step.items() if key not in ("expect", "when")}) + condition


def _expected(expect: Any) -> str:
    if not isinstance(expect, dict):
        return {"ok": "success", "any": "any answer"}.get(str(expect), str(expect))
    parts = [str(expect["errno"])] if "errno" in expect else []
    for key, value in expect.items():
        if key != "errno":
            fields = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            parts.append(f"{key}: {fields}")
    return "; ".join(parts)

"""Plays entries of the catalogue on hosts, and judges the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvm2.errors import EnvironmentFault, UsageError
from kvm2.lab.catalogue import facts as host_facts
from kvm2.lab.catalogue.entries import Pain
from kvm2.lab.catalogue.expressions import Facts, evaluate, resolve
from kvm2.lab.catalogue.judge import complaint
from kvm2.lab.compare import brief
from kvm2.lab.engine import PATIENCE_MS, Played, play
from kvm2.lab.oplist import check
from kvm2.lab.places import Place, place_of
from kvm2.lab.pool import Pool
from kvm2.lab.scenarios import Answer, Scenario, Step

Player = Callable[[Scenario], Played]
YES, NO, NOT_HERE = "yes", "no", "-"


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """One step as it was played: its text, what was expected, the answer, and what is wrong with it ("" = nothing)."""

    brief: str
    expect: Any
    answer: Answer
    wrong: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One entry on one host."""

    pain: Pain
    host: str
    steps: tuple[StepOutcome, ...] = ()
    faults: tuple[str, ...] = ()
    applies: bool = True

    @property
    def verdict(self) -> str:
        """Is everything as expected: "yes" or "no"; "-" where the entry says nothing of this host."""
        if not self.applies:
            return NOT_HERE
        return NO if self.faults or any(step.wrong for step in self.steps) else YES

    def json(self) -> dict[str, Any]:
        """For JSON."""
        steps = [{"step": s.brief, "expect": s.expect, "answer": s.answer, "wrong": s.wrong} for s in self.steps]
        return {
            "name": self.pain.name,
            "host": self.host,
            "verdict": self.verdict,
            "steps": steps,
            "faults": list(self.faults),
        }


@contextmanager
def player_of(place: Place) -> Iterator[Player]:
    """Who plays on a host: for a described one this process (no entry runs a guest), else a worker."""
    if place.is_real:
        with Pool(place.name, {}) as pool:
            yield lambda scenario: pool.play_one(scenario, PATIENCE_MS)
        return
    from kvm2.lab.worker import machine

    new_machine = machine(place.name)
    yield lambda scenario: play(new_machine(), scenario, {})


def facts_of(place: Place, player: Player) -> Facts:
    """The facts of a host, asked of it."""
    played = player(host_facts.questions(place.arch))
    if played.faults:
        raise EnvironmentFault(f"{place.name}: {'; '.join(played.faults)}")
    return host_facts.read(played.answers, place.arch, place.page_size)


def run(
    pains: Sequence[Pain], host: str | None = None, progress: Callable[[str], None] = lambda name: None
) -> Iterator[Outcome]:
    """Each entry on each of its hosts, or all on `host`; in the entries' order for each host."""
    hosts = [host] if host is not None else list(dict.fromkeys(name for pain in pains for name in pain.hosts))
    known: dict[str, Facts] = {}
    for name in hosts:
        mine = [pain for pain in pains if host is not None or name in pain.hosts]
        place = place_of(name)
        with player_of(place) as player:
            facts = known[name] = facts_of(place, player)
            for pain in mine:
                yield play_one(pain, name, {**facts, **_source(pain, known)}, player)
                progress(pain.name)


def _source(pain: Pain, known: dict[str, Facts]) -> Facts:
    if not pain.source:
        return {}
    if pain.source not in known:
        place = place_of(pain.source)
        with player_of(place) as player:
            known[pain.source] = facts_of(place, player)
    return {f"source.{key}": value for key, value in known[pain.source].items()}


def play_one(pain: Pain, host: str, facts: Facts, player: Player) -> Outcome:
    """One entry on one host whose facts are known."""
    if not evaluate(pain.applies, facts):
        return Outcome(pain, host, applies=False)
    steps, expected = instantiate(pain, facts)
    scenario = Scenario(pain.name, steps)
    check(scenario)
    played = player(scenario)
    rows = zip(steps, expected, played.answers, strict=True)
    outcomes = tuple(StepOutcome(brief(step), want, got, complaint(want, got)) for step, want, got in rows)
    return Outcome(pain, host, outcomes, played.faults)


def instantiate(pain: Pain, facts: Facts) -> tuple[tuple[Step, ...], tuple[Any, ...]]:
    """The entry's steps and what they expect, with the host's numbers; a step whose `when` is false is left out."""
    words = {**host_facts.CONSTANTS, **facts}
    steps: list[Step] = []
    expected = []
    for row in pain.steps:
        try:
            if not evaluate(row.get("when", "1"), words):
                continue
            step: Mapping[str, Any] = {key: resolve(value, words) for key, value in row.items() if key != "when"}
        except UsageError as error:
            raise UsageError(f"scenario {pain.name!r}: {error}") from error
        steps.append({key: value for key, value in step.items() if key != "expect"})
        expected.append(step.get("expect", "ok"))
    return tuple(steps), tuple(expected)


def ok(outcomes: Iterable[Outcome]) -> bool:
    """Whether everything that was judged is as expected, and anything was."""
    verdicts = [outcome.verdict for outcome in outcomes]
    return NO not in verdicts and YES in verdicts

"""`kvm2 replay`: plays recorded scenarios on a host and says where its answers differ from the recorded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvm2.errors import UsageError
from kvm2.lab.compare import Rule, Verdict, compare
from kvm2.lab.engine import PATIENCE_MS, Played
from kvm2.lab.lowering import RUN_TIMEOUT_MS
from kvm2.lab.oplist import check
from kvm2.lab.places import place_of
from kvm2.lab.pool import Pool
from kvm2.lab.scenarios import Record, Scenario, answer_line


@dataclass(frozen=True, slots=True)
class Outcome:
    """One scenario played, and its verdict where there are recorded answers to compare with."""

    played: Played
    verdict: Verdict | None


@dataclass(slots=True)
class Report:
    """A whole replay: the host, its outcomes in the scenarios' order, and the scenarios that no answers exist for."""

    host: str
    outcomes: list[Outcome] = field(default_factory=list)
    without_record: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts of the scenarios that were compared."""
        return [outcome.verdict for outcome in self.outcomes if outcome.verdict is not None]

    def totals(self) -> dict[str, int]:
        """`steps` compared = `equal` + `different`; `named` of the different ones; `untrusted` beside them."""
        verdicts = self.verdicts
        steps, equal = sum(verdict.steps for verdict in verdicts), sum(verdict.equal for verdict in verdicts)
        return {
            "steps": steps,
            "equal": equal,
            "named": sum(verdict.named for verdict in verdicts),
            "different": steps - equal,
            "untrusted": sum(verdict.untrusted for verdict in verdicts),
        }

    @property
    def faults(self) -> dict[str, tuple[str, ...]]:
        """Scenario -> what went wrong inside, where no kernel could have answered so."""
        return {outcome.played.name: outcome.played.faults for outcome in self.outcomes if outcome.played.faults}

    @property
    def ok(self) -> bool:
        """No difference without a name, and nothing went wrong inside."""
        totals = self.totals()
        return totals["different"] == totals["named"] and not self.faults

    def json(self) -> dict[str, Any]:
        """The report as `--json` prints it: the same for the same input, whatever the number of workers."""
        differences = [
            {
                "sc": difference.scenario,
                "step": difference.step,
                "op": difference.op,
                "brief": difference.brief,
                "expected": difference.expected,
                "got": difference.got,
                "name": difference.name,
            }
            for verdict in self.verdicts
            for difference in verdict.differences
        ]
        return {
            "host": self.host,
            "scenarios": len(self.outcomes),
            "totals": self.totals(),
            "differences": differences,
            "without_record": self.without_record,
            "faults": {name: list(lines) for name, lines in self.faults.items()},
        }

    def record_lines(self) -> Iterator[str]:
        """The answers as a file of answers: a header, then a line for each scenario."""
        import json

        yield json.dumps({"host": self.host, "by": "kvm2 replay"})
        for outcome in self.outcomes:
            yield answer_line(outcome.played.name, outcome.played.answers)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to play and what to compare it with."""

    host: str
    scenarios: Sequence[Scenario]
    guests: Mapping[str, bytes]
    record: Record | None = None
    untrusted: Sequence[Rule] = ()
    named: Sequence[Rule] = ()
    patience_ms: int = PATIENCE_MS
    jobs: int = 1

    def verdict(self, scenario: Scenario, played: Played) -> Verdict | None:
        """The comparison of one scenario; None where there are no answers to compare with."""
        if self.record is None or scenario.name not in self.record.answers:
            return None
        expected = self.record.answers[scenario.name]
        return compare(scenario, expected, played.answers, self.record.host, self.untrusted, self.named)


def replay(plan: Plan, progress: Callable[[str], None] = lambda name: None) -> Report:
    """Plays and compares. `progress` is called with each scenario's name as it is done.

    A vCPU that sleeps or spins is interrupted after `plan.patience_ms` instead of the step's own time. Where a scenario
    then differs, it is played again with the whole time, so that the short cut never makes a difference.
    An interrupt (Ctrl-C) ends it early: KeyboardInterrupt with the report so far as its argument.
    """
    place_of(plan.host)  # a host that there is not is better said here than by a worker
    for scenario in plan.scenarios:
        check(scenario)
    report = Report(plan.host)
    by_name = {scenario.name: scenario for scenario in plan.scenarios}
    outcomes: dict[str, Outcome] = {}
    try:
        with Pool(plan.host, plan.guests, plan.jobs) as pool:
            for played in pool.play(plan.scenarios, plan.patience_ms):
                outcomes[played.name] = Outcome(played, plan.verdict(by_name[played.name], played))
                progress(played.name)
            for name, outcome in outcomes.items():
                if _is_worth_the_whole_time(outcome) and plan.patience_ms < RUN_TIMEOUT_MS:
                    again = pool.play_one(by_name[name], RUN_TIMEOUT_MS)
                    outcomes[name] = Outcome(again, plan.verdict(by_name[name], again))
    except KeyboardInterrupt:
        _fill(report, plan, outcomes)
        raise KeyboardInterrupt(report) from None
    _fill(report, plan, outcomes)
    return report


def _is_worth_the_whole_time(outcome: Outcome) -> bool:
    return outcome.played.cut_short > 0 and outcome.verdict is not None and bool(outcome.verdict.differences)


def _fill(report: Report, plan: Plan, outcomes: Mapping[str, Outcome]) -> None:
    """The outcomes in the scenarios' order."""
    report.outcomes = [outcomes[scenario.name] for scenario in plan.scenarios if scenario.name in outcomes]
    if plan.record is not None:
        names = [scenario.name for scenario in plan.scenarios if scenario.name not in plan.record.answers]
        report.without_record = names
        if len(names) == len(plan.scenarios):
            raise UsageError("none of the scenarios has recorded answers: do the two files belong together?")

"""The judge: published answers of real arm64 kernels, on every host that they were recorded on.

The scenarios of the virtual interrupt controller are left out until there is one. `-m slow` (`make battery`) lets every
vCPU that sleeps or spins do so for as long as was recorded; the normal run does not wait.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from kvm2.lab.bundled import DATA
from kvm2.lab.compare import load_differences, load_untrusted
from kvm2.lab.engine import find_guests, load_guests
from kvm2.lab.lowering import RUN_TIMEOUT_MS
from kvm2.lab.replay import Plan, Report, replay
from kvm2.lab.scenarios import load_record, load_scenarios, select

ORACLE = DATA
HOSTS = sorted(path.name.removesuffix(".jsonl.xz") for path in (ORACLE / "results").iterdir())
# The published answers hold 210 scenarios with 5389 steps for each host.
SCENARIOS, STEPS = 210, 5389


def plan(host: str, skip: tuple[str, ...] = (), patience_ms: int = 150) -> Plan:
    """A host's own records, played on its description."""
    record = load_record(ORACLE / "results" / f"{host}.jsonl.xz")
    file = ORACLE / f"scenarios-{record.header['page']}.json.xz"
    return Plan(
        host=host,
        scenarios=select(load_scenarios(file), (), skip),
        guests=load_guests(find_guests(file)),
        record=record,
        untrusted=load_untrusted(ORACLE / "untrusted.json"),
        named=tuple(rule for rule in load_differences() if not rule.arch),
        patience_ms=patience_ms,
        jobs=2,
    )


@cache
def report(host: str) -> Report:
    """The normal run's report of a host, made once."""
    return replay(plan(host))


def check(report: Report) -> None:
    """No difference without a name, and enough was compared for that to mean something."""
    unnamed = [
        f"{difference.scenario} step {difference.step}: {difference.brief}: recorded {str(difference.expected)[:200]}, "
        f"here {str(difference.got)[:200]}"
        for verdict in report.verdicts
        for difference in verdict.differences
        if not difference.name
    ]
    assert not report.faults
    assert not unnamed, "\n".join([f"{len(unnamed)} differences without a name", *unnamed[:20]])
    assert not report.without_record


def test_the_published_records_are_all_here() -> None:
    assert len(HOSTS) == 19
    for host in HOSTS:
        answers = load_record(ORACLE / "results" / f"{host}.jsonl.xz").answers
        assert (len(answers), sum(map(len, answers.values()))) == (SCENARIOS, STEPS)


@pytest.mark.parametrize("host", HOSTS)
def test_answers_are_those_of_the_real_kernel(host: str) -> None:
    done = report(host)
    check(done)
    totals = done.totals()
    assert totals["steps"] + totals["untrusted"] > 5000
    assert totals["named"] < totals["steps"] / 100


def test_every_named_difference_is_still_there() -> None:
    """An entry that no longer matches anything is out of date: it would hide the next difference."""
    found = {
        name
        for host in HOSTS
        for verdict in report(host).verdicts
        for difference in verdict.differences
        for name in difference.name.split(", ")
    }
    here = [rule for rule in load_differences() if not rule.arch]
    normal = [rule.name for rule in here if not rule.sc.startswith(("vgic/", "irq/"))]
    assert [name for name in normal if name not in found] == []


def test_every_named_difference_is_explained() -> None:
    text = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
    assert [rule.name for rule in load_differences() if f"`{rule.name}`" not in text] == []


def test_one_and_two_processes_give_the_same_report() -> None:
    from dataclasses import replace

    two = plan("cortex-a53-4k", ("ipa/*", "vcpu/*"))
    assert replay(two).json() == replay(replace(two, jobs=1)).json()


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_answers_with_the_recorded_patience(host: str) -> None:
    check(replay(plan(host, patience_ms=RUN_TIMEOUT_MS)))

"""Every entry on its own hosts, with its expected answers; and that a wrong answer would be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvm2.errors import UsageError
from kvm2.hosts.real import refusal
from kvm2.lab.catalogue.entries import Pain, find, pains
from kvm2.lab.catalogue.play import facts_of, instantiate, ok, player_of, run
from kvm2.lab.places import place_of
from kvm2.softkvm import profile


@pytest.mark.parametrize("pain", pains(), ids=lambda pain: pain.name)
def test_every_entry_holds_on_its_own_hosts(pain: Pain) -> None:
    outcomes = list(run([pain]))
    assert [outcome.host for outcome in outcomes] == list(pain.hosts)
    for outcome in outcomes:
        wrong = [f"{step.brief}: {step.wrong}" for step in outcome.steps if step.wrong]
        assert outcome.verdict == "yes", (outcome.host, wrong, outcome.faults)
        assert not outcome.faults


@pytest.mark.parametrize("host", profile.names())
def test_every_entry_judges_every_described_host(host: str) -> None:
    """A rule is written for hosts of a kind: on a host that the entry was not written for it holds, or says nothing."""
    wrong = [
        (outcome.pain.name, [(step.brief, step.wrong) for step in outcome.steps if step.wrong], outcome.faults)
        for outcome in run(pains(), host)
        if outcome.verdict == "no"
    ]
    assert not wrong


@pytest.mark.skipif(bool(refusal()), reason=refusal())
def test_every_entry_judges_this_machines_kernel() -> None:
    outcomes = list(run(pains(), "/dev/kvm"))
    assert [(outcome.pain.name, outcome.steps) for outcome in outcomes if outcome.verdict == "no"] == []
    assert ok(outcomes)


def mutations(expect: Any) -> list[Any]:
    """Expectations that are near the right one, and wrong."""
    if isinstance(expect, dict):
        return [
            {**expect, key: {**value, inner: 12345}}
            for key, value in expect.items()
            if isinstance(value, dict)
            for inner in value
        ] + [{**expect, key: "ENOSPC" if key == "errno" else 12345} for key in ("errno", "value") if key in expect]
    return ["ENOSPC", 12345]


@pytest.mark.parametrize("pain", pains(), ids=lambda pain: pain.name)
def test_a_wrong_expectation_is_seen(pain: Pain) -> None:
    """Each expectation is changed a little, one at a time: every change must turn the verdict."""
    host = pain.hosts[0]
    seen = 0
    for index, step in enumerate(pain.steps):
        for wrong in mutations(step.get("expect", "ok")):
            steps = (*pain.steps[:index], {**step, "expect": wrong}, *pain.steps[index + 1 :])
            (outcome,) = run([replace(pain, steps=steps)], host)
            played = len(outcome.steps) == len(pain.steps) or any(one.expect == wrong for one in outcome.steps)
            assert outcome.verdict == "no" or not played, (step, wrong)
            seen += outcome.verdict == "no"
    assert seen


def test_an_entry_says_nothing_of_hosts_that_it_is_not_about() -> None:
    (outcome,) = run([find("default-40-on-36-bits")], "graviton3")
    assert (outcome.verdict, outcome.steps, ok([outcome])) == ("-", (), False)


def test_another_hosts_facts_are_where_a_vm_comes_from() -> None:
    pain = find("migrate-to-a-smaller-ipa")
    (outcome,) = run([pain], "apple-m1")
    assert outcome.verdict == "yes" and "create_vm2 same 48" in [step.brief for step in outcome.steps]


def test_a_step_that_does_not_hold_here_is_left_out() -> None:
    pain = find("one-of-two-calls")
    place = place_of("vm2-list-only")
    with player_of(place) as player:
        facts = facts_of(place, player)
    steps, expected = instantiate(pain, facts)
    assert [(step["op"], expect) for step, expect in zip(steps, expected, strict=True)] == [
        ("create_vm2", "ok"), ("create_vm2_fixed", "EINVAL"), ("create_vm", "ok"),
    ]  # fmt: skip


def test_a_mistake_in_an_entry_names_the_entry() -> None:
    pain = find("one-of-two-calls")
    broken = replace(pain, steps=({"op": "create_vm", "id": "vm", "type": "=limitt"},))
    with pytest.raises(UsageError, match="scenario 'one-of-two-calls': no fact 'limitt'"):
        list(run([broken]))
    with pytest.raises(UsageError, match="no operation 'creat_vm'"):
        list(run([replace(pain, steps=({"op": "creat_vm"},))]))


def test_json_has_every_step() -> None:
    (outcome, *_) = run([find("296-masked-to-40")])
    row = outcome.json()
    assert (row["name"], row["verdict"]) == ("296-masked-to-40", "yes")
    assert [step["step"] for step in row["steps"]] == ["create_vm old 296", "create_vm2 new 296"]
    assert row["steps"][1]["answer"][2]["findings"][0]["value"] == 296

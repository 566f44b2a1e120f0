"""conform: which answers judge, which rules apply, what is left out, and a real kernel where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault, UsageError
from kvm2.hosts.kernel import machine_arch
from kvm2.hosts.real import refusal
from kvm2.lab import conform, probed
from kvm2.lab.conform import Conform, Wanted
from kvm2.lab.places import KERNEL, Place, command_of
from kvm2.lab.scenarios import answer_line

SMALL = ("sys/api", "sys/check_ext_vm")


def names(done: conform.Conformance) -> set[str]:
    return {difference.name for verdict in done.report.verdicts for difference in verdict.differences}


def test_the_recorded_machine_of_the_same_name_judges() -> None:
    done = Conform(Wanted("neoverse-n1-4k", only=("run/aarch32*", "run/mmio_ldrsb"))).run()
    assert done.judge.name == "recorded:neoverse-n1-4k"
    assert names(done) == {"aarch32-not-executed"}
    assert done.report.ok and done.report.totals()["untrusted"] == 1
    assert done.groups() == {"run": {"equal": 1, "named": 1, "different": 0}}
    assert done.json()["groups"] == done.groups() and done.json()["against"] == done.judge.name


def test_every_scenario_is_played() -> None:
    prepared = Conform(Wanted("cortex-a53-4k"))
    assert len(prepared.scenarios) == 210 and prepared.left_out == prepared.why == ()


def test_two_described_hosts_have_no_excuses() -> None:
    prepared = Conform(Wanted("cortex-a72", "cortex-a53-4k", only=SMALL))
    assert prepared.total == 4
    calls: list[str] = []
    done = prepared.run(calls.append)
    assert sorted(calls) == sorted(SMALL * 2)
    assert not done.report.ok and names(done) == {""}
    limit = [d for v in done.report.verdicts for d in v.differences if d.brief == "check_ext vm 165"]
    assert [(d.expected, d.got) for d in limit] == [([40, 0], [44, 0])]
    assert prepared._rules() == ((), ())


def test_a_file_of_answers_judges(tmp_path: Path) -> None:
    done = Conform(Wanted("cortex-a53-4k", only=SMALL)).run()
    lines = list(done.report.record_lines())
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(lines) + "\n")
    assert Conform(Wanted("cortex-a53-4k", str(file), only=SMALL)).run().report.ok
    answers = json.loads(lines[1])["r"]
    answers[0] = [11, 0]
    file.write_text("\n".join([lines[0], answer_line("sys/api", answers), *lines[2:]]) + "\n")
    wrong = Conform(Wanted("cortex-a53-4k", str(file), only=SMALL)).run()
    assert not wrong.report.ok and wrong.report.totals()["different"] == 1


@pytest.mark.parametrize(
    ("wanted", "error", "text"),
    [
        (Wanted("apple-m1"), UsageError, "no real machine named 'apple-m1' was recorded"),
        (Wanted("cortex-a53-4k", "recorded:apple-m1"), UsageError, "no recorded answers of 'apple-m1'"),
        (Wanted("cortex-a53-4k", "max-16k-6.12"), UsageError, "pages of 4096 bytes and max-16k-6.12 of 16384"),
        (Wanted("cortex-a53-4k", "recorded:max-16k-6.12"), UsageError, "pages of 4096 bytes"),
        (Wanted("cortex-a53-4k", "x86-64"), UsageError, "nothing to compare"),
        (Wanted("cortex-a53-4k", only=("no/such",)), UsageError, "no scenario is left"),
        (Wanted("x86-64"), EnvironmentFault, "the scenarios are arm64's"),
        (Wanted("s390x", "recorded:max-4k-6.12"), EnvironmentFault, "describes an s390x host"),
        (Wanted("nowhere"), UsageError, "nowhere"),
    ],
)
def test_what_is_refused_before_anything_is_played(wanted: Wanted, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Conform(wanted)


def real_place(name: str = "/dev/kvm", machine: str = "max-4k-nvhe", kind: str = KERNEL) -> Place:
    return Place(name, machine, kind, "arm64", 4096, command_of("cortex-a53-4k"))


def test_a_real_kernel_is_judged_by_its_probed_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a described host in the kernel's place: what is probed is saved as a file, played, and gone afterwards."""
    known = conform.place_of
    monkeypatch.setattr(conform, "place_of", lambda host: real_place() if host == "/dev/kvm" else known(host))
    saved: list[Path] = []

    def save(place: Place, directory: Path) -> Path:
        saved.append(directory / f"{place.machine}.toml")
        saved[0].write_text('title = "Probed"\nbase = "cortex-a53-4k"\n')
        return saved[0]

    monkeypatch.setattr(probed, "save_model", save)
    prepared = Conform(Wanted("/dev/kvm", only=SMALL))
    assert (prepared.judge.name, prepared.judge.is_real, prepared.total) == ("the model of /dev/kvm", False, 4)
    untrusted, named = prepared._rules()
    assert named and untrusted and all(rule.ids for rule in untrusted)
    expected = prepared._play_judge(lambda name: None)
    assert expected.host == "max-4k-nvhe" and set(expected.answers) == set(SMALL)
    assert not saved[0].exists()


def test_rules_for_an_emulated_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Conform(Wanted("oracle:cortex-a53-4k", "cortex-a53-4k", only=SMALL))
    untrusted, named = prepared._rules()
    assert prepared._machine() == "cortex-a53-4k" and named
    assert any(not rule.ids for rule in untrusted)
    other = Conform(Wanted("cortex-a53-4k", "oracle:cortex-a57-4k", only=SMALL))
    assert other._machine() == "cortex-a57-4k" and other._rules() == prepared._rules()


def test_an_interrupt_keeps_what_was_played(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvm2.lab.pool import Pool

    prepared = Conform(Wanted("cortex-a53-4k", only=SMALL))
    played = Pool.play_one

    def stop(self: Pool, scenario: object, patience_ms: int) -> object:
        if getattr(scenario, "name", "") == SMALL[1]:
            raise KeyboardInterrupt
        return played(self, scenario, patience_ms)  # type: ignore[arg-type]

    monkeypatch.setattr(Pool, "play_one", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        prepared.run()
    (done,) = caught.value.args
    assert [verdict.scenario for verdict in done.report.verdicts] == [SMALL[0]]


@pytest.mark.skipif(machine_arch() == "arm64" or bool(refusal()), reason="needs a usable /dev/kvm that is not arm64's")
def test_the_generic_layer_of_this_machines_kernel() -> None:
    prepared = Conform(Wanted("/dev/kvm"))
    assert {scenario.name for scenario in prepared.scenarios} == {
        "sys/api", "slots/rules", "slots/region2", "slots/many", "slots/dirty_log", "vcpu/ids", "vcpu/many",
    }  # fmt: skip
    assert "what every architecture shares" in prepared.why[0]
    done = prepared.run()
    totals = done.report.totals()
    assert totals["steps"] == 210 and totals["equal"] >= 190
    if machine_arch() == "x86_64":
        assert done.report.ok, done.json()["differences"]
        assert all(name.startswith("x86-") for name in names(done))
        from kvm2.lab.compare import load_differences

        assert names(done) == {rule.name for rule in load_differences() if rule.arch == "x86_64"}
    with pytest.raises(UsageError, match="no scenario is left"):
        Conform(Wanted("/dev/kvm", only=("run/*",)))

"""The data that comes with the package."""

from __future__ import annotations

from kvm2.lab import bundled
from kvm2.lab.oplist import check
from kvm2.lab.oracle.shapes import SHAPES
from kvm2.lab.scenarios import Record, Scenario


def test_every_scenario_can_be_played_and_its_guests_are_there() -> None:
    for page in (4096, 16384):
        found = bundled.scenarios(page)
        assert len(found) == 210
        for scenario in found:
            check(scenario)
            assert {step["name"] for step in scenario.steps if step["op"] == "guest"} <= bundled.guests().keys()


def test_records_are_of_machines_that_can_be_had() -> None:
    for host in bundled.recorded_hosts():
        assert bundled.header_of(host)["page"] == SHAPES[host].page
        record = bundled.record(host)
        assert record is not None and record.host == host
    assert bundled.record("apple-m1") is None


def test_scenarios_without_waiting() -> None:
    record = bundled.record("max-4k-6.12")
    assert record is not None
    everything = bundled.scenarios(4096)
    quick = bundled.without_waiting(everything, record)
    names = {scenario.name for scenario in quick}
    assert {scenario.name for scenario in everything} - names >= {"run/wfi", "run/spin_signal"}
    assert {"sys/api", "run/fp", "sve/lifecycle"} <= names
    assert 180 < len(quick) < 210


def test_only_a_run_that_was_interrupted_waits() -> None:
    steps = ({"op": "run", "vcpu": "v0"}, {"op": "mp_state", "vcpu": "v0", "verb": "get"})
    chosen = [Scenario(name, steps) for name in ("a", "b", "c")]
    answers = {
        "a": [[0, 0, {"exit": "MMIO"}], [-1, "EINTR"]],
        "b": [[-1, "EINTR", {"exit": "INTR"}], [0, 0]],
        "c": ["skipped", [0, 0]],
    }
    assert [s.name for s in bundled.without_waiting(chosen, Record("h", {}, answers))] == ["a", "c"]

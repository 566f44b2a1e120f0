"""Replay as a whole: workers, crashes, the second try, recording, and the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click import Abort
from click.testing import CliRunner

from kvm2.cli.replay import command
from kvm2.errors import UsageError
from kvm2.hosts.soft import open_soft
from kvm2.lab.bundled import DATA
from kvm2.lab.compare import Rule
from kvm2.lab.engine import Played, load_guests, play
from kvm2.lab.pool import Pool
from kvm2.lab.replay import Plan, replay
from kvm2.lab.scenarios import Record, Scenario, Step, load_scenarios

HOST = "max-4k-6.12"
API: Step = {"op": "raw", "fd": "kvm", "nr": 0xAE00, "arg": 0}
SYSTEM = Scenario("sys/api", (API, {"op": "check_ext", "fd": "kvm", "cap": 165}))
GOOD = Record(HOST, {}, {"sys/api": [[12, 0], [52, 0]]})


def test_equal_and_different() -> None:
    done = replay(Plan(HOST, [SYSTEM], {}, GOOD))
    assert done.ok
    assert done.totals() == {"steps": 2, "equal": 2, "named": 0, "different": 0, "untrusted": 0}
    bad = Record(HOST, {}, {"sys/api": [[12, 0], [48, 0]]})
    assert not replay(Plan(HOST, [SYSTEM], {}, bad)).ok
    rule = Rule(name="cap-165", why="a test", op="check_ext")
    assert replay(Plan(HOST, [SYSTEM], {}, bad, named=[rule])).ok


def test_without_records_for_any_scenario() -> None:
    with pytest.raises(UsageError, match="do the two files belong together"):
        replay(Plan(HOST, [SYSTEM], {}, Record(HOST, {}, {})))


def test_a_wrong_host_and_a_wrong_step_are_said_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="no-such-host"):
        replay(Plan("no-such-host", [SYSTEM], {}))
    with pytest.raises(UsageError, match="no operation"):
        replay(Plan(HOST, [Scenario("x", ({"op": "y"},))], {}))


def test_workers_have_this_process_kvm2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wherever it was imported from: a module that only sys.path leads to is there in the worker too."""
    (tmp_path / "kvm2_only_here.py").write_text("from kvm2.lab.worker import main\nmain()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("kvm2.lab.pool.command_of", lambda host: (sys.executable, "-m", "kvm2_only_here"))
    with Pool(HOST, {}) as pool:
        assert pool.play_one(SYSTEM, 150).answers == ([12, 0], [52, 0])


def test_a_worker_that_dies_costs_one_scenario() -> None:
    with Pool(HOST, {}) as pool:
        first = pool.play_one(SYSTEM, 150)
        worker = pool._workers[0]
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        lost = pool.play_one(SYSTEM, 150)
        again = pool.play_one(SYSTEM, 150)
    assert first.answers == again.answers == ([12, 0], [52, 0])
    assert lost.answers == (None, None)
    assert "ended with code -9" in lost.faults[0]


def test_a_difference_after_a_short_cut_is_played_with_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = []

    def play_one(self: Pool, scenario: Scenario, patience_ms: int) -> Played:
        patience.append(patience_ms)
        late = patience_ms == 1500
        return Played(scenario.name, ([12, 0], [52, 0] if late else [-1, "EINTR"]), cut_short=not late)

    monkeypatch.setattr(Pool, "play_one", play_one)
    assert replay(Plan(HOST, [SYSTEM], {}, GOOD)).ok
    assert patience == [150, 1500]


@pytest.mark.parametrize("closed", [(), ("vm",)])
def test_client_memory_that_goes_away_is_a_fault_and_no_crash(closed: tuple[str, ...]) -> None:
    """A guest that ran from memory which is then unmapped: EFAULT, as a kernel hears of it through its MMU notifier."""
    oracle = DATA
    recorded = next(s for s in load_scenarios(oracle / "scenarios-4096.json.xz") if s.name == "ipa/36/access")
    until_it_ran = recorded.steps[:12]
    assert until_it_ran[-1]["op"] == "run"
    closing: list[Step] = [{"op": "close", "id": name} for name in closed]
    again: Step = {"op": "mp_state", "vcpu": "v0", "verb": "set", "value": 0}
    rest: list[Step] = [*closing, {"op": "close_mem", "id": "m"}, again, {"op": "run", "vcpu": "v0"}]
    played = play(open_soft(HOST), Scenario("gone", (*until_it_ran, *rest)), load_guests(oracle / "guests.json.xz"))
    assert played.answers[11] == [0, 0, {"exit": "SYSTEM_EVENT", "type": 1, "ndata": 1, "data0": 0}]
    assert played.answers[-1] == [-1, "EFAULT", {"exit": "UNKNOWN"}]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "s.json").write_text(json.dumps([{"sc": SYSTEM.name, "steps": list(SYSTEM.steps)}]))
    return tmp_path


def test_recording_and_comparing_with_it(files: Path) -> None:
    scenarios, record = str(files / "s.json"), str(files / "r.jsonl")
    done = CliRunner().invoke(command, [scenarios, "--host", HOST, "--record", record], standalone_mode=False)
    assert done.return_value == 0
    assert (files / "r.jsonl").read_text().splitlines()[1] == '{"sc":"sys/api","r":[[12,0],[52,0]]}'
    done = CliRunner().invoke(command, [scenarios, "--expect", record], standalone_mode=False)
    assert (done.return_value, done.output.split(": ", 1)[0]) == (0, HOST)
    done = CliRunner().invoke(
        command, [scenarios, "--expect", record, "--host", "cortex-a53-4k"], standalone_mode=False
    )
    assert done.return_value == 1
    assert "recorded [52, 0]" in done.output
    assert "here     [40, 0]" in done.output


def test_an_interrupt_keeps_what_was_played(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play_one_and_stop(self: Pool, scenarios: list[Scenario], patience_ms: int) -> Iterator[Played]:
        yield Played(SYSTEM.name, ([12, 0], [52, 0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(Pool, "play", play_one_and_stop)
    record = files / "r.jsonl"
    done = CliRunner().invoke(
        command, [str(files / "s.json"), "--host", HOST, "--record", str(record)], standalone_mode=False
    )
    assert isinstance(done.exception, Abort | KeyboardInterrupt)
    assert record.read_text().splitlines()[1] == '{"sc":"sys/api","r":[[12,0],[52,0]]}'


def test_answers_on_standard_output(files: Path) -> None:
    done = CliRunner().invoke(command, [str(files / "s.json"), "--host", HOST], standalone_mode=False)
    assert done.output.splitlines()[-1] == '{"sc":"sys/api","r":[[12,0],[52,0]]}'
    done = CliRunner().invoke(command, [str(files / "s.json"), "--host", HOST, "--json"], standalone_mode=False)
    report = json.loads(done.output)
    assert report["schema"] == "kvm2.replay/1"
    assert report["answers"] == {"sys/api": [[12, 0], [52, 0]]}


def test_what_is_asked_wrongly(files: Path) -> None:
    for arguments, text in (
        ([], "give a file of scenarios"),
        ([str(files / "s.json")], "--host is needed"),
        ([str(files / "absent.json"), "--host", HOST], "cannot be read"),
        ([str(files / "s.json"), "--host", HOST, "--only", "x"], "no scenario is left"),
        (["--stage2", str(files / "s.json")], "--host is needed"),
    ):
        done = CliRunner().invoke(command, arguments, standalone_mode=False)
        assert isinstance(done.exception, UsageError)
        assert text in str(done.exception)

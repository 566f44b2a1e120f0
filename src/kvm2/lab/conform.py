"""`kvm2 conform`: every recorded scenario on a host, and where its answers differ from a judge's.

The judge is a file of answers, the answers that come with kvm2 (`recorded:NAME`), or another host, which plays the same
scenarios first. What is real of the two sides decides which rules apply: untrusted ones for QEMU's machines, named
differences wherever a real kernel meets the software KVM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm2.errors import EnvironmentFault, UsageError
from kvm2.lab import bundled
from kvm2.lab.compare import load_differences
from kvm2.lab.engine import PATIENCE_MS
from kvm2.lab.places import DESCRIBED, Place, place_of
from kvm2.lab.replay import Plan, Report, replay
from kvm2.lab.scenarios import Record, Scenario, load_record, select

if TYPE_CHECKING:
    from kvm2.lab.compare import Rule

RECORDED_PREFIX = "recorded:"
ANSWER_FILES = (".jsonl", ".jsonl.xz", ".jsonl.gz")
# Nothing of these is arm64's: the generic layer of KVM, the same on every architecture.
EVERY_ARCH = ("sys/api", "slots/*", "vcpu/ids", "vcpu/many")
# Whose answers judge the generic layer of a KVM of another architecture.
GENERIC_JUDGE = "max-4k-6.12"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `kvm2 conform` is asked for."""

    host: str
    against: str | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    patience_ms: int = PATIENCE_MS
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class Judge:
    """Whose answers are the expected ones: `record` where they exist, else the `place` that plays them.

    With neither it is the software model of the host itself, which is probed when it is wanted. `machine` is the name
    that the rules' globs are matched with.
    """

    name: str
    machine: str
    record: Record | None = None
    place: Place | None = None

    @property
    def is_real(self) -> bool:
        """Whether a kernel gave the answers."""
        return self.record is not None or (self.place is not None and self.place.is_real)


@dataclass(frozen=True, slots=True)
class Conformance:
    """The finished comparison. `left_out` are the globs that were not played, and `why` says it in words."""

    report: Report
    place: Place
    judge: Judge
    left_out: tuple[str, ...]
    why: tuple[str, ...]

    def groups(self) -> dict[str, dict[str, int]]:
        """Group of scenarios -> how many scenarios are `equal`, differ with `named` differences only, or `differ`."""
        found: dict[str, dict[str, int]] = {}
        for verdict in self.report.verdicts:
            row = found.setdefault(group_of(verdict.scenario), {"equal": 0, "named": 0, "different": 0})
            row[state_of(len(verdict.differences), verdict.named)] += 1
        return found

    def json(self) -> dict[str, Any]:
        """The payload of schema kvm2.conform/1: a replay's report, and the two sides."""
        return {
            **self.report.json(),
            "against": self.judge.name,
            "arch": self.place.arch,
            "page_size": self.place.page_size,
            "groups": self.groups(),
            "left_out": list(self.left_out),
            "notes": list(self.why),
        }


def group_of(scenario: str) -> str:
    """The group of a scenario: its name up to the first `/`."""
    return scenario.split("/", 1)[0]


def state_of(different: int, named: int) -> str:
    """The state of a scenario with so many differences: `equal`, `named` (all of them are), or `different`."""
    return "equal" if not different else "named" if different == named else "different"


class Conform:
    """A comparison that is ready to run. Everything that can be refused is refused here.

    >>> done = Conform(Wanted("cortex-a53-4k", only=("sys/api",))).run()
    >>> done.judge.name, done.report.totals()["different"]
    ('recorded:cortex-a53-4k', 0)
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.place = place_of(wanted.host)
        self._check_arch()
        self.judge = _judge(wanted, self.place)
        self._check_page()
        self.left_out, self.why = self._left_out()
        skip = (*wanted.skip, *self.left_out)
        only = wanted.only or (() if self.place.arch == "arm64" else EVERY_ARCH)
        chosen = select(bundled.scenarios(self.place.page_size), only, skip)
        if self.place.arch != "arm64":
            chosen = select(chosen, EVERY_ARCH, ())
        self.scenarios: Sequence[Scenario] = chosen

    @property
    def total(self) -> int:
        """How many times a scenario will be played."""
        return len(self.scenarios) * (2 if self.judge.record is None else 1)

    def run(self, progress: Callable[[str], None] = lambda name: None) -> Conformance:
        """Plays. An interrupt ends it early: KeyboardInterrupt with the Conformance so far as its argument."""
        expected = self.judge.record or self._play_judge(progress)
        try:
            report = replay(self._plan(self.place.name, expected), progress)
        except KeyboardInterrupt as stop:
            if stop.args and isinstance(stop.args[0], Report):
                raise KeyboardInterrupt(self._done(stop.args[0])) from None
            raise
        return self._done(report)

    def _done(self, report: Report) -> Conformance:
        return Conformance(report, self.place, self.judge, self.left_out, self.why)

    def _plan(self, host: str, record: Record | None) -> Plan:
        untrusted, named = self._rules()
        patience, jobs = self.wanted.patience_ms, self.wanted.jobs
        return Plan(host, self.scenarios, bundled.guests(), record, untrusted, named, patience, jobs)

    def _play_judge(self, progress: Callable[[str], None]) -> Record:
        if self.judge.place is not None:
            return self._answers(self.judge.place.name, progress)
        from tempfile import TemporaryDirectory

        from kvm2.lab.probed import save_model

        with TemporaryDirectory(prefix="kvm2-") as directory:
            return self._answers(str(save_model(self.place, Path(directory))), progress)

    def _answers(self, host: str, progress: Callable[[str], None]) -> Record:
        report = replay(self._plan(host, None), progress)
        if report.faults:
            name, lines = next(iter(report.faults.items()))
            raise EnvironmentFault(f"{self.judge.name} could not play {name}: {'; '.join(lines)}")
        return Record(self._machine(), {}, {done.played.name: done.played.answers for done in report.outcomes})

    def _machine(self) -> str:
        """The name that rules are matched with: the real side's."""
        return self.judge.machine if self.judge.is_real else self.place.machine

    def _rules(self) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
        emulated = self.place.kind == "oracle" or self.judge.record is not None
        emulated = emulated or (self.judge.place is not None and self.judge.place.kind == "oracle")
        mixed = self.place.is_real or self.judge.is_real
        arch = "" if self.place.arch == "arm64" else self.place.arch
        named = tuple(rule for rule in load_differences() if rule.arch == arch) if mixed else ()
        untrusted = bundled.untrusted() if mixed else ()
        if not emulated:  # QEMU's faults are not this kernel's, but counters run everywhere
            untrusted = tuple(rule for rule in untrusted if rule.ids)
        return untrusted, named

    def _check_arch(self) -> None:
        if self.place.arch != "arm64" and self.place.kind == DESCRIBED:
            raise EnvironmentFault(
                f"{self.place.name} describes an {self.place.arch} host: the scenarios are arm64's, and of another "
                "architecture the software KVM only creates VMs; choose an arm64 host (`kvm2 hosts` lists them), or "
                "/dev/kvm"
            )

    def _check_page(self) -> None:
        other = self.judge.place.page_size if self.judge.place else _page_of(self.judge.record)
        if other and other != self.place.page_size:
            raise UsageError(
                f"{self.place.name} has pages of {self.place.page_size} bytes and {self.judge.name} of {other}: the "
                "scenarios of the two are not the same; choose two hosts of one page size"
            )

    def _left_out(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if self.place.arch != "arm64":
            why = (
                f"this KVM is {self.place.arch}'s and the scenarios are arm64's: compared is what every architecture "
                f"shares ({', '.join(EVERY_ARCH)})"
            )
            return (), (why,)
        return (), ()


def _page_of(record: Record | None) -> int:
    page = record.header.get("page") if record is not None else 0
    return page if isinstance(page, int) else 0


def _judge(wanted: Wanted, place: Place) -> Judge:
    against = wanted.against
    if against is None:
        return _default_judge(place)
    if against.startswith(RECORDED_PREFIX):
        return _recorded(against.removeprefix(RECORDED_PREFIX))
    if against.endswith(ANSWER_FILES):
        record = load_record(Path(against))
        return Judge(against, record.host, record)
    other = place_of(against)
    if other.arch != place.arch:
        raise UsageError(f"{place.name} is an {place.arch} host, {other.name} an {other.arch} one: nothing to compare")
    return Judge(other.name, other.machine, place=other)


def _recorded(name: str) -> Judge:
    record = bundled.record(name)
    if record is None:
        have = ", ".join(bundled.recorded_hosts())
        raise UsageError(f"no recorded answers of {name!r}; there are: {have}")
    return Judge(f"{RECORDED_PREFIX}{name}", name, record)


def _default_judge(place: Place) -> Judge:
    if place.arch != "arm64":
        return _recorded(GENERIC_JUDGE)
    if place.kind == DESCRIBED:
        if bundled.record_file(place.machine) is not None:
            return _recorded(place.machine)
        raise UsageError(
            f"no real machine named {place.machine!r} was recorded; say what to compare with: --against a host, a file "
            f"of answers (.jsonl), or recorded:NAME with one of {', '.join(bundled.recorded_hosts())}"
        )
    return Judge(f"the model of {place.name}", place.machine)

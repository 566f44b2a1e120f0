"""The scenarios, guest programs and recorded answers that come with kvm2.

19 machines answered 210 scenarios each: Linux 6.12 and 6.1 of Debian, whose KVM ran at EL2 of QEMU's emulation.

>>> "neoverse-n1-4k" in recorded_hosts()
True
>>> len(scenarios(4096))
210
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm2.lab.scenarios import Record, Scenario, load_record, load_scenarios, read_text

if TYPE_CHECKING:
    from kvm2.lab.compare import Rule

DATA = Path(__file__).with_name("data")
RESULTS = DATA / "results"
UNTRUSTED = DATA / "untrusted.json"
GUESTS = DATA / "guests.json.xz"  # assembled from guests.s beside it


def recorded_hosts() -> tuple[str, ...]:
    """The machines that answers are here of, sorted."""
    return tuple(sorted(path.name.removesuffix(".jsonl.xz") for path in RESULTS.glob("*.jsonl.xz")))


def record_file(host: str) -> Path | None:
    """The file of a machine's answers; None where there are none."""
    return RESULTS / f"{host}.jsonl.xz" if host in recorded_hosts() else None


def record(host: str) -> Record | None:
    """A machine's answers; None where there are none."""
    path = record_file(host)
    return load_record(path) if path is not None else None


@lru_cache(maxsize=32)
def header_of(host: str) -> Mapping[str, Any]:
    """The header of a machine's answers: its CPU, `page` (bytes), QEMU and kernel."""
    import json

    path = record_file(host)
    assert path is not None
    header: dict[str, Any] = json.loads(read_text(path).split("\n", 1)[0])
    return header


def scenario_file(page_size: int) -> Path | None:
    """The file of the scenarios for hosts of this page size; None where none was recorded."""
    path = DATA / f"scenarios-{page_size}.json.xz"
    return path if path.is_file() else None


def scenarios(page_size: int) -> tuple[Scenario, ...]:
    """The scenarios for hosts of this page size, in bytes: the published ones, or made anew where there are none."""
    path = scenario_file(page_size)
    if path is not None:
        return load_scenarios(path)
    from kvm2.lab.recipes import build

    return build(page_size)


@lru_cache(maxsize=1)
def guests() -> Mapping[str, bytes]:
    """The guest programs that the scenarios load."""
    from kvm2.lab.engine import load_guests

    return load_guests(GUESTS)


def untrusted() -> tuple[Rule, ...]:
    """What not to believe of the recorded answers, and of the emulated machines that they are from."""
    from kvm2.lab.compare import load_untrusted

    return load_untrusted(UNTRUSTED)


def without_waiting(chosen: Sequence[Scenario], recorded: Record) -> tuple[Scenario, ...]:
    """The scenarios in which no `run` had to be interrupted: none of their recorded runs ended with EINTR."""
    return tuple(
        scenario
        for scenario in chosen
        if not any(
            step["op"] == "run" and isinstance(answer, list) and answer[1] == "EINTR"
            for step, answer in zip(scenario.steps, recorded.answers.get(scenario.name, ()), strict=False)
        )
    )

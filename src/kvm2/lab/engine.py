"""Plays scenarios on a backend: one client per scenario, one answer per step.

>>> from kvm2.hosts.soft import open_soft
>>> from kvm2.lab.scenarios import Scenario
>>> scenario = Scenario("sys/api", ({"op": "check_ext", "fd": "kvm", "cap": 165},))
>>> play(open_soft("max-4k-6.12"), scenario, {}).answers
([52, 0],)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.errors import KvmError, UsageError
from kvm2.lab.client import Client, Undefined
from kvm2.lab.oplist import operations
from kvm2.lab.scenarios import SKIPPED, Answer, Scenario, read_json

if TYPE_CHECKING:
    from kvm2.hosts.backend import Backend

# A vCPU that sleeps or spins does so for ever: this long is enough to tell, and a tenth of what was recorded.
PATIENCE_MS = 150


@dataclass(frozen=True, slots=True)
class Played:
    """What one scenario gave: an answer for each step, how many runs were cut short, and what went wrong inside."""

    name: str
    answers: tuple[Answer, ...]
    cut_short: int = 0
    faults: tuple[str, ...] = ()
    seconds: float = 0.0


def play(backend: Backend, scenario: Scenario, guests: Mapping[str, bytes], patience_ms: int = PATIENCE_MS) -> Played:
    """Plays a scenario from start to end, and closes and unmaps all that it made.

    A step that fails in a way no kernel could gives no answer (None) and a line in `faults`; the next steps go on.
    """
    known, start = operations(), time.monotonic()
    client = Client(backend, guests, patience_ms)
    answers: list[Answer] = []
    faults: list[str] = []
    try:
        for index, step in enumerate(scenario.steps):
            try:
                answers.append(known[step["op"]].lower(client, step))
            except Undefined:
                answers.append(SKIPPED)
            except UsageError:
                raise
            except KvmError as error:
                answers.append(None)  # client memory that is not there: the recording program would have crashed
                faults.append(f"step {index}, {step['op']}: {error}")
            except Exception as error:
                answers.append(None)
                faults.append(f"step {index}, {step['op']}: {type(error).__name__}: {error}")
    finally:
        client.finish()
    return Played(scenario.name, tuple(answers), client.cut_short, tuple(faults), time.monotonic() - start)


def load_guests(path: Path | None) -> dict[str, bytes]:
    """The guest programs that `guest` steps load, name -> machine code; none without a file."""
    if path is None:
        return {}
    rows = read_json(path)
    try:
        return {name: bytes.fromhex(code) for name, code in rows.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f'{path}: a file of guests is {{"name": "hex digits", ...}}: {error}') from error


def find_guests(scenarios: Path) -> Path | None:
    """The file of guest programs beside a scenario file: `guests.json`, or that compressed."""
    for name in ("guests.json", "guests.json.xz", "guests.json.gz"):
        if (scenarios.parent / name).is_file():
            return scenarios.parent / name
    return None

"""The recorded scenarios in which no vCPU waits: on the software KVM, and on a live kernel in a warm machine."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping, Sequence

from bench.measure import Figure, Measured, Unavailable
from kvm2.lab.scenarios import Scenario

HOST = "max-4k-6.12"
ROUNDS = 3


def _scenarios() -> tuple[Scenario, ...]:
    from kvm2.lab import bundled

    record = bundled.record(HOST)
    assert record is not None
    return bundled.without_waiting(bundled.scenarios(4096), record)


def _machine() -> None:
    """The machine, built: that is not what is measured."""
    from kvm2.errors import EnvironmentFault
    from kvm2.lab.oracle.machine import build
    from kvm2.lab.oracle.shapes import shape
    from kvm2.lab.packages import INSTALL

    missing = [program for program in INSTALL if shutil.which(program) is None]
    if missing:
        raise Unavailable(f"the oracle needs {', '.join(missing)}")
    try:
        build(shape(HOST), lambda text: None)
    except EnvironmentFault as error:
        raise Unavailable(str(error)) from error


def _seconds(host: str, scenarios: Sequence[Scenario], guests: Mapping[str, bytes], warm: bool = False) -> float:
    """Wall time to the last answer: from starting the worker (or restoring the machine), or, with `warm`, of one that
    has answered before."""
    from kvm2.lab.engine import PATIENCE_MS
    from kvm2.lab.pool import Pool

    start = time.perf_counter()
    with Pool(host, guests) as pool:
        if warm:
            pool.play_one(scenarios[0], PATIENCE_MS)
            start = time.perf_counter()
        for played in pool.play(scenarios, PATIENCE_MS):
            if played.faults:
                raise AssertionError(f"{host}: {played.name}: {played.faults[0]}")
    return time.perf_counter() - start


def scenarios() -> Measured:
    """All of them, one after the other, in turns on both sides, by workers that are there already."""
    from kvm2.lab import bundled

    _machine()
    chosen, guests = _scenarios(), bundled.guests()
    ours, oracle = [], []
    for _ in range(ROUNDS):
        ours.append(_seconds(HOST, chosen, guests, warm=True))
        oracle.append(_seconds(f"oracle:{HOST}", chosen, guests, warm=True))
    a, b = min(ours), min(oracle)
    return Measured(a / b, a, b, "s")


def first_answer() -> Measured:
    """The first answer of a worker, from its start."""
    from kvm2.lab import bundled
    from kvm2.lab.scenarios import select

    _machine()
    one = select(bundled.scenarios(4096), ("sys/api",), ())
    ours, oracle = [], []
    for _ in range(5):
        ours.append(_seconds(HOST, one, {}))
        oracle.append(_seconds(f"oracle:{HOST}", one, {}))
    a, b = statistics.median(ours), statistics.median(oracle)
    return Measured(b, a, b, "s")


FIGURES = (
    Figure("scenarios", "recorded scenarios without waiting, software KVM / live kernel, both warm", 1 / 20, scenarios),
    Figure(
        "oracle",
        "first answer of a live kernel in a warm machine, process start included",
        None,
        first_answer,
        unit="s",
    ),
)

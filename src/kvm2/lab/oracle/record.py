"""Records what the kernel inside a machine answers, in the form of the published answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvm2.lab.lowering import RUN_TIMEOUT_MS
from kvm2.lab.oracle import qemu
from kvm2.lab.oracle.machine import build
from kvm2.lab.pool import Pool
from kvm2.lab.scenarios import answer_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvm2.lab.oracle.machine import Say
    from kvm2.lab.oracle.shapes import Shape
    from kvm2.lab.scenarios import Scenario


def header(shape: Shape, say: Say) -> dict[str, object]:
    """What a file of answers says first: `host`, QEMU's `cpu`, `page` in bytes, `kernel`, `qemu`, `dmesg`."""
    info = build(shape, say).info
    return {
        "host": shape.name,
        "cpu": shape.cpu,
        "page": info["page"],
        "kernel": info["kernel"],
        "qemu": info["qemu"],
        "command_line": f"{qemu.APPEND} {shape.append}".rstrip(),
        "dmesg": info["dmesg"],
    }


def record(
    shape: Shape,
    scenarios: Sequence[Scenario],
    guests: Mapping[str, bytes],
    say: Say,
    patience_ms: int = RUN_TIMEOUT_MS,
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Plays the scenarios in one machine; lines of a file of answers, each with what went wrong besides (faults)."""
    yield json.dumps(header(shape, say)), ()
    with Pool(f"oracle:{shape.name}", guests) as pool:
        for played in pool.play(scenarios, patience_ms):
            yield answer_line(played.name, played.answers), played.faults

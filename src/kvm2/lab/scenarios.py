"""Scenario files, the answers that were recorded for them, and where both are read and written.

A scenario file is `[{"sc": NAME, "steps": [{"op": ..., ...}, ...]}, ...]`. A file of answers has a header line (what
machine it is from), then one line `{"sc": NAME, "r": [ANSWER, ...]}` per scenario, parallel to its steps. An answer is
`[return value, errno name or 0]` plus an output where there is one, `"skipped"` where the step uses a name whose making
failed, or null where there is none.

Every file may be compressed: `.xz` and `.gz` are read by their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kvm2.errors import UsageError

Step = Mapping[str, Any]
Answer = list[Any] | str | None

SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario: a name such as `sve/vls/0x3`, and its steps in order."""

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """The answers of one machine: `host` (its name), the file's whole header, and scenario -> answers."""

    host: str
    header: Mapping[str, Any]
    answers: Mapping[str, Sequence[Answer]]


def read_text(path: Path) -> str:
    """A text file, decompressed where its name ends in `.xz` or `.gz`; UsageError where it cannot be read."""
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            import lzma

            data = lzma.decompress(data)
        elif path.suffix == ".gz":
            import gzip

            data = gzip.decompress(data)
        return data.decode()
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # lzma.LZMAError and zlib.error, without importing either for a plain file
        raise UsageError(f"{path}: cannot be decompressed: {error}") from error


def read_json(path: Path) -> Any:
    """The one JSON value of a file; UsageError with line and column where it is none."""
    return _parse(path, read_text(path))


def _parse(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{line - 1 + error.lineno}:{error.colno}: not JSON: {error.msg}") from error


def load_scenarios(path: Path) -> tuple[Scenario, ...]:
    """The scenarios of a file, their shape checked (what each op needs is checked by `lowering.check`)."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UsageError(f'{path}: a scenario file is a list of {{"sc": name, "steps": [...]}}')
    found: dict[str, Scenario] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("sc"), str) or not isinstance(row.get("steps"), list):
            raise UsageError(f'{path}: entry {index} is not {{"sc": name, "steps": [...]}}')
        if row["sc"] in found:
            raise UsageError(f"{path}: scenario {row['sc']!r} is there twice")
        found[row["sc"]] = Scenario(row["sc"], tuple(row["steps"]))
    return tuple(found.values())


def load_record(path: Path) -> Record:
    """The answers of a file; its header's `host` names the machine, else the file's name does."""
    header: dict[str, Any] = {}
    answers: dict[str, list[Answer]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = _parse(path, line, number)
        if isinstance(row, dict) and isinstance(row.get("sc"), str) and isinstance(row.get("r"), list):
            answers[row["sc"]] = row["r"]
        elif isinstance(row, dict) and not answers and not header:
            header = row
        else:
            raise UsageError(f'{path}:{number}: a line of answers is {{"sc": name, "r": [...]}}')
    host = header.get("host")
    return Record(host if isinstance(host, str) else path.name.split(".jsonl")[0], header, answers)


def select(scenarios: Sequence[Scenario], only: Sequence[str], skip: Sequence[str]) -> tuple[Scenario, ...]:
    """The scenarios whose names match a glob of `only` (or all, without any) and none of `skip`.

    >>> names = [Scenario("sve/vls/0x3", ()), Scenario("vgic/types", ())]
    >>> [scenario.name for scenario in select(names, ["*"], ["vgic/*"])]
    ['sve/vls/0x3']
    """
    chosen = tuple(
        scenario
        for scenario in scenarios
        if (not only or any(fnmatchcase(scenario.name, glob) for glob in only))
        and not any(fnmatchcase(scenario.name, glob) for glob in skip)
    )
    if not chosen:
        raise UsageError(f"no scenario is left of {len(scenarios)}: --only {' '.join(only)} --skip {' '.join(skip)}")
    return chosen


def answer_line(name: str, answers: Sequence[Answer]) -> str:
    """One line of a file of answers, without its newline.

    >>> answer_line("sys/api", [[12, 0], "skipped"])
    '{"sc":"sys/api","r":[[12,0],"skipped"]}'
    """
    return json.dumps({"sc": name, "r": list(answers)}, separators=(",", ":"))

"""`python -m bench [--only KEY]... [--json]`: every figure with its goal, and whether it is kept."""

from __future__ import annotations

import argparse
import json
import sys

from bench import boot, creation, exits, footprint, oracle, speed
from bench.measure import Figure, Unavailable

FIGURES: tuple[Figure, ...] = (
    *(*creation.FIGURES, *speed.FIGURES, *exits.FIGURES, *footprint.FIGURES),
    *(*oracle.FIGURES, *boot.FIGURES),
)
SCHEMA = "kvm2.bench/1"


def measure(figure: Figure) -> dict[str, object]:
    """One figure's row."""
    row: dict[str, object] = {
        "key": figure.key,
        "title": figure.title,
        "goal": figure.goal,
        "at_least": figure.at_least,
    }
    try:
        measured = figure.measure()
    except Unavailable as reason:
        return {**row, "verdict": "skipped", "reason": str(reason)}
    verdict = "-" if figure.goal is None else "kept" if figure.kept(measured) else "MISSED"
    values = {"figure": measured.figure, "ours": measured.ours, "baseline": measured.baseline, "unit": measured.unit}
    return {**row, **values, "verdict": verdict}


def line(figure: Figure, row: dict[str, object]) -> str:
    """A row of the table."""
    goal = "" if figure.goal is None else f"{'>=' if figure.at_least else '<='} {figure.goal:g}{figure.unit}"
    if row["verdict"] == "skipped":
        return f"{figure.key:11} {goal:>10} {'':>10}  skipped: {row['reason']}"
    value = f"{row['figure']:.2f}{figure.unit}"
    detail = f"{row['ours']:.3g} / {row['baseline']:.3g} {row['unit']}"
    return f"{figure.key:11} {goal:>10} {value:>10}  {row['verdict']:8} {detail:22} {figure.title}"


def main() -> int:
    """0 where every goal is kept, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=[figure.key for figure in FIGURES], help="measure only this one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (schema kvm2.bench/1)")
    options = parser.parse_args()
    rows = []
    for figure in FIGURES:
        if options.only and figure.key not in options.only:
            continue
        row = measure(figure)
        rows.append(row)
        if not options.json:
            print(line(figure, row), flush=True)
    if options.json:
        print(json.dumps({"schema": SCHEMA, "figures": rows}, indent=1))
    return 1 if any(row["verdict"] == "MISSED" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

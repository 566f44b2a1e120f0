"""How a guest's run ended, as text or as an object."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

from kvm2.cli.render import show_findings, table

if TYPE_CHECKING:
    from kvm2.board.loop import Board, RunResult, Unclaimed
    from kvm2.kvm import Kvm

MOST_ROWS = 16


def show(kvm: Kvm, machine: Board, result: RunResult, file: TextIO | None = None) -> None:
    """The summary for people, on stdout or in `file`."""
    out = file or sys.stdout
    sys.stdout.flush()
    reason = f": {result.reason}" if result.reason else ""
    print(f"\nended: {result.ended}{reason}, after {result.seconds:.2f} s", file=out)
    total = sum(result.exits.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in result.exits.items())
    size = f"{machine.ipa_bits} {machine.bits_name}"
    count = len(machine.vcpus)
    cpus = f"{count} vCPU{'s' * (count > 1)}"
    print(f"host {kvm.name}, {size}, {cpus}; {total} exits: {kinds or 'none'}", file=out)
    if result.unclaimed_count:
        _show_unclaimed(machine, result, out)
    if result.error is not None and result.error.findings:
        show_findings(result.error.findings)


def _show_unclaimed(machine: Board, result: RunResult, out: TextIO) -> None:
    count, reads = result.unclaimed_count, machine.nothing_reads
    print(f"{count} accesses to addresses with nothing behind them (reads gave {reads}):", file=out)
    rows = [(_place(u), u.size, "write" if u.is_write else "read", u.count) for u in result.unclaimed[:MOST_ROWS]]
    table(("address", "bytes", "access", "count"), rows, out)
    if len(result.unclaimed) > MOST_ROWS:
        print(f"... and {len(result.unclaimed) - MOST_ROWS} more addresses (--json has them)", file=out)


def _place(where: Unclaimed) -> str:
    return hex(where.address) if where.space == "memory" else f"{where.space} {where.address:#x}"


def as_dict(kvm: Kvm, machine: Board, result: RunResult, guest: str) -> dict[str, Any]:
    """The same for programs."""
    unclaimed = [
        {
            "space": u.space,
            "address": u.address,
            "size": u.size,
            "access": "write" if u.is_write else "read",
            "count": u.count,
        }
        for u in result.unclaimed
    ]
    error = result.error
    return {
        "host": kvm.name,
        "arch": kvm.arch,
        "guest": guest,
        "ipa_bits": machine.ipa_bits,
        "cpus": len(machine.vcpus),
        "memory": [{"base": piece.base, "size": piece.size} for piece in machine.memory],
        "top": {"base": machine.top.base, "size": machine.top.size} if machine.top else None,
        "ended": result.ended,
        "reason": result.reason,
        "vcpu": result.vcpu,
        "seconds": round(result.seconds, 6),
        "exits": result.exits,
        "unclaimed": unclaimed,
        "unclaimed_count": result.unclaimed_count,
        "console": result.console.decode("utf-8", "replace"),
        "errno": error.name if error else None,
        "findings": [finding.to_dict() for finding in error.findings] if error else [],
    }

"""`kvm2 create --on A,B,C`: the same VM on each of several hosts, one line a host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.abi.findings import Finding
    from kvm2.kvm import Kvm
    from kvm2.spec import VmSpec


def create_on(
    hosts: str,
    spec: VmSpec,
    call: str,
    wanted: dict[str, Any],
    *,
    dry_run: bool,
    working_caps: bool = False,
    as_json: bool = False,
) -> None:
    """Prints every host's answer; exit code 1 where one refuses."""
    from kvm2.cli.making import make_vm
    from kvm2.cli.render import emit, table
    from kvm2.lab.hosts_asked import several
    from kvm2.lab.on_hosts import on_hosts

    def make(kvm: Kvm) -> Sequence[Finding]:
        if dry_run:
            return kvm.dry_run(spec)
        with make_vm(kvm, spec, call, wanted["type_word"]) as vm:
            return vm.notes

    answers = on_hosts(several((hosts,), least=1), make, working_caps=working_caps)
    ok = all(answer.ok for answer in answers)
    if as_json:
        emit("create-on", {"call": call, "dry_run": dry_run, "hosts": [one.to_dict() for one in answers]}, ok=ok)
    else:
        rows: list[tuple[str, str, str]] = []
        for one in answers:
            notes = [f"{finding.path}: {finding}" for finding in one.findings] or ([one.reason] if one.reason else [""])
            rows.append((one.host, "yes" if one.ok else one.error, notes[0]))
            rows += [("", "", note) for note in notes[1:]]
        table(("host", "takes it", "why"), rows)
    if not ok:
        sys.exit(1)

"""`kvm2 compare`: what differs between hosts, and the largest VM that all of them can give."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from kvm2.cli.options import json_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.lab.common_registers import Safe
    from kvm2.lab.common_spec import Common


@click.command("compare", short_help="What differs between hosts, and the largest VM valid on all.")
@click.argument("hosts", nargs=-1, required=True, metavar="HOST HOST...")
@click.option("--all", "everything", is_flag=True, help="Show also what is the same.")
@json_option
def command(hosts: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Show what differs between two or more hosts (names, files, /dev/kvm), and the largest VM that is valid on all.

    The VM is created on each host (on a described one as it is described). --json also has, for migration, the values
    of the ID registers that are true on every host. Exit code 1 where there is no common VM.
    """
    from kvm2.lab.common_registers import safe_registers
    from kvm2.lab.common_spec import common_spec
    from kvm2.lab.host_diff import compare
    from kvm2.lab.hosts_asked import profile_of, real_ones, several

    names = several(hosts)
    profiles = [profile_of(name) for name in names]
    rows = [row for row in compare(profiles) if everything or row.differs]
    common = common_spec(profiles, real_ones(names, profiles))
    safe = safe_registers(profiles)
    if as_json:
        from kvm2.cli.render import emit

        payload = {"hosts": names, "differences": [row._asdict() for row in rows if row.differs]}
        if everything:
            payload["properties"] = [row._asdict() for row in rows]
        emit("compare", {**payload, "common": _common_dict(common), "registers": _dicts(safe)}, ok=common.ok)
    else:
        _show([profile.name for profile in profiles], rows, common, safe)
    if not common.ok:
        sys.exit(1)


def _dicts(safe: Sequence[Safe]) -> dict[str, Any]:
    return {one.name: one.to_dict() for one in safe}


def _common_dict(common: Common) -> dict[str, Any]:
    keys = ("values", "reasons", "conflicts", "checked")
    return {"ok": common.ok, **{key: getattr(common, key) for key in keys}}


def _show(names: list[str], rows: Sequence[Any], common: Common, safe: Sequence[Safe]) -> None:
    from kvm2.cli.render import table

    subject = ""
    shown = []
    for row in rows:
        shown.append((row.subject if row.subject != subject else "", row.name, *row.values))
        subject = row.subject
    if shown:
        table(("", "", *names), shown)
    else:
        print("these hosts are alike in everything that a host file says")
    print("\nThe largest VM that is valid on all of them:")
    if common.values:
        table(
            ("", "", "because"),
            [(name, _text(name, value), common.reasons[name]) for name, value in common.values.items()],
        )
    for conflict in common.conflicts:
        print(f"conflict: {conflict}")
    for host, answer in common.checked.items():
        print(f"created on {host}: {answer}")
    if safe:
        _show_migration(safe)


def _show_migration(safe: Sequence[Safe]) -> None:
    given = [one for one in safe if one.give]
    print(f"\nFor migration, ID registers to be given a common value: {len(given)} (--json lists them).")
    for host in dict.fromkeys(host for one in safe for host in one.stays):
        stays = [name for one in safe for name in one.fields_that_stay(host)]
        print(f"{host} lets nobody change these, and guests see them: {', '.join(stays)}")
    fixed = [one.name for one in safe if one.conflicts]
    if fixed:
        print(f"Registers that differ and are each host's own: {', '.join(fixed)}")


def _text(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if name == "machine_types":
        return f"{value:#x}"
    return str(value or "none")

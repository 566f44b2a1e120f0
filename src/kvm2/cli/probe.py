"""`kvm2 probe`: record a host, this machine or another, as a described one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvm2.cli.options import json_option

if TYPE_CHECKING:
    from kvm2.lab.probe import Probed

MOST_SHOWN = 6


@click.command("probe", short_help="Record a host as a host file that answers alike.")
@click.option("--host", default="/dev/kvm", metavar="HOST", help="The host to ask. [default: /dev/kvm]")
@click.option("--save", metavar="FILE", help="Write the host file; '-' is stdout.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@click.option("--name", metavar="NAME", help="What the host is called. [default: its file's name, else the machine's]")
@click.option("--no-guests", is_flag=True, help="Run no guest: leaves open what only a guest can show.")
@click.option("--mainline", is_flag=True, help="Describe a real host without KVM_CREATE_VM2, as its kernel has it.")
@json_option
def command(
    host: str, save: str | None, force: bool, name: str | None, no_guests: bool, mainline: bool, as_json: bool
) -> None:
    """Ask a KVM everything that a host file can say: limits, granules, SVE lengths, ID registers, capabilities, habits.

    It makes scratch VMs, runs a guest of a few instructions, and leaves nothing behind. The file that --save writes
    can be given as --host everywhere. What could not be found out is said on stderr and in the file.
    """
    from kvm2.hosts import is_real
    from kvm2.lab.hosts_asked import probed_of
    from kvm2.lab.probe import save as write

    path = Path(save) if save is not None and save != "-" else None
    _check(path, name, force)
    if is_real(host):
        print(f"kvm2: asking {host} ...", file=sys.stderr)
    probed = probed_of(host, name or (path.stem if path else None), guests=not no_guests, mainline=mainline)
    for note in probed.notes:
        print(f"kvm2: {note}", file=sys.stderr)
    if path is not None:
        write(probed.text, path, force=force)
    if as_json:
        _emit(probed, save)
    elif save == "-":
        print(probed.text, end="")
    elif path is not None:
        print(f"{path}: {_line(probed)}")
    else:
        _show(probed)


def _check(path: Path | None, name: str | None, force: bool) -> None:
    from kvm2.cli.verdicts import check_writable
    from kvm2.errors import UsageError

    if name is not None and not name.strip():
        raise UsageError("--name is empty: a host needs a name, or leave it out")
    check_writable(path)
    if path is not None and path.exists() and not force:
        raise UsageError(f"{path} is there already: give another name, or --force")


def _emit(probed: Probed, save: str | None) -> None:
    from kvm2.cli.render import emit

    shown = {"host": probed.name, "system": probed.system, "facts": probed.facts, "notes": list(probed.notes)}
    emit("probe", {**shown, "saved": save, "text": probed.text if save == "-" else None})


def _line(probed: Probed) -> str:
    facts, host = probed.facts, probed.profile()
    if facts["arch"] != "arm64":
        return f"{facts['arch']}, creation only, {len(facts.get('caps', {}))} capabilities"
    sve = f"SVE up to {128 * host.sve_vqs[-1]} bits" if host.sve_vqs else "no SVE"
    pages = (1 << host.page_shift) >> 10
    return f"arm64, habits of Linux {host.kernel}, IPA limit {host.ipa_limit} bits, {pages}K pages, {sve}"


def _show(probed: Probed) -> None:
    from kvm2.cli.render import table

    print(f"{probed.name}: {_line(probed)}")
    table(("key", "value"), [(key, _text(key, value)) for key, value in probed.facts.items()])


def _text(key: str, value: Any) -> str:
    if isinstance(value, dict):
        if len(value) > MOST_SHOWN:
            return f"{len(value)} entries (--save - shows them)"
        return ", ".join(f"{name} {one}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return hex(value) if key == "vm_types" else str(value)

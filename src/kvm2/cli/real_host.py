"""`kvm2 hosts /dev/kvm`: what this machine's KVM says of itself, and in the list whether there is one."""

from __future__ import annotations

import sys

import click


def show(as_json: bool) -> None:
    """The figures of the real KVM; EnvironmentFault where it cannot be opened."""
    from kvm2.cli.render import emit, table
    from kvm2.hosts import seen
    from kvm2.hosts.figures import capabilities, figures
    from kvm2.hosts.real import open_real

    host = open_real(between=seen)
    found, caps = figures(host), capabilities(host)
    if as_json:
        rows = [{"figure": what, "value": value, "source": source} for what, value, source in found]
        emit("host", {"name": host.raw.name, "arch": host.arch, "basis": "real", "figures": rows, "caps": dict(caps)})
        return
    click.echo(f"{host.raw.name}: the KVM of this machine ({host.arch})\n")
    table(("figure", "value", "source"), found)
    click.echo(f"\nCapabilities ({len(caps)}):")
    width = max(map(len, caps))
    for name, value in caps.items():
        click.echo(f"  {name:<{width}}  {value}")


def mention() -> None:
    """One line on stderr: whether /dev/kvm is a host too."""
    from kvm2.hosts.kernel import DEVICE, machine_arch
    from kvm2.hosts.real import refusal

    why = refusal()
    print(f"kvm2: {why}" if why else f"kvm2: and {DEVICE}, the KVM of this machine ({machine_arch()})", file=sys.stderr)

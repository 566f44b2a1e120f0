"""`kvm2 plan`: the smallest IPA size for a memory map, and the hosts that can give it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvm2.lab.plan import Plan

_GRANULES = {"4K": 12, "16K": 14, "64K": 16}


@click.command("plan")
@click.option("--memory", multiple=True, required=True, metavar="SIZE@ADDRESS",
              help="A range of guest memory, as 512M@1G or 0x10000@0. May be repeated.")  # fmt: skip
@click.option(
    "--hosts", metavar="NAME,...", help="The hosts to ask: names, files, /dev/kvm. Default: every arm64 host."
)
@click.option(
    "--granule", type=click.Choice(list(_GRANULES)), help="The stage-2 granule. Default: each host's page size."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON (schema kvm2.plan/1).")
def command(memory: tuple[str, ...], hosts: str | None, granule: str | None, as_json: bool) -> None:
    """Find the smallest IPA size for a memory map, and say which hosts can give it and why the others cannot.

    Exit code 1 when a host that --hosts names, or without it every host, cannot.
    """
    from kvm2.cli.render import emit
    from kvm2.lab.plan import plan
    from kvm2.memorymap import parse_memory_map
    from kvm2.softkvm import profile

    pieces = parse_memory_map(memory)
    if hosts is None:
        asked = [host for host in map(profile.load, profile.names()) if host.arch == "arm64"]
    else:
        from kvm2.lab.hosts_asked import profile_of, several

        asked = [profile_of(name) for name in several((hosts,), least=1)]
    made = plan(pieces, asked, _GRANULES[granule] if granule else None)
    good = made.fits if hosts is not None else any(host.fits for host in made.hosts)
    if as_json:
        emit("plan", made.to_json(), ok=good)
    else:
        _print(made)
    if not good:
        raise SystemExit(1)


def _print(made: Plan) -> None:
    from kvm2.cli.render import table

    click.echo(
        f"The memory needs an IPA size of {made.ipa_bits} bits: its last byte is at {made.memory[-1].end - 1:#x}."
    )
    rows = []
    for host in made.hosts:
        if host.fits:
            how = host.call if host.type is None else f"{host.call} type {host.type:#x}"
            more = "; the default of 40 would do" if host.default_fits else ""
            rows.append((host.name, "yes", str(host.limit), f"{host.ipa_bits} bits by {how}{more}"))
        else:
            rows.append((host.name, "no", str(host.limit), "; ".join(host.reasons)))
    table(("host", "fits", "limit", "how, or why not"), rows)

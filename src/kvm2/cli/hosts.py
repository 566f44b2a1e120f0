"""`kvm2 hosts`: the described hosts, and everything about one of them with where each figure is from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvm2.softkvm.profile import Profile

_PAGES = {12: "4K", 14: "16K", 16: "64K"}


@click.command("hosts")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: schema kvm2.hosts/1, or kvm2.host/1.")
def command(name: str | None, as_json: bool) -> None:
    """List the described hosts; with NAME show one: its figures and their sources.

    NAME may be the path of a host file, or /dev/kvm: the KVM of this machine.
    """
    from kvm2.cli import real_host
    from kvm2.hosts import is_real
    from kvm2.softkvm import profile

    if name is None:
        _list([profile.load(each) for each in profile.names()], as_json)
        if not as_json:
            real_host.mention()
    elif is_real(name):
        real_host.show(as_json)
    else:
        _show(profile.load(name), as_json)


def _list(hosts: list[Profile], as_json: bool) -> None:
    from kvm2.cli.render import emit, table

    if as_json:
        emit("hosts", {"hosts": [_summary(host) for host in hosts]})
        return
    rows = [
        (
            host.name,
            str(host.ipa_limit or "-"),
            _PAGES[host.page_shift],
            _lengths(host),
            ",".join(host.gic) or "-",
            host.kernel,
            host.type_word,
            str(host.create_vm2),
            host.basis,
            host.title,
        )
        for host in hosts
    ]
    table(("host", "IPA", "page", "SVE bits", "GIC", "kernel", "type", "VM2", "basis", "what it is"), rows)


def _lengths(host: Profile) -> str:
    """SVE lengths in bits, a full run drawn together."""
    bits = [128 * vq for vq in host.sve_vqs]
    if len(bits) > 3 and list(host.sve_vqs) == list(range(1, len(bits) + 1)):
        return f"{bits[0]}..{bits[-1]}"
    return ",".join(map(str, bits)) or "-"


def _summary(host: Profile) -> dict[str, Any]:
    return {
        "name": host.name,
        "title": host.title,
        "arch": host.arch,
        "basis": host.basis,
        "kernel": host.kernel,
        "page_size": 1 << host.page_shift,
        "ipa_limit": host.ipa_limit,
        "granules": list(host.granules),
        "sve_bits": [128 * vq for vq in host.sve_vqs],
        "gic": list(host.gic),
        "max_vcpus": host.max_vcpus,
        "type_word": host.type_word,
        "create_vm2": host.create_vm2,
    }


def _details(host: Profile) -> dict[str, Any]:
    from kvm2.abi import caps, sysregs

    return {
        **_summary(host),
        "bases": list(host.bases),
        "mode": host.mode,
        "pa_bits": host.pa_bits,
        "parange": host.parange,
        "lpa2": host.lpa2,
        "ipa_limits": {str(granule): host.ipa_limit_for(granule) for granule in host.granules},
        "vmid_bits": host.vmid_bits,
        "fwb": host.fwb,
        "cnp": host.cnp,
        "cpus": host.cpus,
        "max_vcpu_id": host.max_vcpu_id,
        "nr_memslots": host.nr_memslots,
        "vm_types": host.vm_types,
        "features": [_FEATURES[bit] for bit in sorted(host.features)],
        "targets": list(host.targets),
        "preferred_target": host.preferred_target,
        "quirks": sorted(host.quirks),
        "caps": {caps.name_of(number): value for number, value in sorted(host.caps.items())},
        "registers": {sysregs.name_of(enc): f"{value:#x}" for enc, value in sorted(host.registers.items())},
        "sources": dict(host.sources),
        "assumed": list(host.assumed),
        "not_executed": host.not_executed(),
    }


_FEATURES = ("POWER_OFF", "EL1_32BIT", "PSCI_0_2", "PMU_V3", "SVE", "PTRAUTH_ADDRESS", "PTRAUTH_GENERIC", "HAS_EL2")


def _show(host: Profile, as_json: bool) -> None:
    from kvm2.cli.render import emit, table

    if as_json:
        emit("host", _details(host))
        return
    based = f", based on {' <- '.join(host.bases)}" if host.bases else ""
    click.echo(f"{host.name}: {host.title} ({host.arch}, {host.basis}{based})\n")
    table(
        ("figure", "value", "source"), [(what, value, host.sources.get(key, "")) for what, value, key in _figures(host)]
    )
    for title, lines in (
        ("Assumed, with no source of their own", [", ".join(host.assumed)] if host.assumed else []),
        ("Quirks of its kernel", sorted(host.quirks)),
        ("Announced, but not executed by the software KVM", host.not_executed()),
    ):
        if lines:
            click.echo(f"\n{title}:")
            for line in lines:
                click.echo(f"  {line}")


def _figures(host: Profile) -> list[tuple[str, str, str]]:
    """(what, value, key of the source) of each figure that people look for."""
    common = [
        ("kernel", f"Linux {host.kernel}", "kernel"),
        ("page size", _PAGES[host.page_shift], "page_shift"),
        ("type word of KVM_CREATE_VM", host.type_word, "type_word"),
        ("KVM_CAP_CREATE_VM2", str(host.create_vm2), "create_vm2"),
        ("vCPUs (ids)", f"{host.max_vcpus} ({host.max_vcpu_id})", "max_vcpus"),
        ("memory slots", str(host.nr_memslots), "nr_memslots"),
    ]
    if host.arch != "arm64":
        return [*common, ("VM types", f"{host.vm_types:#x}", "vm_types")]
    limits = ", ".join(f"{_PAGES[granule]}: {host.ipa_limit_for(granule)}" for granule in host.granules)
    return [
        ("IPA limit", f"{host.ipa_limit} bits", "pa_bits"),
        ("PARange", f"{host.parange} ({host.pa_bits} bits)", "pa_bits"),
        ("stage-2 granules and their limits", limits, "granules"),
        ("LPA2 in use", "yes" if host.lpa2 else "no", "lpa2"),
        ("VMIDs", f"{host.vmid_bits} bits", "vmid_bits"),
        ("SVE lengths", f"{_lengths(host)} bits" if host.sve_vqs else "no SVE", "sve_vqs"),
        ("GIC for guests", ", ".join(host.gic) or "none", "gic"),
        ("mode", host.mode, "mode"),
        ("vCPU features", ", ".join(_FEATURES[bit] for bit in sorted(host.features)), "registers"),
        ("ID registers", str(len(host.registers)), "registers"),
        *common,
    ]

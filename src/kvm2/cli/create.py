"""`kvm2 create`: create a VM, or see why not, and show what it really got."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvm2.cli.options import chosen_host, host_option, json_option, spec_options, working_caps_option
from kvm2.cli.render import attribute_dict, emit, fields_text, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.abi.findings import Finding
    from kvm2.kvm import Kvm
    from kvm2.softkvm.stage2_format import Format
    from kvm2.spec import VmSpec
    from kvm2.vm import Vm


@click.command("create", short_help="Create a VM and show what it got.")
@host_option
@working_caps_option
@spec_options
@click.option("--dry-run", is_flag=True, help="Check everything, create nothing (attribute DRY_RUN).")
@click.option("--on", "hosts", metavar="HOST,...", help="Ask each of these hosts, and show who takes the VM.")
@json_option
def command(
    host: str | None, working_caps: bool, dry_run: bool, hosts: str | None, as_json: bool, **wanted: Any
) -> None:
    """Create a VM on a host through KVM_CREATE_VM2 and show what it got; where the host refuses, every finding.

    Without --ipa-bits the VM asks for nothing and gets the kernel's default, 40 bits. 'auto' is the smallest size that
    holds --memory, 'max' is the host's limit.
    """
    from kvm2.cli.making import call_of, make_vm, spec_of
    from kvm2.errors import UsageError
    from kvm2.kvm import open as open_host

    spec = spec_of(wanted)
    call = call_of(wanted, spec)
    if dry_run and call != "KVM_CREATE_VM2":
        raise UsageError(f"--dry-run is an attribute of KVM_CREATE_VM2; {call} has no such thing")
    if hosts is not None:
        given = click.get_current_context().get_parameter_source("host")
        if given is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"--host is one host, --on is several: give one of them, or --on {host},{hosts}")
        from kvm2.cli.create_on import create_on

        return create_on(hosts, spec, call, wanted, dry_run=dry_run, working_caps=working_caps, as_json=as_json)
    with open_host(chosen_host(host), working_caps=working_caps) as kvm:
        shown = {"host": kvm.name, "call": call, "dry_run": dry_run, "asked": _asked(kvm, spec, call, wanted)}
        if dry_run:
            shown |= _would_get(kvm, spec, kvm.dry_run(spec))
        else:
            with make_vm(kvm, spec, call, wanted["type_word"]) as vm:
                shown |= _got(kvm, vm)
    if as_json:
        emit("create", shown)
    else:
        _show(shown)
    return None


def _asked(kvm: Kvm, spec: VmSpec, call: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    if call == "KVM_CREATE_VM":
        return [{"type_word": wanted["type_word"]}]
    if call == "KVM_CREATE_VM2_FIXED":
        from kvm2.abi.vm2 import CreateVm2FixedArm64

        fixed = CreateVm2FixedArm64.unpack(spec.fixed(kvm.known_of(spec)).words)
        names = ("capabilities", "sve_vlen", "ipa_size")
        return [{"name": "struct kvm_create_vm2_fixed", **{name: getattr(fixed, name) for name in names}}]
    return [attribute_dict(one) for one in spec.attributes(kvm.known_of(spec))]


def _got(kvm: Kvm, vm: Vm) -> dict[str, Any]:
    """What can be read back of a VM: its attributes in force, its stage-2 format, its limits."""
    from kvm2.abi.vm2 import ATTRIBUTES
    from kvm2.errors import KvmError
    from kvm2.hosts.soft import format_of

    attributes = []
    for number, row in ATTRIBUTES.items():
        if row.has_value:
            try:
                attributes.append(attribute_dict(vm.get_attr(number)))
            except KvmError:
                continue  # not an attribute of this host
    form = format_of(vm.backend, vm.fd)
    arm64 = kvm.backend.arch == "arm64"
    caps = ("MAX_VCPUS", "MAX_VCPU_ID", "NR_MEMSLOTS") + (("ARM_VM_IPA_SIZE", "ARM_SVE") if arm64 else ())
    return {
        "attributes": attributes,
        "stage2": _format_dict(form),
        "limits": {cap.lower(): vm.check_extension(cap) for cap in caps},
        "notes": [finding.to_dict() for finding in vm.notes],
    }


def _would_get(kvm: Kvm, spec: VmSpec, notes: Sequence[Finding]) -> dict[str, Any]:
    from kvm2.hosts.soft import stage2_format

    bits = kvm.resolve_ipa_bits(spec) or 40
    form = stage2_format(kvm.backend, bits, spec.page_shift or None)
    return {"stage2": _format_dict(form), "notes": [finding.to_dict() for finding in notes]}


def _format_dict(form: Format | None) -> dict[str, Any] | None:
    if form is None:
        return None
    keys = ("ipa_bits", "page_shift", "start_level", "levels", "sl0", "t0sz", "concatenated", "pgd_pages", "ds")
    return {"vtcr_el2": form.vtcr, **{key: getattr(form, key) for key in keys}, "fields": form.fields()}


def _show(shown: dict[str, Any]) -> None:
    verb = "would be created" if shown["dry_run"] else "created"
    print(f"{shown['host']}: a VM {verb} by {shown['call']}")
    asked = [f"{one.get('name', '')} {fields_text(one)}".strip() for one in shown["asked"]]
    print(f"asked for: {'; '.join(asked) or 'nothing: every default'}")
    if shown.get("attributes"):
        print("\nin force (KVM_VM2_GET_ATTR):")
        table(("type", "attribute", "value"), [(a["type"], a["name"], fields_text(a)) for a in shown["attributes"]])
    form = shown["stage2"]
    if form:
        print("\n" + _format_text(form))
    if "limits" in shown:
        limits = ", ".join(f"{name} {value}" for name, value in shown["limits"].items())
        print(f"limits of this VM: {limits}")
    for note in shown["notes"]:
        print(f"note: {note['path']}: {note['message']}")


def _format_text(form: dict[str, Any]) -> str:
    granule = f"{(1 << form['page_shift']) >> 10}K"
    tables = form["concatenated"]
    fields = " ".join(f"{name}={value}" for name, value in form["fields"].items())
    return (
        f"stage 2: {form['ipa_bits']} bits, {granule} pages, {form['levels']} levels from level {form['start_level']}, "
        f"{tables} concatenated table{'s' if tables != 1 else ''} at the start, {form['pgd_pages']} page"
        f"{'s' if form['pgd_pages'] != 1 else ''}\nVTCR_EL2 {form['vtcr_el2']:#x}: {fields}"
    )

"""`kvm2 describe`: what a host takes at VM creation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvm2.cli.options import chosen_host, host_option, json_option, working_caps_option
from kvm2.cli.render import bits_text, emit, lengths_text, table

if TYPE_CHECKING:
    from kvm2.abi.vm2 import Vm2AttrInfo

# Attributes whose value is a set of bits: min and max say nothing about them.
_SETS = ("ARCH_CAPABILITIES", "ARM64_SVE_VLS")


@click.command("describe", short_help="What a host takes at VM creation.")
@host_option
@working_caps_option
@json_option
def command(host: str | None, working_caps: bool, as_json: bool) -> None:
    """Ask a host for every attribute that it takes (KVM_DESCRIBE_VM2): default, minimum, maximum, mask.

    A default can lie outside of minimum and maximum: a 36-bit host refuses the default of 40.
    """
    from kvm2.abi.vm2 import ATTRIBUTES, KVM_CAP_CREATE_VM2
    from kvm2.kvm import open as open_host

    with open_host(chosen_host(host), working_caps=working_caps) as kvm:
        found = [(ATTRIBUTES[number].macro, info) for number, info in kvm.describe().items()]
        cap = kvm.check_extension(KVM_CAP_CREATE_VM2)
        if as_json:
            attributes = [_as_dict(name, info) for name, info in found]
            return emit("describe", {"host": kvm.name, "create_vm2": cap, "attributes": attributes})
        print(f"{kvm.name}: KVM_CAP_CREATE_VM2 = {cap:#x}")
        table(("type", "attribute", "default", "min", "max", "allowed"), [_row(name, info) for name, info in found])
    return None


def _as_dict(name: str, info: Vm2AttrInfo) -> dict[str, Any]:
    flags = {"has_value": bool(info.flags & 1), "negotiable": bool(info.flags & 2)}
    numbers = {"default": info.default, "min": info.min, "max": info.max, "mask": info.mask}
    return {"type": info.type, "name": name, **flags, **numbers}


def _row(name: str, info: Vm2AttrInfo) -> tuple[object, ...]:
    if not info.flags & 1:
        return (info.type, name, "-", "-", "-", "(no value)")
    if name in _SETS:
        allowed = f"bits {bits_text(info.mask)}" if info.mask else "no bit"
        if name == "ARM64_SVE_VLS":
            allowed = f"lengths {lengths_text(info.mask) or 'none'}"
        return (info.type, name, f"{info.default:#x}", "-", "-", allowed)
    # The mask has a bit for each value below 64 only.
    allowed = bits_text(info.mask) if info.max < 64 else f"{info.min}-{info.max}"
    return (info.type, name, info.default, info.min, info.max, allowed)

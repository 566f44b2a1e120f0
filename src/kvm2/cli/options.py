"""Options that several commands share, and the words that people write for sizes, granules and vector lengths."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.spec import MemoryRange

DEFAULT_HOST = "max-4k-6.12"

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]  # generic in newer versions of click only
else:
    _ParamType = click.ParamType


class Number(_ParamType):
    """A whole number, decimal or 0x."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is not a number: write 40 or 0x28", param, ctx)


class Seconds(_ParamType):
    """A time in seconds, 0 or more; also "inf"."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not seconds >= 0:  # NaN is no time either
            self.fail(f"{value!r}: allowed are numbers of seconds from 0 on, 0.5 too", param, ctx)
        return seconds


class Memory(_ParamType):
    """SIZE[@ADDRESS]; without an address the default RAM base, 1G."""

    name = "size@address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> MemoryRange:
        from kvm2.errors import UsageError
        from kvm2.memorymap import parse_memory
        from kvm2.spec import MemoryRange

        if isinstance(value, MemoryRange):
            return value
        try:
            return parse_memory(value if "@" in value else f"{value}@1G")
        except UsageError as error:
            self.fail(str(error), param, ctx)


class IpaBits(_ParamType):
    """A number of bits, "auto" or "max"."""

    name = "n|auto|max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in ("auto", "max") or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        try:
            return int(value, 0)
        except ValueError:
            self.fail(f"{value!r}: allowed are a number of bits (0x28 too), 'auto' and 'max'", param, ctx)


class Sve(_ParamType):
    """The longest vector in bits, or "vcpu"."""

    name = "bits|vcpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "vcpu" or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        try:
            return int(value, 0)
        except ValueError:
            self.fail(f"{value!r}: allowed are a length in bits (multiples of 128 up to 2048), and 'vcpu'", param, ctx)


class Granule(_ParamType):
    """4k, 16k or 64k, or the shift itself: 12, 14, 16. Any other shift goes to the host, which refuses it."""

    name = "4k|16k|64k"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        known = {"4k": 12, "16k": 14, "64k": 16}
        if value.lower() in known:
            return known[value.lower()]
        if value.isdecimal():
            return int(value)
        return self.fail(f"{value!r}: allowed are 4k, 16k, 64k (or a page shift, 12, 14, 16)", param, ctx)


def _complete_host(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from kvm2.hosts import REAL, host_names

    return [name for name in (*host_names(), REAL[0]) if name.startswith(incomplete)]


host_option = click.option(
    "--host",
    metavar="HOST",
    envvar="KVM2_HOST",
    shell_complete=_complete_host,
    help=f"A described host, a TOML file, or /dev/kvm. [default: KVM2_HOST, else {DEFAULT_HOST}]",
)
working_caps_option = click.option(
    "--working-caps", is_flag=True, help="Announce only the capabilities that the software KVM executes."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def chosen_host(host: str | None) -> str:
    """The host to use; the default is said aloud."""
    if host is None:
        print(f"kvm2: host {DEFAULT_HOST} (the default; choose with --host or KVM2_HOST)", file=sys.stderr)
        return DEFAULT_HOST
    if host == os.environ.get("KVM2_HOST"):
        print(f"kvm2: host {host} (KVM2_HOST)", file=sys.stderr)
    return host


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what VM is wanted; `spec_of` makes a VmSpec of them."""
    for option in reversed(
        (
            click.option("--ipa-bits", type=IpaBits(), help="Bits of the IPA space. [default: the kernel's, 40]"),
            click.option(
                "--sve", type=Sve(), help="SVE: the longest vector in bits, or 'vcpu': each vCPU sets its own."
            ),
            click.option("--granule", type=Granule(), help="Stage-2 granule. [default: the host's page size]"),
            click.option("--max-vcpus", type=Number(), help="How many vCPUs the VM may have."),
            click.option("--machine-type", type=Number(), help="Attribute MACHINE_TYPE."),
            click.option("--parange-follows-ipa", is_flag=True, help="The guest's PARange follows the IPA size."),
            click.option(
                "--memory", "memory", type=Memory(), multiple=True, help="Guest RAM, SIZE@ADDRESS; repeatable."
            ),
            click.option("--type", "type_word", type=Number(), help="Use the old KVM_CREATE_VM with this type word."),
            click.option("--fixed", is_flag=True, help="Use KVM_CREATE_VM2_FIXED, the structure of fixed size."),
        )
    ):
        command = option(command)
    return command

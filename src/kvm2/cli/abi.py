"""`kvm2 abi`: the interface as a C header, a reference, a fuzz grammar, a schema; and what a number or name means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvm2.cli.options import json_option
from kvm2.cli.render import emit, table

if TYPE_CHECKING:
    from collections.abc import Callable

ARCHES = click.Choice(["arm64", "x86_64"])
output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file, not to stdout."
)


@click.group("abi", short_help="The interface: header, reference, numbers.")
def command() -> None:
    """The interface, from the one registry that the library itself uses."""


def _deliver(what: str, text: str, output: Path | None, as_json: bool) -> None:
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            from kvm2.errors import EnvironmentFault

            raise EnvironmentFault(f"{output} cannot be written: {error.strerror}; choose another --output") from error
    if as_json:
        shown: dict[str, Any] = {"what": what, "bytes": len(text.encode())}
        emit("abi", shown | ({"output": str(output)} if output else {"text": text}))
    elif output is None:
        print(text, end="")


def _generator(name: str, doc: str, path: str) -> Callable[..., None]:
    """A command that prints what one generator makes."""

    @command.command(name, help=doc)
    @output_option
    @json_option
    def run(output: Path | None, as_json: bool) -> None:
        from kvm2.abi.gen.outputs import OUTPUTS

        _deliver(name, OUTPUTS[path](), output, as_json)

    return run


reference = _generator("reference", "Print the reference in Markdown.", "docs/reference.md")
api = _generator("api", "Print the calls in the manner of the kernel's api.rst.", "docs/api.rst")
schema = _generator("schema", "Print the JSON Schema, with the registry.", "generated/kvm2.schema.json")


@command.command("header")
@click.option("--check", is_flag=True, help="A C file of static assertions about the header instead.")
@click.option("--mainline", type=ARCHES, help="A C file that compares the registry with a kernel's headers instead.")
@output_option
@json_option
def header(check: bool, mainline: str | None, output: Path | None, as_json: bool) -> None:
    """Print kvm2.h, the C header of the new interface."""
    from kvm2.abi.gen.outputs import OUTPUTS

    if check and mainline:
        raise click.UsageError("--check and --mainline are two files: ask for one at a time")
    path = f"generated/mainline_{mainline}.c" if mainline else f"generated/{'kvm2_check.c' if check else 'kvm2.h'}"
    _deliver("header", OUTPUTS[path](), output, as_json)


@command.command("syzlang")
@click.option("--const", is_flag=True, help="The values of the constants instead.")
@output_option
@json_option
def syzlang(const: bool, output: Path | None, as_json: bool) -> None:
    """Print the descriptions for syzkaller."""
    from kvm2.abi.gen.outputs import OUTPUTS

    _deliver("syzlang", OUTPUTS["generated/kvm2.syz.txt" + (".const" if const else "")](), output, as_json)


@command.command("numbers")
@click.argument("words", nargs=-1, required=True, metavar="NAME|NUMBER...")
@json_option
def numbers(words: tuple[str, ...], as_json: bool) -> None:
    """What names and numbers mean: ioctls, capabilities, exits, registers, attributes.

    \b
    kvm2 abi numbers 0x4010ae0c
    kvm2 abi numbers ARM_VM_IPA_SIZE 0x603000000013c005 SCTLR_EL1
    """
    from kvm2.abi.lookup import lookup
    from kvm2.errors import UsageError

    found = [(word, meaning) for word in words for meaning in lookup(word)]
    if missing := [word for word in words if not any(of == word for of, _ in found)]:
        raise UsageError(
            f"neither a name nor a number of the KVM API: {', '.join(missing)}; `kvm2 abi reference` has all"
        )
    if as_json:
        rows = [{"asked": word, **vars(meaning), "hex": f"{meaning.number:#x}"} for word, meaning in found]
        emit("abi", {"what": "numbers", "meanings": rows})
    else:
        shown = [(m.kind, m.name, str(m.number) if m.number < 4096 else f"{m.number:#x}", m.note) for _, m in found]
        table(("kind", "name", "number", ""), shown)

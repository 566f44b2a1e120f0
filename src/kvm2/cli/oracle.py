"""`kvm2 oracle`: a live arm64 kernel in an emulated machine, with kvm2 inside."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvm2.cli.options import json_option

if TYPE_CHECKING:
    from kvm2.lab.oracle.machine import Job

DEFAULT = "max-4k-6.12"


def _complete_shape(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from kvm2.lab.oracle.shapes import SHAPES

    return [name for name in SHAPES if name.startswith(incomplete)]


def say(text: str) -> None:
    """What takes its time."""
    print(f"kvm2: oracle {text}", file=sys.stderr, flush=True)


@click.group("oracle")
def command() -> None:
    """A live arm64 kernel as the judge: Debian's, at EL2 of a machine that QEMU emulates, with kvm2 inside.

    Machines are built from Debian's packages when they are first wanted, and kept below ~/.cache/kvm2/oracle.
    """


@command.command("list", short_help="The machines that can be had.")
@json_option
def list_(as_json: bool) -> None:
    """The machines that can be had."""
    from dataclasses import asdict

    from kvm2.cli.render import emit, table
    from kvm2.lab.oracle.machine import built
    from kvm2.lab.oracle.shapes import SHAPES

    shapes = SHAPES.values()
    if as_json:
        rows = [{**asdict(shape), "page": shape.page, "built": built(shape)} for shape in shapes]
        emit("oracle", {"shapes": rows, "default": DEFAULT})
        return
    head = ("shape", "processor", "kernel", "more", "published", "built")
    yes = ("no", "yes")
    table(
        head,
        [
            (
                shape.name, shape.cpu, shape.kernel, f"{shape.machine} {shape.append}".strip() or "-",
                yes[shape.published], yes[built(shape)],
            )
            for shape in shapes
        ],
    )  # fmt: skip


@command.command("build", short_help="Build machines now.")
@click.argument("shapes", nargs=-1, metavar="[SHAPE]...", shell_complete=_complete_shape)
@click.option("--update", is_flag=True, help="Ask apt for newer packages; without it those of the last time stay.")
@json_option
def build(shapes: tuple[str, ...], update: bool, as_json: bool) -> None:
    """Build machines now, so that they answer at once later. Default: max-4k-6.12."""
    from kvm2.cli.render import emit
    from kvm2.lab.oracle.machine import build, update_packages
    from kvm2.lab.oracle.shapes import shape

    wanted = [shape(name) for name in shapes or (DEFAULT,)]
    if update:
        update_packages(say)
    states = [(one, build(one, say)) for one in wanted]
    if as_json:
        rows = [{"name": one.name, "directory": str(state.directory), **state.info} for one, state in states]
        emit("oracle", {"shapes": rows})
        return
    for one, state in states:
        info = state.info
        click.echo(f"{one.name}: Linux {info['kernel']}, pages of {info['page']} bytes, Python {info['python']}")


@command.command("exec", short_help="Run kvm2 inside.", context_settings={"ignore_unknown_options": True})
@click.option("--shape", default=DEFAULT, show_default=True, shell_complete=_complete_shape, help="Which machine.")
@click.option("--put", multiple=True, metavar="FILE[=INSIDE]", help="Bring a file in first. May be repeated.")
@click.option("--get", multiple=True, metavar="INSIDE[=FILE]", help="Bring a file out afterwards. May be repeated.")
@click.argument("words", nargs=-1, required=True, metavar="COMMAND [ARGS]...", type=click.UNPROCESSED)
def exec_(shape: str, put: tuple[str, ...], get: tuple[str, ...], words: tuple[str, ...]) -> int:
    """Run COMMAND inside: `kvm2 ...`, or `python -c CODE`, `python -m MODULE`, `python FILE`.

    Standard input and output, standard error and the exit code are the command's. /dev/kvm inside is a real arm64 KVM.
    Every call starts from the same snapshot: nothing stays of an earlier one.
    """
    from kvm2.errors import EnvironmentFault
    from kvm2.lab.oracle.bridge import writer
    from kvm2.lab.oracle.machine import open_machine
    from kvm2.lab.oracle.shapes import shape as shape_of

    wanted = dict(_pair(text) for text in get)
    job = _job(words, put, tuple(wanted))
    with open_machine(shape_of(shape), say) as machine:
        finished = machine.run(job, 0, writer(1), writer(2), reader=1)
    for inside, outside in wanted.items():
        if inside in finished.files:
            Path(outside).write_bytes(finished.files[inside])
        else:
            say(f"{shape}: the command left no file {inside}")
    if finished.code < 0:
        raise EnvironmentFault(f"{words[0]} ended inside with signal {-finished.code}")
    missing = any(inside not in finished.files for inside in wanted)
    return finished.code or int(missing)


def _job(words: tuple[str, ...], put: tuple[str, ...], get: tuple[str, ...]) -> Job:
    from kvm2.errors import UsageError
    from kvm2.lab.oracle.inside import entry_of
    from kvm2.lab.oracle.machine import Job

    files = {}
    for text in put:
        outside, _, inside = text.partition("=")
        try:
            files[inside or Path(outside).name] = Path(outside).read_bytes()
        except OSError as error:
            raise UsageError(f"--put {text}: {error.strerror}") from error
    kept = ("COLUMNS", "NO_COLOR", "KVM2_HOST")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    return Job(entry_of(words[0]), words, env, files, get)


def _pair(text: str) -> tuple[str, str]:
    inside, _, outside = text.partition("=")
    return inside, outside or Path(inside).name


@command.command("record", short_help="Record what the kernel inside answers.")
@click.argument("shape", shell_complete=_complete_shape)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="The file. Default: stdout.")
@click.option("--only", multiple=True, metavar="GLOB", help="Play only scenarios of such names. May be repeated.")
@click.option("--skip", multiple=True, metavar="GLOB", help="Leave out scenarios of such names. May be repeated.")
@click.option("--patience", type=click.IntRange(1), metavar="MS",
              help="How long a vCPU may stay in KVM_RUN, in ms. Default: as recorded.")  # fmt: skip
def record(shape: str, output: Path | None, only: tuple[str, ...], skip: tuple[str, ...], patience: int | None) -> int:
    """Play the scenarios on the machine SHAPE and write what its kernel answers, in the form of the published answers.

    Exit code 1 where a scenario went wrong in a way that is no answer of a kernel.
    """
    from kvm2.cli.progress import Progress
    from kvm2.cli.verdicts import check_writable
    from kvm2.lab import bundled
    from kvm2.lab.lowering import RUN_TIMEOUT_MS
    from kvm2.lab.oracle.record import record as record_lines
    from kvm2.lab.oracle.shapes import shape as shape_of
    from kvm2.lab.scenarios import select

    check_writable(output)
    one = shape_of(shape)
    scenarios = select(bundled.scenarios(one.page), only, skip)
    wrong = 0
    with Progress(len(scenarios)) as progress, click.open_file(str(output or "-"), "w") as file:
        for line, faults in record_lines(one, scenarios, bundled.guests(), say, patience or RUN_TIMEOUT_MS):
            file.write(line + "\n")
            file.flush()
            progress(line)
            wrong += bool(faults)
            for fault in faults:
                print(f"kvm2: {line[7:60]}...: {fault}", file=sys.stderr)
    return 1 if wrong else 0

"""`kvm2 explain`: what a type word of KVM_CREATE_VM means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvm2.cli.options import Number, _complete_host, json_option

if TYPE_CHECKING:
    from kvm2.lab.explain import Answer, Explanation, Reading


@click.command("explain")
@click.argument("word", type=Number())
@click.option("--host", metavar="HOST", shell_complete=_complete_host, help="What this described host makes of it.")
@click.option("--bits", type=Number(), multiple=True, help="How each encoding asks for this size; repeatable.")
@json_option
def command(word: int, host: str | None, bits: tuple[int, ...], as_json: bool) -> None:
    """What the type WORD of KVM_CREATE_VM means in each encoding, and how each of them says a size.

    \b
    kvm2 explain 0x2c
    kvm2 explain 0xc --host apple-m1
    kvm2 explain 0 --bits 52
    """
    from kvm2.lab import explain as lab

    profile = None
    if host is not None:
        from kvm2.softkvm.profile import load

        profile = load(host)
    report = lab.explain(word, profile, bits)
    if as_json:
        from kvm2.cli.render import emit

        emit("explain", report.to_dict())
    else:
        click.echo(_text(report))


def _text(report: Explanation) -> str:
    lines = [f"type {report.word:#x}"]
    if report.answer is not None:
        lines[0] += f" on {report.host} (its kernel speaks {report.speaks}): {_answer(report.answer)}"
    lines += ["", *_columns([("encoding", "bits of the word", "says"), *(_row(r) for r in report.readings)])]
    if report.words:
        names = next(iter(report.words.values()))
        head = ("to say", *(f"{bits} bits" for bits in report.words))
        rows = [(name, *(_word(words[name]) for words in report.words.values())) for name in names]
        lines += ["", *_columns([head, *rows])]
    return "\n".join(lines)


def _row(reading: Reading) -> tuple[str, str, str]:
    says = _says(reading)
    if reading.on_host is not None and not reading.on_host.accepted and not reading.error:
        says += "; this host refuses (EINVAL)"
    elif reading.on_host is not None and reading.on_host.bits not in (0, reading.bits):
        says += f"; this host gives {reading.on_host.bits} bits"
    return reading.encoding, reading.field, says


def _says(reading: Reading) -> str:
    if reading.error:
        return f"EINVAL: {reading.error}"
    if reading.pointer:
        return "the address of a struct kvm_create_vm2"
    if reading.bits:
        return f"{reading.bits} bits" + (f", machine type {reading.machine_type}" if reading.machine_type else "")
    return f"machine type {reading.machine_type:#x}"


def _answer(answer: Answer) -> str:
    if not answer.accepted:
        return f"EINVAL ({answer.reason})"
    if answer.reason:
        return answer.reason
    return f"{answer.bits} bits of IPA space" if answer.bits else f"machine type {answer.machine_type:#x}"


def _word(word: int | None) -> str:
    return "-" if word is None else f"{word:#x}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


explain = command

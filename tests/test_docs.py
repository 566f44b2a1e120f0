"""The documentation's examples run: ```console blocks, ```python blocks (a document's are one session), and links.

In a ```console block a line `$ COMMAND` is run (`kvm2`, or another program of the environment) from the project's
directory, and its output must be what follows: `...` stands for anything on a line, a line that is only `...` for any
number of lines. `[exit code N]` as the last line is the code of a command that fails.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
SECONDS = 60


class Example(NamedTuple):
    """One block, or one command of a console block."""

    document: Path
    line: int
    language: str
    text: str
    expected: str = ""


def examples() -> Iterator[Example]:
    """Every example of every document."""
    for document in DOCUMENTS:
        text = document.read_text()
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 2
            if block[1] == "console":
                yield from commands(document, line, block[2])
            elif block[1] == "python":
                yield Example(document, line, "python", block[2])


def commands(document: Path, line: int, block: str) -> Iterator[Example]:
    """The commands of a console block, each with the output that stands below it."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)
    line += parts[0].count("\n")
    for part in parts[1:]:
        command, _, output = part.replace("\\\n", " ").partition("\n")
        if not command.startswith("make "):  # that makes the environment that this test runs in
            yield Example(document, line, "console", command, output)
        line += part.count("\n")


def pattern(expected: str) -> re.Pattern[str]:
    """The output that an example accepts."""
    lines = []
    for line in expected.rstrip("\n").split("\n"):
        if line.strip() == "...":
            lines.append(r"(?:.*\n)*?")
        else:
            lines.append(".*".join(re.escape(piece.rstrip()) for piece in line.split("...")) + r"[ ]*\n")
    return re.compile("".join(lines))


def name(example: Example) -> str:
    return f"{example.document.name}:{example.line}"


EXAMPLES = list(examples())


def test_there_are_examples() -> None:
    assert any(example.language == "console" for example in EXAMPLES)
    assert pattern("a...c\n...\nz\n").fullmatch("abc\n1\n2\nz\n")
    assert not pattern("a\n").fullmatch("a\nb\n")


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.language == "console"], ids=name)
def test_console(example: Example, tmp_path: Path) -> None:
    words = shlex.split(example.text, comments=True)
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "OUT": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [word.replace("/tmp/", f"{tmp_path}/") for word in words]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=PROJECT,
        env=environment,
        timeout=SECONDS,
    )
    got = done.stdout.replace(f"{tmp_path}/", "/tmp/")
    if done.returncode:
        got += f"[exit code {done.returncode}]\n"
    if got and not got.endswith("\n"):
        got += "\n"
    if example.expected.strip():
        assert pattern(example.expected).fullmatch(got), (
            f"{example.text}\n--- printed\n{got}\n--- expected\n{example.expected}"
        )
    else:
        assert done.returncode == 0, got


WITH_PYTHON = sorted({example.document for example in EXAMPLES if example.language == "python"})


@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda path: path.name)
def test_python(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document's python blocks, in order and in one session: names of earlier blocks are there in later ones."""
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": "example"}
    for example in EXAMPLES:
        if example.document != document or example.language != "python":
            continue
        if ">>>" not in example.text:
            exec(compile(example.text, name(example), "exec"), session)
            continue
        test = doctest.DocTestParser().get_doctest(example.text, session, name(example), name(example), example.line)
        output: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
        failed, _ = runner.run(test, out=output.append, clear_globs=False)
        session.update(test.globs)
        assert not failed, "".join(output)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_document_can_be_found_from_the_readme() -> None:
    text = (PROJECT / "README.md").read_text()
    missing = [path.name for path in (PROJECT / "docs").glob("*.md") if f"docs/{path.name}" not in text]
    assert not missing

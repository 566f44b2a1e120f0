"""The entries as data: complete, linked, and each with a command that works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kvm2.cli.main import main
from kvm2.errors import UsageError
from kvm2.lab.catalogue import entries
from kvm2.lab.catalogue.entries import Pain, find, pains
from kvm2.softkvm import profile


def test_the_catalogue_is_large_and_says_where_things_are_from() -> None:
    assert len(pains()) >= 50
    linked = [pain for pain in pains() if any(link.startswith("https://github.com/") for link in pain.links)]
    assert len(linked) > 40
    for pain in pains():
        assert re.fullmatch(r"[a-z0-9-]+", pain.name)
        for link in pain.links:
            if "/issues/" in link:
                assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+", link), link
        assert {*pain.hosts, *filter(None, [pain.source])} <= set(profile.names()), pain.name


def test_every_subject_is_a_file_and_every_file_a_subject() -> None:
    assert sorted(path.stem for path in entries.FILES.glob("*.toml")) == sorted(entries.SUBJECTS)


@pytest.mark.parametrize("pain", pains(), ids=lambda pain: pain.name)
def test_the_command_to_try_works(pain: Pain, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs, and what it says is an answer (0) or a refusal of the host (1), not a wrong use."""
    program, *words = shlex.split(pain.command)
    assert program == "kvm2"
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    assert code in (0, 1), captured.err
    assert "went wrong" not in captured.out + captured.err and not (code and words[0] == "scenarios")


def test_a_name_that_is_not_known_gets_its_neighbours() -> None:
    with pytest.raises(UsageError, match="sve-set-with-holes"):
        find("sve-with-holes")


def test_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"name": "a", "title": "t", "issues": ["x"], "hosts": ["h"], "applies": "1", "story": "s", "today": "t"}
    row |= {"instead": "i", "command": "kvm2", "steps": [{"op": "describe"}]}
    assert entries._pain(tmp_path, row).steps == ({"op": "describe"},)
    with pytest.raises(UsageError, match="an entry has the keys"):
        entries._pain(tmp_path, {**row, "isues": []})
    with pytest.raises(UsageError, match="an entry has the keys"):
        entries._pain(tmp_path, {key: value for key, value in row.items() if key != "today"})
    with pytest.raises(UsageError, match="nothing may be empty"):
        entries._pain(tmp_path, {**row, "issues": []})
    monkeypatch.setattr(entries, "FILES", tmp_path)
    monkeypatch.setattr(entries, "SUBJECTS", ("one",))
    text = (
        "".join(f"{key} = {value!r}\n" for key, value in row.items() if key != "steps")
        + "steps = [{op = 'describe'}]\n"
    )
    (tmp_path / "one.toml").write_text(f"[[pain]]\n{text}[[pain]]\n{text}")
    with pytest.raises(UsageError, match="'a' is there twice"):
        entries.pains.__wrapped__()

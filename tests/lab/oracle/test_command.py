"""`kvm2 oracle` on the command line, as far as no machine is needed for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvm2.cli.main import main
from kvm2.cli.oracle import DEFAULT
from kvm2.lab.oracle import shapes


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "kvm2" / "oracle" / "machines" / "a64fx-4k" / "warm-0").mkdir(parents=True)
    assert main(["oracle", "list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == list(shapes.SHAPES)
    assert [row[0] for row in rows if row[-1] == "yes"] == ["a64fx-4k"]
    assert main(["oracle", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "kvm2.oracle/1" and len(told["shapes"]) == len(shapes.SHAPES)
    assert told["default"] == DEFAULT == shapes.DEFAULT


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["build", "max-4k"], 2, "did you mean"),
        (["exec", "--shape", "m1", "--", "kvm2"], 2, "no such shape"),
        (["exec", "--", "ls"], 2, "only kvm2 and python"),
        (["exec", "--put", "/no/such/file", "--", "kvm2"], 2, "No such file"),
        (["exec"], 2, "COMMAND"),
        (["record", "nothing"], 2, "no such shape"),
        (["record", "max-4k-6.12", "-o", "/no/such/directory/file"], 2, "there is no directory"),
        (["record", "max-4k-6.12", "--only", "nothing/*"], 2, "no scenario is left"),
    ],
)
def test_wrong_use(capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str) -> None:
    assert main(["oracle", *words]) == code
    out, err = capsys.readouterr()
    assert out == "" and text in err


@pytest.mark.parametrize("words", [["build"], ["exec", "--", "kvm2"], ["record", "max-4k-6.12"]])
def test_a_computer_without_qemu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["oracle", *words]) == 3
    out, err = capsys.readouterr()
    assert out == "" and "apt-get install --no-install-recommends qemu-system-arm" in err
    assert not (tmp_path / "kvm2").exists(), "nothing is made before it is known that it can be"

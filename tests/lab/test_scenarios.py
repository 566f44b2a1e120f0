"""Reading scenario files and files of answers, and what is said of wrong ones."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from kvm2.errors import UsageError
from kvm2.lab.scenarios import Scenario, load_record, load_scenarios, select

TEXT = '[{"sc": "a/b", "steps": [{"op": "close", "id": "x"}]}]'


def test_compressed_files_are_read_by_their_names(tmp_path: Path) -> None:
    plain, xz, gz = tmp_path / "s.json", tmp_path / "s.json.xz", tmp_path / "s.json.gz"
    plain.write_text(TEXT)
    xz.write_bytes(lzma.compress(TEXT.encode()))
    gz.write_bytes(gzip.compress(TEXT.encode()))
    assert load_scenarios(plain) == load_scenarios(xz) == load_scenarios(gz)
    assert load_scenarios(plain) == (Scenario("a/b", ({"op": "close", "id": "x"},)),)
    xz.write_text("not xz")
    with pytest.raises(UsageError, match="cannot be decompressed"):
        load_scenarios(xz)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", r"s\.json:1:2: not JSON"),
        ("{}", "a scenario file is a list"),
        ('[{"sc": 1, "steps": []}]', "entry 0 is not"),
        ('[{"sc": "a", "steps": []}, {"sc": "a", "steps": []}]', "is there twice"),
    ],
)
def test_wrong_scenario_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_scenarios(tmp_path / "s.json")


def test_a_file_of_answers(tmp_path: Path) -> None:
    file = tmp_path / "some-host.jsonl"
    file.write_text('{"host": "max", "cpu": "max"}\n{"sc": "a", "r": [[0, 0], "skipped", null]}\n')
    record = load_record(file)
    assert (record.host, record.answers) == ("max", {"a": [[0, 0], "skipped", None]})
    file.write_text('{"sc": "a", "r": []}\n')
    assert load_record(file).host == "some-host"
    file.write_text('{"sc": "a", "r": []}\n{"sc": "b"}\n')
    with pytest.raises(UsageError, match=r"jsonl:2: a line of answers"):
        load_record(file)


def test_globs() -> None:
    names = [Scenario(name, ()) for name in ("ipa/36/vgic", "ipa/36/slots", "vgic/types")]
    assert [s.name for s in select(names, [], ["vgic/*", "ipa/*/vgic"])] == ["ipa/36/slots"]
    assert [s.name for s in select(names, ["vgic/*"], [])] == ["vgic/types"]
    with pytest.raises(UsageError, match="no scenario is left"):
        select(names, ["x"], [])

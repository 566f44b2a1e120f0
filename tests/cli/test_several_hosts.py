"""kvm2 probe, kvm2 compare and kvm2 create --on: exit codes, JSON, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvm2.cli.main import main
from kvm2.softkvm import profile


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def parsed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capsys, *words, "--json")
    found: dict[str, Any] = json.loads(out)
    return code, found


def test_probe_writes_a_host_and_does_not_overwrite_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    code, out, err = run(capsys, "probe", "--host", "max-4k-6.1", "--save", str(path))
    assert code == 0 and "habits of Linux 6.1" in out and "vhe and hvhe" in err
    assert profile.load(path).quirks == profile.load("max-4k-6.1").quirks
    before = path.read_bytes()
    code, _, err = run(capsys, "probe", "--host", "apple-m1", "--save", str(path))
    assert code == 2 and "--force" in err and path.read_bytes() == before
    assert run(capsys, "probe", "--host", "apple-m1", "--save", str(path), "--force")[0] == 0
    assert profile.load(path).ipa_limit == 36
    assert [one.name for one in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--save", "no-such-directory/mine.toml"), "there is no directory"),
        (("--save", ""), "is a directory"),
        (("--save", "."), "is a directory"),
        (("--name", " "), "--name is empty"),
    ],
)
def test_probe_refuses_a_place_before_it_asks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, str], said: str
) -> None:
    monkeypatch.setattr("kvm2.lab.hosts_asked.probed_of", None)  # asking would fail
    code, out, err = run(capsys, "probe", "--host", "apple-m1", *words)
    assert code == 2 and out == "" and said in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_place_that_this_user_may_not_look_into(tmp_path: Path) -> None:
    from kvm2.cli.verdicts import check_writable
    from kvm2.errors import UsageError

    (tmp_path / "shut").mkdir(mode=0o700)
    child = os.fork()
    if child == 0:
        answer = 1
        try:
            os.setresuid(65534, 65534, 65534)
            check_writable(tmp_path / "shut" / "mine.toml")
        except UsageError:
            answer = 0
        finally:
            os._exit(answer)
    assert os.waitpid(child, 0)[1] == 0


def test_plan_asks_this_machine_and_each_host_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvm2.lab import hosts_asked

    monkeypatch.setattr(hosts_asked, "is_real", lambda name: name == "/dev/kvm")
    monkeypatch.setattr(hosts_asked, "probe_real", lambda **_: hosts_asked.probed_of("apple-m1", guests=False))
    code, found = parsed(capsys, "plan", "--memory", "16G@56G", "--hosts", "/dev/kvm,graviton3")
    assert code == 1 and [one["limit"] for one in found["hosts"]] == [36, 48]
    code, _, err = run(capsys, "plan", "--memory", "1G@1G", "--hosts", "apple-m1,apple-m1")
    assert code == 2 and "given twice" in err


def test_probe_to_stdout_is_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "probe", "--host", "apple-m1", "--save", "-", "--name", "desk", "--no-guests")
    (tmp_path / "desk.toml").write_text(out)
    assert code == 0 and profile.load(tmp_path / "desk.toml").title == "desk, as kvm2 probe found it"


def test_probe_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = parsed(capsys, "probe", "--host", "cortex-a53-4k")
    assert code == 0 and found["schema"] == "kvm2.probe/1"
    assert found["facts"]["registers"]["MIDR_EL1"] == 0x410FD034 and found["saved"] is None
    code, found = parsed(capsys, "probe", "--host", "nosuch")
    assert code == 2 and found["error"]["kind"] == "HostError"
    code, out, _ = run(capsys, "probe", "--host", "cortex-a53-4k")
    assert code == 0 and "KVM_CAP" not in out and "registers" in out


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = parsed(capsys, "compare", "apple-m1", "graviton3")
    assert code == 0 and found["ok"] and found["common"]["values"]["physaddr_bits"] == 36
    assert {"subject": "limits", "name": "IPA limit", "values": ["36 bits", "48 bits"]} in found["differences"]
    assert found["registers"]["ID_AA64MMFR0_EL1"]["value"] & 0xF == 1
    assert "properties" in parsed(capsys, "compare", "apple-m1", "graviton3", "--all")[1]
    code, found = parsed(capsys, "compare", "graviton2,max-4k-protected")
    assert code == 1 and not found["ok"] and found["common"]["conflicts"]
    assert run(capsys, "compare", "apple-m1")[0] == 2
    code, out, _ = run(capsys, "compare", "max-4k-6.12", "type-log2")
    assert code == 0 and "alike in everything" in out


def test_create_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = parsed(capsys, "create", "--on", "apple-m1,graviton3", "--ipa-bits", "40")
    assert code == 1 and [one["ok"] for one in found["hosts"]] == [False, True]
    assert found["hosts"][0]["findings"][0]["path"] == "attrs[0].physaddr_bits"
    assert run(capsys, "create", "--on", "apple-m1,graviton3", "--ipa-bits", "36", "--dry-run")[0] == 0
    code, out, _ = run(capsys, "create", "--on", "apple-m1,type-enum", "--type", "1")
    assert code == 1 and out.splitlines()[2].startswith("type-enum  yes")
    assert run(capsys, "create", "--on", "nosuch")[0] == 2

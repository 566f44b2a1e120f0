"""The command `kvm2 scenarios`."""

from __future__ import annotations

import json

import pytest

from kvm2.cli.main import main
from kvm2.lab.catalogue import entries
from kvm2.lab.catalogue.entries import pains


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenarios", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(pains()) + 1 and lines[1].startswith("default-40-on-36-bits")
    assert main(["scenarios", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "kvm2.scenarios/1"
    assert found["scenarios"][0]["issues"][0] == "https://github.com/utmapp/UTM/issues/1221"


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenarios", "show", "migrate-to-a-smaller-ipa"]) == 0
    text = capsys.readouterr().out
    for part in (
        "comes from   graviton3",
        "holds where  arch == 'arm64' and limit < source.limit",
        "tp-libvirt/issues/6155",
    ):
        assert part in text
    assert "-> EOPNOTSUPP; finding: path physaddr_bits, value =source.limit, max =limit" in text
    assert main(["scenarios", "show", "ram-cap-62-gib"]) == 0
    assert "(where limit < 37)" in capsys.readouterr().out
    assert main(["scenarios", "show", "ram-cap-62-gib", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["op"] == "describe"
    assert main(["scenarios", "show", "ram-cap"]) == 2
    assert "did you mean ram-cap-62-gib" in capsys.readouterr().err


def test_run_on_their_own_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenarios", "run", "slot-one-page-beyond", "296-masked-to-40"]) == 0
    text = capsys.readouterr().out
    assert "slot-one-page-beyond  yes          apple-m1, nested-36, graviton3, raspberry-pi-4, max-16k-6.12" in text
    assert text.endswith("8 played: 8 as expected, 0 not\n")


def test_run_on_another_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenarios", "run", "--host", "rk3588", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["totals"]["not"] == 0 and found["totals"]["as_expected"] > 15
    assert sum(found["totals"].values()) == len(pains())
    assert main(["scenarios", "run", "default-40-on-36-bits", "--host", "rk3588"]) == 1
    assert "1 say nothing of this host" in capsys.readouterr().out


def test_an_unexpected_answer_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    pain = entries.find("296-masked-to-40")
    wrong = replace(pain, steps=({**pain.steps[0], "expect": "ok"}, pain.steps[1]))
    monkeypatch.setattr(entries, "pains", lambda: (wrong,))
    assert main(["scenarios", "run"]) == 1
    text = capsys.readouterr().out
    assert "296-masked-to-40 on graviton3:\n  step 0, create_vm old 296: EINVAL, expected success" in text
    assert "296-masked-to-40  no           graviton3, max-4k-6.12, apple-m1" in text
    assert "3 played: 0 as expected, 3 not" in text


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenarios", "run", "no-such"]) == 2
    assert main(["scenarios", "run", "--host", "no-such-host"]) == 2
    assert main(["scenarios", "rn"]) == 2

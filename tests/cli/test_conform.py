"""The command `kvm2 conform`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvm2.cli.conform import command
from kvm2.cli.main import main
from kvm2.lab.conform import Conform


def test_text_html_record_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, record = tmp_path / "r.html", tmp_path / "r.jsonl"
    words = ["conform", "--host", "cortex-a53-4k", "--only", "sys/*", "--html", str(html), "--record", str(record)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "cortex-a53-4k against recorded:cortex-a53-4k: 3 scenarios, 538 steps: 538 equal, 0 different" in out
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert main(["conform", "--host", "cortex-a53-4k", "--against", str(record), "--only", "sys/*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["ok"], found["against"]) == ("kvm2.conform/1", True, str(record))
    assert found["totals"] == {"steps": 538, "equal": 538, "named": 0, "different": 0, "untrusted": 0}


def test_a_difference_without_a_name_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["conform", "--host", "cortex-a72", "--against", "cortex-a53-4k", "--only", "sys/check_ext_vm"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "against  [40, 0]\n         here     [44, 0]" in out
    assert "2 of them named" not in out


def test_exit_codes_of_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", "--host", "x86-64"]) == 3
    assert "the scenarios are arm64's" in capsys.readouterr().err
    assert main(["conform", "--host", "apple-m1"]) == 2
    assert main(["conform"]) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("option", ["--html", "--record"])
def test_a_report_that_cannot_be_written_is_the_environments(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", "--host", "cortex-a53-4k", "--only", "sys/api", option, "/dev/full", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["message"].startswith("/dev/full: cannot be written: No space")


def test_an_interrupt_prints_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = Conform.run

    def run(self: Conform, progress: object) -> None:
        raise KeyboardInterrupt(whole(self))

    monkeypatch.setattr(Conform, "run", run)
    record = tmp_path / "r.jsonl"
    words = ["--host", "cortex-a53-4k", "--only", "sys/api", "--record", str(record)]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 1 and "Aborted" in done.output  # what click makes of it; `main` makes 130
    assert "cortex-a53-4k against recorded:cortex-a53-4k: 1 scenarios, 9 steps: 9 equal" in done.output
    assert len(record.read_text().splitlines()) == 2
    assert main(["conform", "--host", "cortex-a53-4k", "--only", "sys/api", "--json"]) == 130


def test_files_that_cannot_be_written_are_refused_before_anything_is_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conform, "run", lambda *args: pytest.fail("something was played"))
    words = ["conform", "--host", "cortex-a53-4k", "--only", "sys/api"]
    assert main([*words, "--html", str(tmp_path / "absent" / "r.html")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert main([*words, "--record", str(tmp_path)]) == 2
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main([*words, "--record", str(tmp_path / "r.jsonl")]) == 2
    assert "no permission" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_played(tmp_path: Path) -> None:
    """SIGINT while scenarios are played: the report and the files of what there is, and exit code 130."""
    record = tmp_path / "r.jsonl"
    words = ["conform", "--host", "max-4k-6.12", "--only", "run/*", "--patience", "1500", "--record", str(record)]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvm2", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(3)  # some of them wait for as long as was recorded: all take a multiple of it
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "max-4k-6.12 against recorded:max-4k-6.12: " in out
    assert record.read_text().startswith('{"host": "max-4k-6.12", ')

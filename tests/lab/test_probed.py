"""The host file of a real host, made here or inside a machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab import hosts_asked
from kvm2.lab.oracle import machine
from kvm2.lab.places import KERNEL, ORACLE, Place
from kvm2.lab.probed import save_model


def test_this_machine_is_probed_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def probed_of(host: str) -> SimpleNamespace:
        asked.append(host)
        return SimpleNamespace(text='title = "x"\n')

    monkeypatch.setattr(hosts_asked, "probed_of", probed_of)
    path = save_model(Place("/dev/kvm", "node", KERNEL, "arm64", 4096, ()), tmp_path)
    assert (path.name, path.read_text(), asked) == ("node.toml", 'title = "x"\n', ["/dev/kvm"])


@pytest.mark.parametrize("code", [0, 3])
def test_an_emulated_machine_is_probed_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    jobs: list[machine.Job] = []

    class Machine:
        def __enter__(self) -> Machine:
            return self

        def __exit__(self, *exc: object) -> None:
            return

        def run(self, job: machine.Job, stdin: object, out: object, err: object) -> SimpleNamespace:
            jobs.append(job)
            out(b'title = "inside"\n')  # type: ignore[operator]
            err(b"why not\n")  # type: ignore[operator]
            return SimpleNamespace(code=code)

    monkeypatch.setattr(machine, "open_machine", lambda shape, say: Machine())
    place = Place("oracle:cortex-a53-4k", "cortex-a53-4k", ORACLE, "arm64", 4096, ())
    if code:
        with pytest.raises(EnvironmentFault, match="ended with 3: why not"):
            save_model(place, tmp_path)
        return
    assert save_model(place, tmp_path).read_text() == 'title = "inside"\n'
    assert jobs[0].argv == ("kvm2", "probe", "--name", "cortex-a53-4k", "--save", "-")

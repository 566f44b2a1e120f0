"""The software model of a real KVM: the host file that `kvm2 probe` makes of it, here or inside an emulated machine."""

from __future__ import annotations

import sys
from pathlib import Path

from kvm2.errors import EnvironmentFault
from kvm2.lab.places import KERNEL, Place


def save_model(place: Place, directory: Path) -> Path:
    """Probes a real host, and writes the host file of it into a directory. EnvironmentFault where that is refused."""
    text = _here(place) if place.kind == KERNEL else _inside(place)
    path = directory / f"{place.machine}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _here(place: Place) -> str:
    from kvm2.lab.hosts_asked import probed_of

    return probed_of(place.name).text


def _inside(place: Place) -> str:
    from kvm2.lab.oracle.inside import entry_of
    from kvm2.lab.oracle.machine import Job, open_machine
    from kvm2.lab.oracle.shapes import shape

    words = ("kvm2", "probe", "--name", place.machine, "--save", "-")
    out, err = bytearray(), bytearray()
    with open_machine(shape(place.machine), _say) as machine:
        finished = machine.run(Job(entry_of("kvm2"), words), None, out.extend, err.extend)
    if finished.code:
        raise EnvironmentFault(f"{' '.join(words)} inside {place.name} ended with {finished.code}: {err.decode()}")
    return out.decode()


def _say(text: str) -> None:
    print(f"kvm2: oracle {text}", file=sys.stderr, flush=True)

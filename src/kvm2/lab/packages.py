"""Debian's arm64 packages, by apt: its own lists and its own cache, nothing of this machine's system is changed.

Which packages were chosen is written down in the cache and stays so until `update`: a machine that was built once is
built the same way again, without a network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.errors import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

INSTALL = {
    "qemu-system-aarch64": "qemu-system-arm",
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
}


@dataclass(frozen=True, slots=True)
class Flavour:
    """One of Debian's kernels for arm64: a pattern of its package's name, and its page size in bytes."""

    name: str
    package: str
    page: int


# Debian has no kernel with 64K pages. `cloud` is the smallest image; all have KVM built in.
FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour("6.12-4k", r"linux-image-6\.12\.[0-9]+\+deb[0-9]+-cloud-arm64-unsigned", 4096),
        Flavour("6.12-16k", r"linux-image-6\.12\.[0-9]+\+deb[0-9]+-arm64-16k-unsigned", 16384),
        Flavour("6.1-4k", r"linux-image-6\.1\.0-[0-9]+-cloud-arm64-unsigned", 4096),
    )
}


def need(*programs: str, whose: str = "fetching Debian's packages") -> None:
    """EnvironmentFault, with what to install, where a program is missing. `whose` need it is, for the message."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        packages = " ".join(dict.fromkeys(INSTALL[program] for program in missing))
        raise EnvironmentFault(
            f"{whose} needs {', '.join(missing)}: on Debian, apt-get install --no-install-recommends {packages}"
        )


def cache_directory() -> Path:
    """Where Debian's packages and the oracle's machines are kept: `kvm2/oracle` in XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvm2" / "oracle"


def newest(names: Iterable[str], flavour: Flavour) -> str | None:
    """The package of a flavour with the highest version in its name; None where there is none.

    >>> newest([f"linux-image-6.1.0-{n}-cloud-arm64-unsigned" for n in (9, 56, 47)], FLAVOURS["6.1-4k"])
    'linux-image-6.1.0-56-cloud-arm64-unsigned'
    """
    fitting = [name for name in names if re.fullmatch(flavour.package, name)]
    return max(fitting, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], default=None)


class Archive:
    """The packages of a cache directory, fetched when they are first asked for. `say` is told what takes time."""

    def __init__(self, cache: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self._lists, self._apt, self._debs = cache / "lists", cache / "apt", cache / "packages"
        self._chosen_file = cache / "packages.json"
        self._say = say

    def kernel(self, flavour: str) -> Path:
        """The package of a kernel."""
        return self._package(flavour, lambda: self._newest(FLAVOURS[flavour]))

    def package(self, name: str) -> Path:
        """A package by its name."""
        return self._package(name, lambda: name)

    def update(self) -> None:
        """Forgets what was chosen, and reads what there is now."""
        self._chosen_file.unlink(missing_ok=True)
        self._update()

    def _chosen(self) -> dict[str, str]:
        try:
            found = json.loads(self._chosen_file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _package(self, key: str, name: Callable[[], str]) -> Path:
        chosen = self._chosen().get(key)
        if chosen is not None and (self._debs / chosen).is_file():
            return self._debs / chosen
        self._lists.joinpath("partial").mkdir(parents=True, exist_ok=True)
        if not any(self._lists.glob("*Packages*")):
            self._update()
        try:
            path = self._download(name())
        except EnvironmentFault:
            self._update()  # the lists name a version that is no longer there
            path = self._download(name())
        self._remember(key, path.name)
        return path

    def _remember(self, key: str, file: str) -> None:
        chosen = {**self._chosen(), key: file}
        new = self._chosen_file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(chosen, indent=1, sort_keys=True) + "\n")
        new.replace(self._chosen_file)

    def _newest(self, flavour: Flavour) -> str:
        names = self._run("apt-cache", "pkgnames", "linux-image-").split()
        found = newest(names, flavour)
        if found is None:
            raise EnvironmentFault(
                f"apt knows no arm64 package {flavour.package}: Debian's kernels are needed (Debian 12 has them)"
            )
        return found

    def _update(self) -> None:
        self._say("reading Debian's list of arm64 packages")
        self._lists.joinpath("partial").mkdir(parents=True, exist_ok=True)
        try:
            self._run("apt-get", "update")
        except EnvironmentFault as error:
            # One source of several may have nothing for arm64: what matters is whether the packages are found.
            if not any(self._lists.glob("*Packages*")):
                raise EnvironmentFault(f"{error}\na mirror of Debian for arm64 is needed") from None

    def _download(self, name: str) -> Path:
        self._say(f"fetching {name}")
        place = self._debs / f"fetching-{os.getpid()}"
        place.mkdir(parents=True, exist_ok=True)
        try:
            self._run("apt-get", "download", name, cwd=place)
            found = list(place.glob("*.deb"))
            if len(found) != 1:
                raise EnvironmentFault(f"apt-get download {name} gave {len(found)} packages")
            return found[0].replace(self._debs / found[0].name)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _run(self, program: str, *words: str, cwd: Path | None = None) -> str:
        need(program)
        self._apt.joinpath("archives", "partial").mkdir(parents=True, exist_ok=True)
        options = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "",  # the cache directory need not be readable by apt's own user
            "Dir::State::Lists": str(self._lists),
            "Dir::Cache": str(self._apt),
            "Acquire::Languages": "none",
        }
        command = [program, "-q", *(f"-o{key}={value}" for key, value in options.items()), *words]
        env = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise EnvironmentFault(f"{program} {' '.join(words)} failed: " + "; ".join(lines))
        return done.stdout

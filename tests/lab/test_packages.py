"""Which packages are chosen, and what apt is asked; apt itself is played by a script."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.packages import FLAVOURS, Archive, cache_directory, need, newest

NAMES = [
    "linux-image-6.12.107+deb12-cloud-arm64-unsigned",
    "linux-image-6.12.9+deb12-cloud-arm64-unsigned",
    "linux-image-6.12.117+deb12-cloud-arm64-unsigned-dbg",
    "linux-image-6.12.113+deb12-arm64-16k-unsigned",
    "linux-image-6.12.117+deb12-arm64-unsigned",
    "linux-image-6.12.117+deb12-rt-arm64-unsigned",
    "linux-image-6.1.0-9-cloud-arm64-unsigned",
    "linux-image-6.1.0-56-cloud-arm64-unsigned",
    "linux-image-6.1.0-57-arm64-unsigned",
]

# Plays apt: what it knows lies beside it, and what it is asked is written down there.
APT = """#!/bin/sh
here=$(dirname "$0")
lists=$(printf '%s\\n' "$@" | sed -n 's/^-oDir::State::Lists=//p')
for word; do case $word in -*) ;; *) set -- "$@" "$word" ;; esac; shift; done
echo "$*" >> "$here/asked"
case "$1" in
update) touch "$lists/x_Packages"; cp "$here/new" "$here/there" 2>/dev/null; exit $(cat "$here/update-code") ;;
pkgnames) cat "$here/names" ;;
download) grep -qx "$2" "$here/there" || { echo "E: 404 Not Found $2" >&2; exit 100; }
    touch "${2}_1_arm64.deb" ;;
esac
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a played apt."""
    place = tmp_path / "bin"
    place.mkdir()
    for name in ("apt-get", "apt-cache"):
        (place / name).write_text(APT)
        (place / name).chmod(0o755)
    (place / "names").write_text("\n".join(NAMES) + "\n")
    (place / "there").write_text("")
    (place / "new").write_text("\n".join([*NAMES, "libc6"]) + "\n")
    (place / "update-code").write_text("0")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def asked(apt: Path) -> list[str]:
    return (apt / "asked").read_text().splitlines()


def test_the_newest_by_number() -> None:
    assert newest(NAMES, FLAVOURS["6.12-4k"]) == NAMES[0]
    assert newest(NAMES, FLAVOURS["6.12-16k"]) == NAMES[3]
    assert newest(NAMES, FLAVOURS["6.1-4k"]) == NAMES[7]
    assert newest(["linux-image-amd64"], FLAVOURS["6.1-4k"]) is None


def test_a_package_is_fetched_once_and_stays_chosen(apt: Path, tmp_path: Path) -> None:
    said: list[str] = []
    archive = Archive(tmp_path / "cache", said.append)
    path = archive.kernel("6.12-4k")
    assert path.name == f"{NAMES[0]}_1_arm64.deb" and path.is_file()
    assert asked(apt) == ["update", "pkgnames linux-image-", f"download {NAMES[0]}"]
    assert said == ["reading Debian's list of arm64 packages", f"fetching {NAMES[0]}"]
    (apt / "names").write_text("linux-image-6.12.999+deb12-cloud-arm64-unsigned\n")
    assert archive.kernel("6.12-4k") == path and len(asked(apt)) == 3
    with (apt / "new").open("a") as file:
        file.write("linux-image-6.12.999+deb12-cloud-arm64-unsigned\n")
    archive.update()
    assert "6.12.999" in archive.kernel("6.12-4k").name
    assert not list((tmp_path / "cache" / "packages").glob("fetching*"))


def test_lists_that_are_too_old(apt: Path, tmp_path: Path) -> None:
    lists = tmp_path / "cache" / "lists"
    lists.mkdir(parents=True)
    (lists / "old_Packages").touch()
    Archive(tmp_path / "cache").kernel("6.12-16k")
    assert asked(apt)[-3:] == ["update", "pkgnames linux-image-", f"download {NAMES[3]}"]


def test_a_source_without_arm64_does_no_harm(apt: Path, tmp_path: Path) -> None:
    (apt / "update-code").write_text("100")
    assert Archive(tmp_path / "cache").kernel("6.1-4k").is_file()


def test_no_such_kernel(apt: Path, tmp_path: Path) -> None:
    (apt / "names").write_text("linux-image-amd64\n")
    with pytest.raises(EnvironmentFault, match=r"Debian's kernels are needed"):
        Archive(tmp_path / "cache").kernel("6.12-4k")


def test_what_apt_says_is_passed_on(apt: Path, tmp_path: Path) -> None:
    (apt / "new").write_text("")
    with pytest.raises(EnvironmentFault, match="404 Not Found"):
        Archive(tmp_path / "cache").kernel("6.12-4k")


def test_a_missing_program_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = r"^the oracle needs qemu-system-aarch64, dpkg-deb: .* apt-get install .*recommends qemu-system-arm dpkg$"
    with pytest.raises(EnvironmentFault, match=words):
        need("qemu-system-aarch64", "dpkg-deb", whose="the oracle")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "kvm2" / "oracle"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/.cache/kvm2/oracle")

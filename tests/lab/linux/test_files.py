"""Where a kernel and its initramfs come from, and where they stay."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault, UsageError
from kvm2.lab import kernel_package
from kvm2.lab.linux import files, initramfs
from kvm2.lab.linux.files import linux_files

BUSYBOX = b"\0[\0[[\0mount\0sh\0end"


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Packages that are played; what was unpacked of them."""
    unpacked: list[str] = []
    names = {"6.12-4k": "linux-image-6.12.1+deb12-cloud-arm64-unsigned_6.12.1-1_arm64.deb"}

    class Played:
        def __init__(self, cache: Path, say: object) -> None:
            pass

        def kernel(self, flavour: str) -> Path:
            return tmp_path / names[flavour]

        def package(self, name: str) -> Path:
            return tmp_path / f"{name}_1_arm64.deb"

    def members(package: Path) -> list[tuple[str, None, bytes]]:
        unpacked.append(package.name.split("_")[0])
        if "busybox" in package.name:
            return [("usr/bin/busybox", None, BUSYBOX)]
        return [("boot/vmlinuz-6.12", None, b"kernel"), ("lib/modules/x/virtio_mmio.ko", None, b"module")]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "Archive", Played)
    monkeypatch.setattr(files, "need", lambda *programs: None)
    monkeypatch.setattr(kernel_package, "members", members)
    monkeypatch.setattr(initramfs, "members", members)
    names["other"] = names["6.12-4k"].replace("6.12.1", "6.12.2")
    monkeypatch.setattr(Played, "names", names, raising=False)
    return unpacked


def test_made_once_and_kept(archive: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    found = linux_files(say=said.append)
    assert (found.flavour, found.page, found.version) == ("6.12-4k", 4096, "6.12.1+deb12-cloud-arm64")
    assert found.kernel.read_bytes() == b"kernel" and b"virtio_mmio.ko" in found.initrd.read_bytes()
    assert said == ["putting together 6.12.1+deb12-cloud-arm64 and its initramfs"]
    assert archive == ["linux-image-6.12.1+deb12-cloud-arm64-unsigned", "busybox-static"]
    assert linux_files() == found and len(archive) == 2
    assert found.kernel.is_relative_to(tmp_path / "cache" / "kvm2" / "linux")


def test_another_version_takes_the_place_of_the_old(archive: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = linux_files()
    played = files.Archive
    played.names["6.12-4k"] = played.names["other"]  # type: ignore[attr-defined]
    new = linux_files()
    assert new.version == "6.12.2+deb12-cloud-arm64" and new.kernel.is_file()
    assert found.kernel.is_file(), "somebody may just be booting it"
    os.utime(found.kernel.parent, (0, 0))
    played.names["6.12-4k"] = played.names["other"].replace("6.12.2", "6.12.3")  # type: ignore[attr-defined]
    newest = linux_files()
    left = set(newest.kernel.parent.parent.iterdir())
    assert left == {newest.kernel.parent, new.kernel.parent}


def test_nothing_half_made_stays(archive: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(initramfs, "build", lambda parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        linux_files()
    assert list((tmp_path / "cache" / "kvm2" / "linux").iterdir()) == []


def test_what_cannot_be_had(archive: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"flavour '5.10-4k': allowed are 6.12-4k, 6.12-16k, 6.1-4k"):
        linux_files("5.10-4k")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EnvironmentFault, match="needs Linux, apt and dpkg"):
        linux_files()

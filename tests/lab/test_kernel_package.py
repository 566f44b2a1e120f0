"""What is taken from packages: they are made here."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.kernel_package import in_order, kernel_and_modules

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, of the package dpkg")


def package(tmp_path: Path, files: dict[str, bytes]) -> Path:
    root = tmp_path / "root"
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    control = root / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text("Package: x\nVersion: 1\nArchitecture: arm64\nMaintainer: a <a@b>\nDescription: x\n")
    made = tmp_path / "x.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", str(root), str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


def module(depends: str) -> bytes:
    return b"\x7fELF\0name=x\0depends=" + depends.encode() + b"\0more\0"


@needs_dpkg
def test_a_kernel_and_the_modules_that_are_wanted_in_order(tmp_path: Path) -> None:
    files = {
        "boot/vmlinuz-6.1": b"kernel",
        "boot/config-6.1": b"",
        "lib/modules/6.1/a/virtio_console.ko": module("virtio_ring,virtio"),
        "lib/modules/6.1/a/virtio.ko": module("virtio_ring"),
        "lib/modules/6.1/a/virtio_ring.ko.xz": lzma.compress(module("")),
        "lib/modules/6.1/a/virtio-pci.ko": module("virtio"),
        "lib/modules/6.1/a/virtio_net.ko": module("virtio"),
    }
    image, found = kernel_and_modules(package(tmp_path, files))
    modules = in_order(("virtio_pci", "virtio_console", "not_there"), found)
    assert image == b"kernel"
    assert list(modules) == ["virtio_ring", "virtio", "virtio_pci", "virtio_console"]
    assert modules["virtio_ring"] == module("")


@needs_dpkg
def test_packages_that_are_no_good(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="no kernel in it"):
        kernel_and_modules(package(tmp_path, {"usr/x": b""}))
    broken = tmp_path / "broken.deb"
    broken.write_bytes(b"no package")
    with pytest.raises(EnvironmentFault, match=r"broken\.deb: not a Debian package.*delete it"):
        kernel_and_modules(broken)

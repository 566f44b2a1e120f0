"""Debian's arm64 kernels with an initramfs of busybox: fetched once, put together once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.errors import EnvironmentFault, UsageError
from kvm2.lab.packages import FLAVOURS, Archive, cache_directory, need

if TYPE_CHECKING:
    from collections.abc import Callable

BUSYBOX = "busybox-static"
DEFAULT_FLAVOUR = "6.12-4k"
UNUSED_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class LinuxFiles:
    """A kernel and an initramfs that fits it. `page` is the kernel's page size in bytes, `version` as in `uname -r`."""

    flavour: str
    kernel: Path
    initrd: Path
    version: str
    page: int


def linux_files(flavour: str = DEFAULT_FLAVOUR, say: Callable[[str], None] = lambda text: None) -> LinuxFiles:
    """The files of a flavour ("6.12-4k", "6.12-16k", "6.1-4k"), fetched and built where they are not there yet.

    `say` is told what takes time. UsageError for another flavour; EnvironmentFault where the packages cannot be had.
    """
    found = FLAVOURS.get(flavour)
    if found is None:
        raise UsageError(f"flavour {flavour!r}: allowed are {', '.join(FLAVOURS)}: Debian has these kernels for arm64")
    if sys.platform != "linux":
        raise EnvironmentFault(
            "fetching Debian's packages needs Linux, apt and dpkg; elsewhere give --kernel and --initrd"
        )
    need("apt-get", "apt-cache", "dpkg-deb")
    archive = Archive(cache_directory(), say)
    kernel, busybox = archive.kernel(flavour), archive.package(BUSYBOX)
    place = cache_directory().parent / "linux" / f"{flavour}-{_key(kernel, busybox)}"
    if not place.is_dir():
        say(f"putting together {_version(kernel)} and its initramfs")
        _make(place, kernel, busybox)
        _forget_old(place)
    os.utime(place)  # it is in use
    return LinuxFiles(flavour, place / "vmlinuz", place / "initrd", _version(kernel), found.page)


def _version(kernel: Path) -> str:
    """The kernel's name of itself: that of the package, without what is around it."""
    return re.sub(r"^linux-image-|-unsigned$", "", kernel.name.split("_")[0])


def _key(kernel: Path, busybox: Path) -> str:
    """Of everything that the initramfs is made from."""
    from kvm2.lab import cpio, kernel_package
    from kvm2.lab.linux import initramfs

    digest = hashlib.sha256(f"{kernel.name} {busybox.name}".encode())
    for module in (cpio, kernel_package, initramfs):
        digest.update(Path(module.__file__ or "").read_bytes())
    return digest.hexdigest()[:16]


def _make(place: Path, kernel: Path, busybox: Path) -> None:
    """A new directory, which gets its name only when all is in it."""
    import shutil

    from kvm2.lab.kernel_package import kernel_and_modules
    from kvm2.lab.linux import initramfs

    new = place.with_name(f"new-{os.getpid()}-{place.name}")
    new.mkdir(parents=True)
    try:
        image, modules = kernel_and_modules(kernel)
        (new / "vmlinuz").write_bytes(image)
        (new / "initrd").write_bytes(initramfs.build(initramfs.parts_of(modules, busybox)))
        new.rename(place)
    except OSError:
        if not place.is_dir():  # where it is there now, another process was quicker
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _forget_old(place: Path) -> None:
    """What was made of a flavour before goes, unless somebody may be using it yet."""
    import shutil

    flavour = place.name.rpartition("-")[0]
    for old in place.parent.glob(f"{flavour}-*"):
        if old != place and time.time() - old.stat().st_mtime > UNUSED_SECONDS:
            shutil.rmtree(old, ignore_errors=True)

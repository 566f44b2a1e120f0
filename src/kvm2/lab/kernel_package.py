"""What is in a Debian package, and a kernel with modules out of one."""

from __future__ import annotations

import lzma
import re
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.errors import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


def members(package: Path) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
    """The files and links of a Debian package: path (without ./, below usr where Debian merges it), entry, contents."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    path = re.sub(r"^(lib|bin|sbin)/", r"usr/\1/", member.name.removeprefix("./"))
                    file = tar.extractfile(member) if member.isreg() else None
                    yield path, member, file.read() if file else b""
        except tarfile.TarError as error:
            raise EnvironmentFault(f"{package}: not a Debian package: {error}; delete it") from error
        finally:
            process.stdout.close()


def kernel_and_modules(package: Path) -> tuple[bytes, dict[str, bytes]]:
    """The kernel of a package, and its modules by their names, as they lie there; EnvironmentFault without a kernel."""
    image, modules = b"", {}
    for path, _, data in members(package):
        found = re.search(r"/([^/]+)\.ko(\.xz)?$", path)
        if path.startswith("boot/vmlinuz-"):
            image = data
        elif found:
            modules[found[1].replace("-", "_")] = data
    if not image:
        raise EnvironmentFault(f"{package}: there is no kernel in it")
    return image, modules


def in_order(wanted: Iterable[str], modules: Mapping[str, bytes]) -> dict[str, bytes]:
    """The modules `wanted` and those that they depend on, unpacked, in the order in which they can be loaded.

    What is not among `modules` is left out: such a kernel has it built in.
    """
    ordered: dict[str, bytes] = {}
    for name in wanted:
        _add_module(name, modules, ordered)
    return ordered


def _add_module(name: str, modules: Mapping[str, bytes], ordered: dict[str, bytes]) -> None:
    """Adds a module after those that it depends on, by its own account (`modinfo`)."""
    if name in ordered or name not in modules:
        return
    data = modules[name]
    if data.startswith(b"\xfd7zXZ"):
        data = lzma.decompress(data)
    depends = re.search(rb"\0depends=([^\0]*)\0", data)
    for other in depends[1].decode().split(",") if depends else ():
        _add_module(other.replace("-", "_"), modules, ordered)
    ordered[name] = data

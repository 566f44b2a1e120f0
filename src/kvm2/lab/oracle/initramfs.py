"""The file system that the machine starts with: Python from Debian's packages, trimmed, and the agent.

kvm2 itself is not in it: it is loaded into the running machine (`application`), so that a change of it does not need
the machine to boot again.
"""

from __future__ import annotations

import io
import marshal
import re
import sys
import tarfile
from functools import cache
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.errors import EnvironmentFault
from kvm2.lab.cpio import Tree
from kvm2.lab.kernel_package import members
from kvm2.lab.oracle.elf import needed

if TYPE_CHECKING:
    from collections.abc import Iterable

# Python, and every library that its own modules need where kvm2 uses them.
PYTHON = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libgcc-s1",
    "libexpat1",
    "zlib1g",
    "libffi8",
    "liblzma5",
    "libbz2-1.0",
)
STDLIB = "usr/lib/python3.11/"
LIBRARIES = "usr/lib/aarch64-linux-gnu/"
# Of the standard library, what nothing in kvm2 could want.
UNWANTED = re.compile(
    STDLIB + r"(test|idlelib|tkinter|turtledemo|lib2to3|distutils|ensurepip|pydoc_data|unittest|sqlite3|dbm|curses|"
    r"wsgiref|xmlrpc|venv|config-|_sysconfigdata|pydoc\.|turtle\.|antigravity\.)"
    r"|.*/(_test|_codecs_(?:cn|hk|iso2022|jp|kr|tw)|_xxtest|xxlimited)"
)
WANTED = re.compile(rf"{STDLIB}|{LIBRARIES}[^/]*\.so[^/]*$|usr/lib/ld-linux-aarch64\.so\.1$|usr/bin/python3\.11$")
# The C library's rarer parts.
LEFT_OUT = re.compile(rf"{LIBRARIES}(libnss_|libnsl|libthread_db|libmemusage|libpcprofile|libc_malloc|libBrokenLocale)")
# What the port needs; kernels that have it built in have no such modules.
WANTED_MODULES = ("virtio_pci", "virtio_console")


@cache
def _python_tree(packages: tuple[Path, ...]) -> Tree:
    tree = Tree()
    for place in ("dev", "proc", "sys", "tmp", "usr/bin", "usr/lib"):
        tree.directory(place)
    tree.link("bin", "usr/bin")
    tree.link("lib", "usr/lib")
    compiled = can_compile()
    for package in packages:
        for path, member, data in members(package):
            if not WANTED.match(path) or UNWANTED.match(path) or LEFT_OUT.match(path):
                continue
            if member.issym():
                tree.link(path, member.linkname)
            elif path.endswith(".py") and compiled:
                tree.file(path + "c", compile_module(data, "/" + path))
            elif member.isreg():
                tree.file(path, data, member.mode & 0o777)
    return tree


def base(packages: Iterable[Path], agent: bytes, modules: dict[str, bytes]) -> bytes:
    """The archive: Python, the agent as /init, and kernel modules in the order in which they can be loaded."""
    tree = Tree(dict(_python_tree(tuple(packages)).entries))
    tree.file("init", b"#!/usr/bin/python3.11 -IS\n" + agent, 0o755)
    for number, name in enumerate(modules):
        tree.file(f"modules/{number:02}-{name}.ko", modules[name])
    check_libraries(tree)
    return tree.pack()


def check_libraries(tree: Tree) -> None:
    """Takes out Python's modules whose libraries are not there; EnvironmentFault where Python's own are not."""
    there = {path.rpartition("/")[2] for path in tree.entries if ".so" in path}
    for path in list(tree.entries):
        lacking = [name for name in needed(tree.read(path) or b"") if name not in there]
        if lacking and path.startswith(STDLIB):
            del tree.entries[path]
        elif lacking:
            raise EnvironmentFault(f"{path} needs {', '.join(lacking)}, which is in none of the packages")


def can_compile() -> bool:
    """Whether this Python writes the byte code that the machine's Python reads."""
    return sys.implementation.name == "cpython" and sys.version_info[:2] == (3, 11)


def compile_module(source: bytes, path: str) -> bytes:
    """A .pyc file that is never compared with its source (PEP 552)."""
    code = compile(source, path, "exec", dont_inherit=True)
    return MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + marshal.dumps(code)


def files_of(root: Path) -> list[Path]:
    """The files of an installed package, without what this machine's Python made of them."""
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    ]


def application(sources: Iterable[tuple[str, bytes]]) -> bytes:
    """Files (path, contents) as a tar archive, the modules with their byte code where that can be had."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, data in sources:
            _add(tar, path, data)
            if path.endswith(".py") and can_compile():
                directory, _, name = path.rpartition("/")
                _add(tar, f"{directory}/__pycache__/{name[:-3]}.cpython-311.pyc", compile_module(data, f"/app/{path}"))
    return out.getvalue()


def _add(tar: tarfile.TarFile, path: str, data: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))

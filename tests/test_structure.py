"""The shape of the project: who imports whom, how long files are, and that nothing lies about unused."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SOURCE = PROJECT / "src" / "kvm2"
MODULES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 400
MAX_FUNCTION_LINES = 60

# Rooms from the bottom up; each may import itself and what stands before it (docs/architecture.md).
ROOMS = ("errors", "abi", "softkvm", "hosts", "handles", "board", "lab", "cli")
HANDLES = {
    "handle",
    "irq_vm",
    "kvm",
    "vm",
    "vcpu",
    "device",
    "ram",
    "exits",
    "names",
    "registers",
    "spec",
    "negotiation",
    "memorymap",
    "x86_calls",
    "x86_exits",
    "x86_kvm",
    "x86_msrs",
    "x86_registers",
    "x86_vcpu",
    "x86_vm",
}
# Data with a little code around it, for anybody.
SHARED = {"guests"}


def room_of(path: Path) -> str:
    """The room of a module: its directory, or for one at the top what it belongs to."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if len(parts) > 1:
        return parts[0]
    if parts[0] in HANDLES:
        return "handles"
    return {"__init__": "package", "__main__": "cli", "pytest_plugin": "cli"}.get(parts[0], parts[0])


def imported(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module of kvm2, line, only for the type checker) of every import, also those inside functions."""
    tree = ast.parse(path.read_text())
    checking = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kvm2":
            yield from ((f"{node.module}.{name.name}", node.lineno, id(node) in checking) for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                (n.name, node.lineno, id(node) in checking) for n in node.names if n.name.split(".")[0] == "kvm2"
            )


def room_of_import(module: str) -> str:
    """The room that an imported name is in."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        path = SOURCE.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return room_of(path.with_suffix(".py"))
        if (path / "__init__.py").is_file():
            return parts[0]
    return "package"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    here = room_of(path)
    if here in ("package", *SHARED):
        return
    assert here in ROOMS, f"{path}: no room {here!r}; say in tests/test_structure.py where it stands"
    wrong = [
        f"line {line}: {module}"
        for module, line, checking in imported(path)
        if (there := room_of_import(module)) not in ("package", *SHARED)
        and not checking
        and ROOMS.index(there) > ROOMS.index(here)
    ]
    assert not wrong, f"{path.relative_to(PROJECT)} ({here}) imports from above: {wrong}"


def test_abi_stands_alone() -> None:
    for path in (SOURCE / "abi").glob("*.py"):
        rooms = {room_of_import(module) for module, _, checking in imported(path) if not checking}
        assert rooms <= {"abi", "errors", "package"}, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_is_and_uses_no_magic(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, f"{path} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(name.name != "*" for name in node.names), f"{path}:{node.lineno}: import *"
        if isinstance(node, ast.ClassDef):
            assert all(keyword.arg != "metaclass" for keyword in node.keywords), f"{path}:{node.lineno}: a metaclass"


def test_every_module_is_used() -> None:
    """No file that nothing imports: each module is imported somewhere, or is started by its name."""
    text = "\n".join(path.read_text() for path in MODULES)
    names = {module for path in MODULES for module, _, _ in imported(path)}
    lazily = set(re.findall(r'"(kvm2(?:\.\w+)+)"', text))
    entry_points = (PROJECT / "pyproject.toml").read_text()
    from kvm2.cli.main import COMMANDS

    for path in MODULES:
        parts = ("kvm2", *path.relative_to(SOURCE).with_suffix("").parts)
        module = ".".join(parts).removesuffix(".__init__")
        if parts[-1] in ("__init__", "__main__") or (parts[1:2] == ("cli",) and parts[-1] in COMMANDS):
            continue
        used = any(name == module or name.startswith(module + ".") for name in names) or module in lazily
        started = f'"-m", "{module}"' in text or f"-m {module}" in text or f'= "{module}"' in entry_points
        assert used or started or parts[-1] == "main", f"nothing uses {module}"


def test_nothing_heavy_is_imported_at_start() -> None:
    """`import kvm2` and `kvm2 --help` stay light."""
    script = "import sys, kvm2, kvm2.cli.main; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"unicorn", "numpy", "rich", "dataclasses", "asyncio", "kvm2.abi.ioctls", "kvm2.softkvm.door"}
    assert not heavy & set(done.stdout.split())


def test_no_stray_artefacts() -> None:
    """No editor's or build's leavings among the sources, and no file that is empty without a reason."""
    for root in ("src", "tests", "docs", "bench"):
        for path in (PROJECT / root).rglob("*"):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            assert path.suffix not in (".orig", ".rej", ".bak", ".o", ".so", ".pyc", ".log"), path
            assert path.stat().st_size or path.name in ("__init__.py", "py.typed"), f"{path} is empty"

"""The kernel's own files, out of Debian's linux-source-6.12: UAPI headers, arm64's tables of system registers."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

TARBALL = Path("/usr/src/linux-source-6.12.tar.xz")
TOP = "linux-source-6.12/"
WANTED = (
    "include/uapi/",
    "arch/arm64/include/uapi/",
    "arch/x86/include/uapi/",
    "arch/arm64/include/asm/sysreg.h",
    "arch/arm64/include/asm/esr.h",
    "arch/arm64/tools/sysreg",
    "arch/arm64/kvm/arm.c",
    "arch/arm64/kvm/sys_regs.c",
    "virt/kvm/kvm_main.c",
)


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> Path:
    """The top of a tree with WANTED in it. Unpacking takes 10 s, so the tree stays in pytest's cache."""
    if not TARBALL.is_file():
        pytest.skip(f"{TARBALL} is not installed (Debian package linux-source-6.12): nothing to compare with")
    stat = TARBALL.stat()
    place = Path(request.config.cache.mkdir(f"kernel-{len(WANTED)}-{stat.st_size}-{stat.st_mtime_ns}"))
    if not (place / "complete").exists():
        with tarfile.open(TARBALL) as tar:
            for member in tar:
                name = member.name.removeprefix(TOP)
                if member.isfile() and name.startswith(WANTED):
                    target = place / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
        for arch in ("arm64", "x86"):
            _generic_headers(place, arch)
        (place / "complete").touch()
    return place


def _generic_headers(top: Path, arch: str) -> None:
    """What `make headers` does: asm/x.h for each generic header of which the architecture has none, no compiler.h."""
    stub = top / f"stub_{arch}"
    for generic in (top / "include/uapi/asm-generic").glob("*.h"):
        if not (top / f"arch/{arch}/include/uapi/asm" / generic.name).exists():
            (stub / "asm").mkdir(parents=True, exist_ok=True)
            (stub / "asm" / generic.name).write_text(f"#include <asm-generic/{generic.name}>\n")
    (stub / "linux").mkdir(exist_ok=True)
    for name in ("compiler.h", "compiler_types.h"):
        (stub / "linux" / name).write_text("")


@pytest.fixture(scope="session")
def compile_c() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a compiler with arguments; the test is skipped where that compiler is not installed."""

    def run(compiler: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run([compiler, *map(str, args)], capture_output=True, text=True, timeout=120, check=False)
        except FileNotFoundError:
            pytest.skip(f"{compiler} is not installed")

    return run

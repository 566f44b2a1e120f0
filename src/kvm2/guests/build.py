"""Builds demo.elf from demo.c, start.S and demo.ld: `python -m kvm2.guests.build [OUTPUT]`.

The same compiler gives the same bytes: no build id, no notes, no paths, one segment.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvm2.errors import EnvironmentFault, Kvm2Error
from kvm2.guests import DEMO

HERE = Path(__file__).parent
COMPILER = "aarch64-linux-gnu-gcc"
# The first line of `aarch64-linux-gnu-gcc --version` that made the committed image.
BUILT_WITH = "aarch64-linux-gnu-gcc (Debian 12.2.0-14) 12.2.0"
FLAGS = (
    *("-O1", "-march=armv8-a", "-mgeneral-regs-only", "-mstrict-align", "-ffreestanding", "-fpie"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-Wall", "-Wextra", "-Werror"),
    *("-nostdlib", "-static-pie", "-s", "-Wl,--no-dynamic-linker", "-Wl,--build-id=none"),
    *("-Wl,-z,max-page-size=4096", "-Wl,--no-warn-rwx-segments"),
)


def compiler_version() -> str | None:
    """The first line of the cross compiler's `--version`, or None where there is no such compiler."""
    path = shutil.which(COMPILER)
    if path is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return text.splitlines()[0]


def build(output: Path) -> None:
    """Compile and link the demonstration guest to `output`; EnvironmentFault without a compiler."""
    path = shutil.which(COMPILER)
    if path is None:
        raise EnvironmentFault(f"{COMPILER} is not installed: the demonstration guest cannot be built")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "demo.elf"
        command = [path, *FLAGS, "-Wl,-T,demo.ld", "start.S", "demo.c", "-o", str(made)]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Kvm2Error(f"building the demonstration guest failed:\n{done.stderr}")
        output.write_bytes(made.read_bytes())


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO)

"""Builds demo.elf and demo_x86.elf from the sources beside them: `python -m kvm2.guests.build [arm64|x86_64]...`.

The same compiler gives the same bytes: no build id, no notes, no paths, one segment.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvm2.errors import EnvironmentFault, Kvm2Error
from kvm2.guests import DEMO, DEMO_X86

HERE = Path(__file__).parent
_COMMON = (
    *("-O1", "-mgeneral-regs-only", "-ffreestanding", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-Wall", "-Wextra", "-Werror", "-nostdlib", "-s", "-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"),
    "-Wl,--no-warn-rwx-segments",
)


@dataclass(frozen=True)
class Demo:
    """One demonstration guest: its committed `image`, and how it is made.

    `built_with` is the first line of `compiler --version` of the compiler that made the image.
    """

    image: Path
    compiler: str
    built_with: str
    sources: tuple[str, ...]
    script: str
    flags: tuple[str, ...]

    def compiler_version(self) -> str | None:
        """The first line of the compiler's `--version`, or None where there is no such compiler."""
        path = shutil.which(self.compiler)
        if path is None:
            return None
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        return text.splitlines()[0]

    def build(self, output: Path) -> None:
        """Compile and link the guest to `output`; EnvironmentFault without a compiler."""
        path = shutil.which(self.compiler)
        if path is None:
            raise EnvironmentFault(f"{self.compiler} is not installed: the demonstration guest cannot be built")
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "demo.elf"
            command = [path, *_COMMON, *self.flags, f"-Wl,-T,{self.script}", *self.sources, "-o", str(made)]
            done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Kvm2Error(f"building the demonstration guest failed:\n{done.stderr}")
            output.write_bytes(made.read_bytes())


DEMOS = {
    "arm64": Demo(
        image=DEMO,
        compiler="aarch64-linux-gnu-gcc",
        built_with="aarch64-linux-gnu-gcc (Debian 12.2.0-14) 12.2.0",
        sources=("start.S", "demo.c"),
        script="demo.ld",
        flags=("-march=armv8-a", "-mstrict-align", "-fpie", "-static-pie", "-Wl,--no-dynamic-linker"),
    ),
    "x86_64": Demo(
        image=DEMO_X86,
        compiler="x86_64-linux-gnu-gcc",
        built_with="x86_64-linux-gnu-gcc (Debian 12.2.0-14+deb12u1) 12.2.0",
        sources=("start_x86.S", "demo_x86.c"),
        script="demo_x86.ld",
        flags=("-m64", "-mno-red-zone", "-fcf-protection=none", "-fno-pic", "-fno-pie", "-static", "-no-pie"),
    ),
}


if __name__ == "__main__":
    for name in sys.argv[1:] or DEMOS:
        DEMOS[name].build(DEMOS[name].image)

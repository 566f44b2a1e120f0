"""What it weighs: memory of many VMs, processor time of starting up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.measure import Figure, Measured, Unavailable, child_seconds, quartile

VMS = 1000
ROUNDS = 9
MIB = 1 << 20


def resident_bytes() -> int:
    """This process's resident memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError as error:
        raise Unavailable(f"resident memory is read from /proc: {error}") from error
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_vms(count: int) -> float:
    """Bytes of resident memory for each of `count` VMs that are alive with a vCPU that has run."""
    from bench import guest
    from bench.a64 import MMIO_LOOP

    alive = [guest.vcpu(MMIO_LOOP)]
    alive[0].run_once()  # what is made once for all of them does not count
    before = resident_bytes()
    for _ in range(count):
        made = guest.vcpu(MMIO_LOOP)
        made.run_once()
        alive.append(made)
    return (resident_bytes() - before) / count


def vms() -> Measured:
    """In a process of its own, as memory that was freed does not count for nothing afterwards."""
    resident_bytes()
    command = [sys.executable, "-c", f"from bench import footprint; print(footprint.make_vms({VMS}))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr[-2000:])
    each = float(done.stdout)
    return Measured(each / MIB, each / MIB, each * VMS / MIB, "MiB")


def _start(command: list[str]) -> Measured:
    bare = [sys.executable, "-c", "pass"]
    pairs = [(child_seconds(command), child_seconds(bare)) for _ in range(ROUNDS)]
    ours, baseline = quartile([pair[0] for pair in pairs]), quartile([pair[1] for pair in pairs])
    return Measured(ours / baseline, ours * 1e3, baseline * 1e3, "ms")


def import_kvm2() -> Measured:
    """`import kvm2`."""
    return _start([sys.executable, "-c", "import kvm2"])


def help_text() -> Measured:
    """`kvm2 --help`."""
    script = Path(sys.executable).with_name("kvm2")
    if not script.exists():
        raise Unavailable(f"{script} is not there: install the project first (`make run` does)")
    return _start([str(script), "--help"])


FIGURES = (
    Figure("vms", f"resident memory of each of {VMS} VMs with a vCPU that has run", 4.0, vms, unit=" MiB"),
    Figure("import", "CPU time of `import kvm2` / `python -c pass`", 4.0, import_kvm2),
    Figure("help", "CPU time of `kvm2 --help` / `python -c pass`", 8.0, help_text),
)

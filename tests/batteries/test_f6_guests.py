"""F6: hostile guests: random words, self-modifying code, MMIO of every form, floods of calls, hostile page tables.

Every guest ends with a defined exit or with its time budget, and writes nothing outside of its slots. Guests run in
processes of their own (`f6_worker.py`): the emulator's C code may crash, and then the guest that did it is named here.

The normal test command runs a short version; all of it: python tests/batteries/test_f6_guests.py [GUESTS [SEED]]
"""

from __future__ import annotations

import collections
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).with_name("f6_worker.py")
BATCH = 40
# Longer than its budget a guest may take: the machine is shared, and a kick waits for the end of a basic block.
SECONDS = 5.0


class Report:
    """What became of the guests: endings by kind, and what must not happen, as text."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.endings: collections.Counter[tuple[str, str]] = collections.Counter()
        self.crashes: list[str] = []
        self.wrong: list[str] = []

    def batch(self, first: int, count: int) -> None:
        """Guests `first` to `first + count`, a process more for each crash."""
        end = first + count
        while first < end:
            first = self._process(first, end - first)

    def _process(self, first: int, count: int) -> int:
        command = [sys.executable, "-X", "faulthandler", str(WORKER), str(self.seed), str(first), str(count)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = process.communicate(timeout=30 + count * SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            self.wrong.append("the process hung")
        begun: dict[str, object] = {"guest": first}
        for line in output.splitlines():
            if not line.startswith('{"guest"'):
                self.wrong.append(f"seed {self.seed} {begun}: printed {line!r}")
                continue
            said = json.loads(line)
            if "kind" in said:
                begun = said
                continue
            self.endings[str(begun["kind"]), said["ended"]] += 1
            if said["ended"].startswith("WRONG") or not said["intact"] or said["seconds"] > SECONDS:
                self.wrong.append(f"seed {self.seed} {begun} {said}")
        if process.returncode == 0:
            return first + count
        how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"status {process.returncode}"
        text = f"seed {self.seed} {begun}: {how}\n{errors[-1500:]}"
        (self.crashes if process.returncode < 0 else self.wrong).append(text)
        return int(str(begun["guest"])) + 1


def run(guests: int, seed: int) -> Report:
    report = Report(seed)
    for first in range(0, guests, BATCH):
        report.batch(first, min(BATCH, guests - first))
    return report


def test_short():
    report = run(80, seed=6)
    assert not report.wrong, "\n".join(report.wrong)
    assert not report.crashes, "\n".join(report.crashes)
    assert sum(report.endings.values()) == 80
    assert len({ending for _, ending in report.endings}) >= 2


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    started = time.monotonic()
    done = run(count, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    for (kind, ending), times in sorted(done.endings.items()):
        print(f"{kind:16} {ending:40} {times}")
    print(*done.crashes, *done.wrong, sep="\n")
    print(
        f"{count} guests, {time.monotonic() - started:.0f} s: {len(done.crashes)} crashes of the emulator, "
        f"{len(done.wrong)} broken promises"
    )
    sys.exit(bool(done.wrong))

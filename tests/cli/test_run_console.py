"""The console of `kvm2 run`: vCPU threads put bytes while the main thread ticks."""

import sys
import threading
import time
from types import SimpleNamespace

from kvm2.cli.console import Console


class SlowOutput:
    """A terminal that takes its time over each line, and holds on to it meanwhile, as a pipe that is full does."""

    def __init__(self):
        self.got = bytearray()

    def write(self, data):
        with memoryview(data) as held:
            time.sleep(0.0005)
            self.got += held

    def flush(self):
        pass


def test_putting_and_ticking_at_once_loses_nothing(monkeypatch):
    output = SlowOutput()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=output, isatty=lambda: False))
    console = Console(live=True)
    text = b"".join(b"line %d\n" % number for number in range(150))
    errors = []

    def guest():
        try:
            for byte in text:
                console.put(byte)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guest)
    thread.start()
    while thread.is_alive():
        console.tick(0.0, 0)
    console.close()
    assert not errors
    assert bytes(output.got) == text

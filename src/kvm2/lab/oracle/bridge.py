"""A worker of `lab.pool` whose scenarios are played inside a machine: `python -m kvm2.lab.oracle.bridge SHAPE`.

Standard input and output are those of `kvm2.lab.worker` (which has the protocol), run inside on the machine's
`/dev/kvm`. The machine is built first where it has to be; progress and what went wrong are on standard error. The
machine's end is the end of the output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from kvm2.errors import Kvm2Error
from kvm2.lab.oracle.machine import Job, open_machine
from kvm2.lab.oracle.shapes import shape

WORKER = Job("kvm2.lab.worker:main", ("kvm2.lab.worker",))


def read_setup(fd: int) -> bytes:
    """The first line, for the kernel inside instead of the machine's name, and what was read with it; b"" for none."""
    data = b""
    while b"\n" not in data:
        found = os.read(fd, 1 << 16)
        if not found:
            return b""
        data += found
    first, _, rest = data.partition(b"\n")
    return json.dumps({**json.loads(first), "host": "/dev/kvm"}).encode() + b"\n" + rest


def say(text: str) -> None:
    """A line of progress."""
    print(f"kvm2: oracle {text}", file=sys.stderr, flush=True)


def write_all(fd: int, data: bytes) -> None:
    """Writes all of it."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def writer(fd: int) -> Callable[[bytes], None]:
    """What writes to a descriptor."""
    return lambda data: write_all(fd, data)


def main(name: str) -> int:
    """Serves until standard input ends, or the machine does."""
    replies = os.dup(1)
    os.dup2(2, 1)
    try:
        setup = read_setup(0)
        if not setup:
            return 0
        with open_machine(shape(name), say) as machine:
            finished = machine.run(WORKER, 0, writer(replies), writer(2), first=setup, reader=replies)
            return finished.code
    except Kvm2Error as error:
        write_all(replies, json.dumps({"error": str(error), "kind": type(error).__name__}).encode() + b"\n")
        return 1


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            sys.exit("usage: python -m kvm2.lab.oracle.bridge SHAPE")
        code = main(sys.argv[1])
    except (KeyboardInterrupt, BrokenPipeError):
        code = 130  # nobody listens any more
    os._exit(code)

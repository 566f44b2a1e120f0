"""A process that plays scenarios for `pool`: a guest that crashes the emulator's C code takes only this process along.

Speaks JSON lines. First in is `{"host": NAME, "guests": {name: hex}}`, each further one a scenario: `{"sc": name,
"steps": [...], "patience_ms": N}`. One out for each: `{"r": [...], "cut_short": N, "faults": [...], "seconds": S}`, or
`{"error": text, "kind": class}`. Run by `pool` as `python -m kvm2.lab.worker`; `places` says what else speaks it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, TextIO

from kvm2.errors import Kvm2Error
from kvm2.lab.engine import play
from kvm2.lab.scenarios import Scenario

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.hosts.backend import Backend


def machine(host: str) -> Callable[[], Backend]:
    """What makes a new machine of a host, for each scenario one: none sees what another left behind.

    A described host is read once. `/dev/kvm` answers as the kernel does, and KVM_CREATE_VM2 is lowered to what it has.
    """
    from kvm2.hosts import backend_of, is_real

    if is_real(host):
        return lambda: backend_of(host)
    from kvm2.softkvm import profile
    from kvm2.softkvm.door import SoftKvm

    described = profile.load(host)
    return lambda: SoftKvm(described)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answers requests until there are no more."""
    first = requests.readline()
    if not first.endswith("\n"):
        return  # whoever asks was interrupted in the middle of it
    setup = json.loads(first)
    guests = {name: bytes.fromhex(code) for name, code in setup["guests"].items()}
    new_machine = machine(setup["host"])
    for line in requests:
        if not line.endswith("\n"):
            return
        request = json.loads(line)
        scenario = Scenario(request["sc"], tuple(request["steps"]))
        try:
            played = play(new_machine(), scenario, guests, request["patience_ms"])
        except Kvm2Error as error:
            reply: dict[str, object] = {"error": str(error), "kind": type(error).__name__}
        else:
            reply = {
                "r": played.answers,
                "cut_short": played.cut_short,
                "faults": played.faults,
                "seconds": played.seconds,
            }
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Requests on standard input, replies on standard output; whatever else prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(sys.stdin, replies)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(0)  # nobody listens any more: no complaint about what could not be written


if __name__ == "__main__":
    main()

"""What `kvm2 oracle exec` can start inside, where no shell and no other program is."""

from __future__ import annotations

import runpy
import sys

from kvm2.errors import UsageError

KVM2 = "kvm2.cli.main:main"
PYTHON = "kvm2.lab.oracle.inside:python"
PROGRAMS = {"kvm2": KVM2, "python": PYTHON, "python3": PYTHON}


def entry_of(program: str) -> str:
    """The function that is a program; UsageError where there is no such program inside.

    >>> entry_of("kvm2")
    'kvm2.cli.main:main'
    """
    if program not in PROGRAMS:
        raise UsageError(f"{program}: inside the machine there are only kvm2 and python (-c CODE, -m MODULE, FILE)")
    return PROGRAMS[program]


def python() -> None:
    """The interpreter's command line, of which -c, -m and a file are known, in an interpreter that is already warm."""
    words = sys.argv[1:]
    if words[:1] == ["-c"] and len(words) > 1:
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[:1] == ["-m"] and len(words) > 1:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words and not words[0].startswith("-"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        print("usage: python -c CODE | -m MODULE | FILE, and arguments", file=sys.stderr)
        sys.exit(2)

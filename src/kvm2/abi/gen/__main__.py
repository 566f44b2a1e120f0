"""`python -m kvm2.abi.gen [--check] [ROOT]`: regenerate the derived files of the project, or compare them."""

from __future__ import annotations

import sys
from pathlib import Path

from kvm2.abi.gen.outputs import stale, write


def main(args: list[str]) -> int:
    """0: up to date (with --check) or written; 1: stale; 2: usage."""
    check = "--check" in args
    rest = [arg for arg in args if arg != "--check"]
    if len(rest) > 1 or any(arg.startswith("-") for arg in rest):
        print("usage: python -m kvm2.abi.gen [--check] [ROOT]", file=sys.stderr)
        return 2
    root = Path(rest[0]) if rest else Path(__file__).parents[4]
    if not (root / "pyproject.toml").is_file():
        print(f"{root} is not the project: it has no pyproject.toml; give its path", file=sys.stderr)
        return 2
    for path in stale(root) if check else write(root):
        print(f"{path}: {'differs from the registry; run python -m kvm2.abi.gen' if check else 'written'}")
    return 1 if check and stale(root) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

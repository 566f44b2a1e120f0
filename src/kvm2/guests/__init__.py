"""Guests that come with kvm2: their sources, the built images, and `build.py` that makes the one from the other."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).parent / "demo.elf"
DEMO_X86 = Path(__file__).parent / "demo_x86.elf"

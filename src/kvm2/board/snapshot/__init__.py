"""A whole machine in a file, and back: memory, vCPUs, interrupt controller, timers, devices.

Everything goes through the KVM API, so a snapshot can be made on any host and restored on any that has what it needs.
"""

from kvm2.board.snapshot.file import Snapshot, read
from kvm2.board.snapshot.machine import restore, save

__all__ = ["Snapshot", "read", "restore", "save"]

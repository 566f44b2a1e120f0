"""kvm2: the KVM API as a library, with KVM_CREATE_VM2: on a software KVM of any arm64 host, and on the real /dev/kvm.

    with kvm2.open("apple-m1") as kvm:
        vm = kvm.create_vm2(physaddr_bits=36)

docs/python.md is the guide. Names are loaded when they are first used: `import kvm2` costs almost nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for True; importing `typing` would be the most of this import's cost

__version__ = "0.1.0"

_WHERE = {
    "open": "kvm2.kvm",
    "host_names": "kvm2.hosts",
    "Kvm": "kvm2.kvm",
    "Vm": "kvm2.vm",
    "Vcpu": "kvm2.vcpu",
    "Device": "kvm2.device",
    "Ram": "kvm2.ram",
    "VmSpec": "kvm2.spec",
    "MemoryRange": "kvm2.spec",
    "Finding": "kvm2.abi.findings",
    **dict.fromkeys(
        ("Kvm2Error", "KvmError", "GuestError", "UsageError", "HostError", "EnvironmentFault"), "kvm2.errors"
    ),
    **dict.fromkeys(
        ("Exit", "Mmio", "SystemEvent", "Interrupted", "Hypercall", "Debug", "Nisv", "MemoryFault"), "kvm2.exits"
    ),
    **dict.fromkeys(("FailEntry", "InternalError", "Io"), "kvm2.exits"),
    **dict.fromkeys(("Hlt", "Shutdown", "IrqWindowOpen", "SetTpr", "MsrAccess", "DebugException"), "kvm2.x86_exits"),
}

if TYPE_CHECKING:
    from typing import Any

    from kvm2.abi.findings import Finding as Finding
    from kvm2.device import Device as Device
    from kvm2.errors import EnvironmentFault as EnvironmentFault
    from kvm2.errors import GuestError as GuestError
    from kvm2.errors import HostError as HostError
    from kvm2.errors import Kvm2Error as Kvm2Error
    from kvm2.errors import KvmError as KvmError
    from kvm2.errors import UsageError as UsageError
    from kvm2.exits import Debug as Debug
    from kvm2.exits import Exit as Exit
    from kvm2.exits import FailEntry as FailEntry
    from kvm2.exits import Hypercall as Hypercall
    from kvm2.exits import InternalError as InternalError
    from kvm2.exits import Interrupted as Interrupted
    from kvm2.exits import Io as Io
    from kvm2.exits import MemoryFault as MemoryFault
    from kvm2.exits import Mmio as Mmio
    from kvm2.exits import Nisv as Nisv
    from kvm2.exits import SystemEvent as SystemEvent
    from kvm2.hosts import host_names as host_names
    from kvm2.kvm import Kvm as Kvm
    from kvm2.kvm import open as open
    from kvm2.ram import Ram as Ram
    from kvm2.spec import MemoryRange as MemoryRange
    from kvm2.spec import VmSpec as VmSpec
    from kvm2.vcpu import Vcpu as Vcpu
    from kvm2.vm import Vm as Vm
    from kvm2.x86_exits import DebugException as DebugException
    from kvm2.x86_exits import Hlt as Hlt
    from kvm2.x86_exits import IrqWindowOpen as IrqWindowOpen
    from kvm2.x86_exits import MsrAccess as MsrAccess
    from kvm2.x86_exits import SetTpr as SetTpr
    from kvm2.x86_exits import Shutdown as Shutdown


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'kvm2' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(where), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})

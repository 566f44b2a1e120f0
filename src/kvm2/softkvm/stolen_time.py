"""Stolen time: how long a vCPU was kept from running, in a structure of guest memory (pvtime.c of KVM, DEN0057).

What steals time here is the other vCPUs of the VM, of which one runs at a time.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from kvm2.errors import KvmError
from kvm2.softkvm import guest_memory
from kvm2.softkvm.smccc import INVALID_GPA

if TYPE_CHECKING:
    from kvm2.softkvm.vcpu import Vcpu

BYTES: Final = 64  # struct pvclock_vcpu_stolen_time: revision, attributes, stolen_time, padding
_STOLEN = struct.Struct("<Q")
_STOLEN_AT: Final = 8


def _write(vcpu: Vcpu, offset: int, data: bytes) -> None:
    # The slot may have gone since the address was set: the kernel does not mind either.
    with suppress(KvmError):
        guest_memory.write(vcpu.vm, vcpu.steal_base + offset, data)


def start(vcpu: Vcpu) -> int:
    """kvm_init_stolen_time, for PV_TIME_ST: zeroes the structure; its guest physical address, all ones without one."""
    if vcpu.steal_base != INVALID_GPA:
        vcpu.stolen_ns = 0
        _write(vcpu, 0, bytes(BYTES))
    return vcpu.steal_base


def account(vcpu: Vcpu, nanoseconds: int) -> None:
    """kvm_update_stolen_time: so much more was stolen."""
    vcpu.stolen_ns += nanoseconds
    _write(vcpu, _STOLEN_AT, _STOLEN.pack(vcpu.stolen_ns))

"""The negotiation phase, and reading back what a VM got.

A VM made with NEGOTIATE is configuring: KVM_VM2_SET_ATTRS checks each value alone and replaces what was set before,
KVM_VM2_COMMIT checks the whole. Both are all or nothing; the caller holds the VM's lock.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvm2.abi import ioctls as io
from kvm2.abi import vm2
from kvm2.abi.attrs import HEADER, HEADER_SIZE, NO_SIZE, Decoded, Found, Plan
from kvm2.abi.findings import Finding
from kvm2.abi.wire import decode
from kvm2.errors import KvmError
from kvm2.softkvm.creation import DRY_RUN, NEGOTIATE, Finish, as_found, deliver, settle
from kvm2.softkvm.limits import limits_of
from kvm2.softkvm.vmconfig import CAPABILITIES, Configuring, VmConfig, config_of, unplaced

if TYPE_CHECKING:
    from kvm2.softkvm.limits import Limits
    from kvm2.softkvm.memory import Memory
    from kvm2.softkvm.profile import Profile

# What a VM in the negotiation phase answers; every other call is ENOEXEC.
WHILE_CONFIGURING = frozenset({io.KVM_CHECK_EXTENSION, io.KVM_VM2_GET_ATTR, io.KVM_VM2_SET_ATTRS, io.KVM_VM2_COMMIT})

_ATTR = struct.Struct("=IIQ")
_SIZE = struct.Struct("=I")
_WORD = struct.Struct("=II")
_SIZE_OFFSET = 4
_ANY_CALL = vm2.KVM_CREATE_VM2_LIST | vm2.KVM_CREATE_VM2_STRUCT_FIXED
_ZEROS = 1 << 20  # how much is cleared at once in a buffer that is larger than the attribute


def set_attrs(
    profile: Profile, configuring: Configuring | None, memory: Memory, arg: int, finish: Finish = as_found
) -> int:
    """KVM_VM2_SET_ATTRS: returns 0. EBUSY where the VM is not configuring (None, or committed)."""
    limits, state = _busy(profile, configuring)
    decoded = _decode(limits, memory, arg)
    settled = settle(limits, decoded, state.wishes, commit=False)
    deliver(memory, decoded.report, finish(settled, None, DRY_RUN in decoded.entries))
    if DRY_RUN not in decoded.entries:
        state.wishes = unplaced(settled.wishes)
    return 0


def commit(
    profile: Profile, configuring: Configuring | None, memory: Memory, arg: int, finish: Finish = as_found
) -> VmConfig | int:
    """KVM_VM2_COMMIT: what the VM is to be, 0 for a dry run. On failure it stays configuring, unchanged."""
    limits, state = _busy(profile, configuring)
    decoded = _decode(limits, memory, arg)
    settled = settle(limits, decoded, state.wishes, commit=True)
    config = None if settled.refused else config_of(limits, settled.wishes)
    deliver(memory, decoded.report, finish(settled, config, DRY_RUN in decoded.entries))
    if DRY_RUN in decoded.entries:
        return 0
    state.wishes = settled.wishes
    state.committed = state.config
    return state.committed


def _busy(profile: Profile, configuring: Configuring | None) -> tuple[Limits, Configuring]:
    limits = limits_of(profile)
    limits.demand(vm2.KVM_CREATE_VM2_NEGOTIATION, on_vm=True)
    if configuring is None or configuring.committed is not None:
        raise KvmError(errno.EBUSY, "this VM is not configuring: its attributes are fixed")
    return limits, configuring


def _decode(limits: Limits, memory: Memory, arg: int) -> Decoded:
    """The list, in which NEGOTIATE has no place."""
    decoded = decode(memory, arg, limits.plans)
    again = decoded.entries.pop(NEGOTIATE, None)
    if again is not None:
        why = "NEGOTIATE: this VM is in the negotiation phase already"
        finding = Finding(again.position, NEGOTIATE, errno.EINVAL, 0, NEGOTIATE, 0, 0, 0, why)
        decoded.found.append(Found(again.position, 0, finding))
    return decoded


def get_attr(profile: Profile, config: VmConfig, memory: Memory, arg: int) -> int:
    """KVM_VM2_GET_ATTR on any VM: writes the value in force, in the form it has in the list. Returns 0.

    The client's size and this host's may differ: the smaller is written, the rest of a larger buffer is cleared, and
    what would be cut off must be zero (E2BIG). The host's size is written in either case.
    """
    limits = limits_of(profile)
    limits.demand(_ANY_CALL, on_vm=True)
    kind, room, where = _ATTR.unpack(memory.read(arg, _ATTR.size))
    plan = limits.plans.get(kind)
    row = vm2.ATTRIBUTES.get(kind)
    if row is not None and not row.has_value:
        raise KvmError(errno.EOPNOTSUPP, f"{row.macro} is a request, it has no value to read")
    if plan is None:
        raise KvmError(errno.ENOENT, f"type {kind}: this host knows no such attribute")
    have = plan.row.cls.SIZE
    data = attribute_bytes(plan, config, room)
    if data is not None:
        memory.write(where, data)
        for at in range(len(data), room, _ZEROS):
            memory.write(where + at, bytes(min(_ZEROS, room - at)))
    memory.write(arg + _SIZE_OFFSET, _SIZE.pack(have))
    if data is None:
        raise KvmError(errno.E2BIG, f"{room} bytes for {plan.row.macro}: it has {have} here")
    return 0


def attribute_bytes(plan: Plan, config: VmConfig, room: int) -> bytes | None:
    """An attribute with a VM's value, at most `room` bytes of it; its own size field counts what is there. None where
    that is less than was first published, or would cut off a byte that is not zero."""
    if room < plan.row.published:
        return None
    values = config.values(plan.row.type)
    if plan.known == NO_SIZE:
        return _WORD.pack(plan.row.type, *values)
    payload = plan.codec.pack(*values)
    size = min(plan.row.cls.SIZE, room - room % 8)
    kept = payload[: size - HEADER_SIZE]
    if any(payload[len(kept) :]):
        return None
    counted = len(kept) * 8 if plan.row.type == CAPABILITIES else size
    return HEADER.pack(plan.row.type, counted, 0) + kept

"""MSRs by number, in as many ioctls as their count needs. A refused one is an error, not a shorter answer."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.errors import KvmError
from kvm2.handle import checked_word

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvm2.abi.structs_x86 import MsrEntry
    from kvm2.x86_calls import X86Calls

# KVM takes fewer than MAX_IO_MSRS (256) in one call (arch/x86/kvm/x86.c, msr_io).
AT_ONCE = 255


def get_msrs(handle: X86Calls, indices: Iterable[int]) -> tuple[MsrEntry, ...]:
    """KVM_GET_MSRS: the entries, in the order of `indices`."""
    from kvm2.abi.structs_x86 import MsrEntry, Msrs

    wanted = [MsrEntry(checked_word("MSR index", index, 32)) for index in indices]
    found: list[MsrEntry] = []
    for part in _parts(wanted):
        done, data = handle._x86_send_list("KVM_GET_MSRS", part)
        _check_all("KVM_GET_MSRS", part, done)
        found += [MsrEntry.unpack(data, Msrs.SIZE + MsrEntry.SIZE * number) for number in range(len(part))]
    return tuple(found)


def set_msrs(handle: X86Calls, entries: Sequence[MsrEntry]) -> None:
    """KVM_SET_MSRS; those before a refused one are written."""
    for part in _parts(list(entries)):
        _check_all("KVM_SET_MSRS", part, handle._x86_send_list("KVM_SET_MSRS", part)[0])


def _parts(entries: list[MsrEntry]) -> list[list[MsrEntry]]:
    return [entries[at : at + AT_ONCE] for at in range(0, len(entries), AT_ONCE)]


def _check_all(call: str, entries: list[MsrEntry], done: int) -> None:
    if done < len(entries):
        index = entries[done].index
        raise KvmError(
            errno.EINVAL,
            f"{call} stopped at MSR {index:#x}, number {done + 1} of {len(entries)}: the kernel does not have it, or "
            "not this value; kvm.msr_index_list() has those of a vCPU, kvm.msr_feature_index_list() those of /dev/kvm",
        )

"""What a probe saw of a KVM, before any rule is applied to it; and the scratch VMs that it looks with.

Nothing is left behind: whoever makes a scratch VM or vCPU closes it.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvm2.kvm import Kvm
    from kvm2.vm import Vm


@dataclass
class Seen:
    """One KVM's answers. Capabilities: number -> answer, a negative one is an errno; registers: encoding -> value.

    `habits`: quirk of a host file -> whether the kernel has it, None where it could not be found out. `notes`: what
    the description cannot say, or what nobody could find out, one sentence each.
    """

    arch: str
    page_shift: int
    system: str = ""
    caps: dict[int, int] = field(default_factory=dict)
    vm_caps: dict[int, int] = field(default_factory=dict)
    create_vm2: int = 0
    type_word: str = "log2"
    protected: bool = False
    gic: tuple[str, ...] = ()
    features: int = 0
    preferred_target: int = 0
    registers: dict[int, int] = field(default_factory=dict)
    reg_list: tuple[int, ...] = ()
    sve_vqs: tuple[int, ...] = ()
    firmware: dict[int, int] = field(default_factory=dict)
    ccsidr: dict[int, int] = field(default_factory=dict)
    writable_masks: dict[int, int] = field(default_factory=dict)
    enable_caps: frozenset[int] = frozenset()
    habits: dict[str, bool | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def cap(self, number: int) -> int:
        """The answer on /dev/kvm; 0 for a capability that is not there."""
        return self.caps.get(number, 0)


def errno_of(call: Callable[[], object]) -> int:
    """The errno that a call is refused with; 0 where it works. What it returns is closed, if it can be."""
    try:
        made = call()
    except KvmError as error:
        return error.errno or errno.EIO
    close = getattr(made, "close", None)
    if close is not None:
        close()
    return 0


class Scratch:
    """Makes VMs on a KVM: finds once which `type` word it takes, 0 where the default does."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.type_word: int | None = None

    def find_type(self, sizes: tuple[int, ...] = ()) -> None:
        """Looks for a type word that works: 0, the `sizes`, then every other byte. KvmError(EINVAL): none does."""
        for word in (0, *sizes, *range(1, 256)):
            number = errno_of(lambda word=word: self.kvm.create_vm(word))  # type: ignore[misc]
            if not number:
                self.type_word = word
                return
            if number != errno.EINVAL:
                raise KvmError(number, f"KVM_CREATE_VM({word:#x}) fails on this host, so it cannot be asked")
        raise KvmError(errno.EINVAL, "no type word from 0 to 255 makes a VM on this host, so it cannot be asked")

    @contextmanager
    def vm(self) -> Iterator[Vm]:
        """A scratch VM, closed at the end."""
        with self.kvm.create_vm(self.type_word or 0) as vm:
            yield vm

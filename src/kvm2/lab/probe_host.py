"""What creation answers: page size, `type` words, limits, interrupt controllers, capabilities."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi import caps as cap
from kvm2.abi.caps import CAPABILITIES
from kvm2.errors import KvmError
from kvm2.lab.probe_seen import errno_of
from kvm2.names import DEVICES
from kvm2.softkvm.profile_keys import TYPE_WORDS, kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvm2.kvm import Kvm
    from kvm2.lab.probe_seen import Scratch, Seen
    from kvm2.vm import Vm

MIN_IPA_BITS = 32
ANY_SIZE = 0xFF  # no encoding of `type` can say it: a kernel that takes it does not look at the size
POINTER = 4096
PAGE_SHIFTS = (12, 14, 16)
# Newer kernels have capabilities above the last that has a name here; host files call them by number.
LAST_ASKED = max(number for number in CAPABILITIES.values() if number < cap.KVM_CAP_CREATE_VM2) + 24
# A dirty ring is enabled with its size: asking with 0 says nothing.
_NEEDS_ARGUMENT = frozenset((cap.KVM_CAP_DIRTY_LOG_RING, cap.KVM_CAP_DIRTY_LOG_RING_ACQ_REL))


def answers(check: Callable[[int], int]) -> dict[int, int]:
    """KVM_CHECK_EXTENSION for every capability, on /dev/kvm or a VM: those that are not 0; an errno is negative."""
    found: dict[int, int] = {}
    for number in range(LAST_ASKED + 1):
        try:
            value = check(number)
        except KvmError as error:
            value = -(error.errno or errno.EIO)
        if value:
            found[number] = value
    return found


def page_shift(scratch: Scratch) -> int:
    """log2 of the host's page size: the smallest size of a memory slot that is not misaligned."""
    with scratch.vm() as vm:
        for shift in PAGE_SHIFTS:
            # At guest physical address 0 and a host address that every page size divides; nothing is touched there.
            if not errno_of(lambda shift=shift: vm.set_memory_region(0, 0, 1 << shift, 1 << 32)):  # type: ignore[misc]
                return shift
    raise KvmError(errno.EINVAL, "no memory slot of 4K, 16K or 64K at guest physical address 0 is taken")


def wide_addresses(scratch: Scratch, shift: int) -> bool:
    """Whether a slot's memory may lie above 48 bits of this process's addresses."""
    with scratch.vm() as vm:
        return not errno_of(lambda: vm.set_memory_region(0, 0, 1 << shift, 1 << 48))


def is_protected(kvm: Kvm) -> bool:
    """Whether the kernel takes a size that no host can have (pKVM, as recorded): its limit is everybody's."""
    return not errno_of(lambda: kvm.create_vm(ANY_SIZE))


def type_word(kvm: Kvm, limit: int, protected: bool) -> str:
    """The encoding of the `type` word, by which words are taken; the first of several that cannot be told apart,
    mainline's before all others.

    The words that are asked are those on which the encodings that are left disagree.
    """
    from kvm2.softkvm.typeword import WORDS

    names = ["log2", *(name for name in TYPE_WORDS["arm64"] if name != "log2")]

    def taken(name: str, word: int) -> bool:
        said = WORDS[name].meaning(word)
        return not said.error and MIN_IPA_BITS <= said.bits <= limit

    left = names if not protected else ["log2", "pointer"]
    for word in range(256):
        if len({taken(name, word) for name in left}) > 1:
            answer = not errno_of(lambda word=word: kvm.create_vm(word))  # type: ignore[misc]
            left = [name for name in left if taken(name, word) == answer]
        if len(left) <= 1:
            break
    if "pointer" in left and errno_of(lambda: kvm.create_vm(POINTER)) == errno.EFAULT:
        return "pointer"
    return next((name for name in left if name != "pointer"), "")


def gic(vm: Vm) -> tuple[str, ...]:
    """The interrupt controllers that a guest can have (KVM_CREATE_DEVICE with the test flag)."""
    kinds = {"vgic-v2": "v2", "vgic-v3": "v3", "vgic-its": "its"}
    return tuple(kinds[name] for name in DEVICES if name in kinds and not errno_of(_asks(vm, name)))


def _asks(vm: Vm, name: str) -> Callable[[], object]:
    return lambda: vm.create_device(name, test=True)


def enable_caps(scratch: Scratch, offered: Iterable[int]) -> frozenset[int]:
    """The capabilities that KVM_ENABLE_CAP takes on a VM with a first argument of 0, each asked on the same VM."""
    from kvm2.softkvm.profile_build import kernel

    asked = {number for number in offered if number <= LAST_ASKED} | {cap.KVM_CAP_ARM_MTE}
    for version in kernels():
        asked |= kernel(version).enable_caps
    found = set()
    with scratch.vm() as vm:
        for number in sorted(asked - _NEEDS_ARGUMENT):
            if not errno_of(lambda number=number: vm.enable_cap(number)):  # type: ignore[misc]
                found.add(number)
    return frozenset(found)


def look(seen: Seen, scratch: Scratch) -> None:
    """Fills in what creation, capabilities and devices of an arm64 host say."""
    kvm = scratch.kvm
    limit = seen.cap(cap.KVM_CAP_ARM_VM_IPA_SIZE)
    seen.protected = is_protected(kvm)
    seen.type_word = type_word(kvm, limit, seen.protected)
    if not seen.type_word:
        seen.notes.append("the type words that KVM_CREATE_VM takes fit no known encoding: described as log2")
        seen.type_word = "log2"
    with scratch.vm() as vm:
        seen.vm_caps = answers(vm.check_extension)
        seen.gic = gic(vm)
    seen.enable_caps = enable_caps(scratch, (number for number, value in seen.caps.items() if value > 0))

"""What a real KVM takes at VM creation, found out by asking it: what `hosts.lowering` checks with.

Capabilities say most of it. On arm64 they do not say which SVE lengths there are, what PARange a guest sees, and
whether it may be lowered; a vCPU made for the purpose, and thrown away, does.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvm2.abi import caps, ioctls, onereg, sysregs
from kvm2.abi.structs import OneReg
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_SVE, VcpuInit
from kvm2.abi.vm2 import ARM64_DEFAULT_IPA_BITS
from kvm2.errors import KvmError
from kvm2.softkvm.profile import Profile
from kvm2.softkvm.profile_rules import PA_BITS
from kvm2.softkvm.typeword import PROTECTED, PROTECTED_MACHINE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.hosts.backend import RawKvm

MMFR0 = onereg.sysreg(sysregs.ID_AA64MMFR0_EL1)
PARANGE = 0xF
# A size that no kernel takes: who accepts it looks at no size at all (protected KVM).
NO_SIZE = 1
VLS_WORDS = 8
# Machine types 0 and 1, as a mask.
PROTECTED_TOO = 1 | 1 << PROTECTED_MACHINE
TYPE_WORDS = {"x86_64": "x86-64", "s390x": "s390x", "powerpc": "powerpc"}


@dataclass(frozen=True)
class KernelProfile(Profile):
    """A real host as far as creation goes. `size_limit` is its IPA limit in bits, from the capability."""

    size_limit: int = 0
    follows: bool = False
    too_old_for_sizes: bool = False

    def ipa_limit_for(self, granule: int) -> int:
        """The kernel's own limit: its VMs have its page size as granule, and no other."""
        return self.size_limit if granule == self.page_shift else 0

    @property
    def one_size(self) -> str:
        """Why every VM gets the limit."""
        return "this kernel is older than 4.20: one size" if self.too_old_for_sizes else super().one_size

    @property
    def parange_can_follow(self) -> bool:
        """Whether the kernel lets userspace lower PARange."""
        return self.follows


@dataclass(frozen=True)
class Scratch:
    """What a vCPU that was thrown away said: SVE lengths in quadwords, ID_AA64MMFR0_EL1, whether PARange can follow."""

    sve_vqs: tuple[int, ...]
    mmfr0: int
    follows: bool


def read_kernel(raw: RawKvm) -> KernelProfile:
    """Asks a kernel. KvmError where it refuses what every KVM can do."""
    fd = raw.open()
    try:
        return _read(raw, fd)
    finally:
        raw.close(fd)


def _read(raw: RawKvm, fd: int) -> KernelProfile:
    def cap(number: int) -> int:
        return raw.ioctl(fd, ioctls.KVM_CHECK_EXTENSION, number)

    vcpus = cap(caps.KVM_CAP_MAX_VCPUS) or cap(caps.KVM_CAP_NR_VCPUS)
    common = {
        "name": raw.name,
        "arch": raw.arch,
        "page_shift": raw.page_shift,
        "max_vcpus": vcpus,
        "max_vcpu_id": cap(caps.KVM_CAP_MAX_VCPU_ID) or vcpus,
        "nr_memslots": cap(caps.KVM_CAP_NR_MEMSLOTS),
        "cpus": cap(caps.KVM_CAP_NR_VCPUS),
        "gic": (),
        "create_vm2": 15 if raw.arch in (*TYPE_WORDS, "arm64") else 0,
    }
    if raw.arch != "arm64":
        mask = cap(caps.KVM_CAP_VM_TYPES) if raw.arch == "x86_64" else 0
        word = TYPE_WORDS.get(raw.arch, "none")
        return KernelProfile(**common, mode="", granules=(), vm_types=mask, type_word=word)  # type: ignore[arg-type]
    limit = cap(caps.KVM_CAP_ARM_VM_IPA_SIZE)
    protected = limit > 0 and _takes(raw, fd, NO_SIZE)
    scratch = _scratch(raw, fd, limit, bool(cap(caps.KVM_CAP_ARM_SVE)))
    parange = scratch.mmfr0 & PARANGE
    return KernelProfile(
        **common,  # type: ignore[arg-type]
        mode="protected" if protected else "",
        vm_types=PROTECTED_TOO if protected and _takes(raw, fd, PROTECTED | limit) else 0,
        granules=(raw.page_shift,),
        parange=parange,
        pa_bits=PA_BITS[parange] if parange < len(PA_BITS) else limit,
        sve_vqs=scratch.sve_vqs,
        type_word="log2" if limit else "none",
        size_limit=limit or ARM64_DEFAULT_IPA_BITS,
        follows=scratch.follows,
        too_old_for_sizes=not limit,
    )


def _takes(raw: RawKvm, fd: int, type_word: int) -> bool:
    try:
        vm = raw.ioctl(fd, ioctls.KVM_CREATE_VM, type_word)
    except KvmError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    raw.close(vm)
    return True


def _scratch(raw: RawKvm, fd: int, limit: int, sve: bool) -> Scratch:
    """A VM of the limit, and one vCPU with SVE where the kernel has it."""
    vm = raw.ioctl(fd, ioctls.KVM_CREATE_VM, limit)
    try:
        vcpu = raw.ioctl(vm, ioctls.KVM_CREATE_VCPU, 0)
        try:
            init_vcpu(raw, vm, vcpu, 1 << KVM_ARM_VCPU_PSCI_0_2 | sve << KVM_ARM_VCPU_SVE)
            mmfr0 = int.from_bytes(get_reg(raw, vcpu, MMFR0, 8), "little")
            vls = get_reg(raw, vcpu, onereg.KVM_REG_ARM64_SVE_VLS, 8 * VLS_WORDS) if sve else bytes(8 * VLS_WORDS)
            return Scratch(lengths_of(vls), mmfr0, _can_follow(raw, vcpu, mmfr0))
        finally:
            raw.close(vcpu)
    finally:
        raw.close(vm)


def lengths_of(vls: bytes) -> tuple[int, ...]:
    """The vector lengths in quadwords that the 64 bytes of KVM_REG_ARM64_SVE_VLS name.

    >>> lengths_of(bytes([0b1011]) + bytes(63))
    (1, 2, 4)
    """
    words = int.from_bytes(vls, "little")
    return tuple(bit + 1 for bit in range(words.bit_length()) if words >> bit & 1)


def _can_follow(raw: RawKvm, vcpu: int, mmfr0: int) -> bool:
    lower = (mmfr0 & PARANGE) - 1
    if lower < 0:
        return True  # nothing is below 32 bits, so nothing ever has to be lowered
    try:
        set_reg(raw, vcpu, MMFR0, (mmfr0 & ~PARANGE | lower).to_bytes(8, "little"))
    except KvmError:
        return False
    return True


# ---- single calls with their structures, for this module and for `hosts.lowering`


@contextmanager
def at_address(data: bytes) -> Iterator[tuple[int, ctypes.Array[ctypes.c_char]]]:
    """Bytes at an address, and the buffer they are in, for the time of one call."""
    buffer = ctypes.create_string_buffer(data, len(data))
    yield ctypes.addressof(buffer), buffer


def init_vcpu(raw: RawKvm, vm: int, vcpu: int, features: int) -> None:
    """KVM_ARM_VCPU_INIT with the VM's preferred target."""
    with at_address(VcpuInit(0).pack()) as (address, buffer):
        raw.ioctl(vm, ioctls.KVM_ARM_PREFERRED_TARGET, address)
        target = VcpuInit.unpack(buffer.raw).target
    with at_address(VcpuInit(target, features=(features, *[0] * 6)).pack()) as (address, _):
        raw.ioctl(vcpu, ioctls.KVM_ARM_VCPU_INIT, address)


def get_reg(raw: RawKvm, vcpu: int, register: int, size: int) -> bytes:
    """KVM_GET_ONE_REG."""
    with at_address(bytes(size)) as (value, buffer), at_address(OneReg(register, value).pack()) as (address, _):
        raw.ioctl(vcpu, ioctls.KVM_GET_ONE_REG, address)
        return buffer.raw


def set_reg(raw: RawKvm, vcpu: int, register: int, data: bytes) -> None:
    """KVM_SET_ONE_REG."""
    with at_address(data) as (value, _), at_address(OneReg(register, value).pack()) as (address, _):
        raw.ioctl(vcpu, ioctls.KVM_SET_ONE_REG, address)


def finalize_sve(raw: RawKvm, vcpu: int) -> None:
    """KVM_ARM_VCPU_FINALIZE of SVE."""
    with at_address(struct.pack("=i", KVM_ARM_VCPU_SVE)) as (address, _):
        raw.ioctl(vcpu, ioctls.KVM_ARM_VCPU_FINALIZE, address)

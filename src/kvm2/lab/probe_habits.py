"""The errno habits that tell kernels apart: the quirks of docs/hosts.md that need no guest."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi import caps as cap
from kvm2.abi import onereg, sysregs
from kvm2.errors import KvmError
from kvm2.lab.probe_host import wide_addresses
from kvm2.lab.probe_seen import errno_of
from kvm2.softkvm import profile_rules as rules
from kvm2.softkvm.sysregs_fields import fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.lab.probe_seen import Scratch, Seen
    from kvm2.vcpu import Vcpu

# Registers in which a 6.12 kernel lets userspace lower a field, as far as this host has one that is not 0.
_LOWERED = (
    sysregs.ID_AA64MMFR0_EL1,
    sysregs.ID_AA64ISAR0_EL1,
    sysregs.ID_AA64MMFR1_EL1,
    sysregs.ID_AA64MMFR2_EL1,
    sysregs.ID_AA64ISAR1_EL1,
)
_TRIES = 24


def look(seen: Seen, scratch: Scratch, features: tuple[int, ...]) -> None:
    """Fills in every habit that ioctls alone show."""
    habits = seen.habits
    habits["no-lpa2"] = _no_lpa2(seen, scratch)
    habits["own-target-only"] = _own_target_only(seen, scratch)
    habits["per-vcpu-features"] = _per_vcpu_features(scratch)
    habits["fixed-id-registers"] = _fixed_id_registers(seen, scratch, features)
    habits["vcpu-id-32bit"] = _vcpu_id_32bit(scratch)


def _no_lpa2(seen: Seen, scratch: Scratch) -> bool | None:
    """By the IPA limit where the hardware has LPA2 for the kernel's pages; otherwise by what came with it: 52-bit
    addresses of processes. With 64K pages neither tells."""
    if seen.page_shift == 16:
        return None
    limit = seen.cap(cap.KVM_CAP_ARM_VM_IPA_SIZE)
    if rules.lpa2(seen.registers, seen.page_shift) and limit > 48:
        return False
    return not wide_addresses(scratch, seen.page_shift)


def _own_target_only(seen: Seen, scratch: Scratch) -> bool | None:
    """Only a core that has a target of its own shows it."""
    both, generic = rules.targets(seen.registers.get(sysregs.MIDR_EL1, 0), own_only=False)
    if len(both) == 1:
        return None
    own = next(target for target in both if target != generic)
    other = own if seen.preferred_target == generic else generic
    with scratch.vm() as vm, vm.create_vcpu() as vcpu:
        return bool(errno_of(lambda: vcpu.init(target=other)))


def _per_vcpu_features(scratch: Scratch) -> bool | None:
    """Two vCPUs of one VM, the second without PSCI 0.2."""
    with scratch.vm() as vm:
        try:
            with vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
                first.init()
                return not errno_of(lambda: second.init(()))
        except KvmError:
            return None


def _fixed_id_registers(seen: Seen, scratch: Scratch, features: tuple[int, ...]) -> bool | None:
    """Whether no ID register can be lowered: fields of several are tried until one is taken."""
    with scratch.vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.init(features)
        tried = 0
        for number, value in _lower_values(seen):
            if tried == _TRIES:
                break
            tried += 1
            if _takes(vcpu, number, value):
                return False
    return True if tried else None


def _lower_values(seen: Seen) -> Iterator[tuple[int, int]]:
    """(register, a value with one field one lower), only fields for which lower is less, and where the kernel says so
    only those that can be written; the usual registers first."""
    masks = seen.writable_masks
    for number in dict.fromkeys((*_LOWERED, *masks)):
        # Without AArch32 its registers take any value, and ignore it; CSV2 and CSV3 could be lowered before 6.7 too.
        if rules.is_aarch32_id(number) or number == sysregs.ID_AA64PFR0_EL1:
            continue
        value = seen.registers.get(number, 0)
        for field in fields(number) or ():
            writable = not masks or not field.mask & ~masks.get(number, 0)
            if writable and field.rule == "lower" and field.value(value) > 0:
                yield number, value - (1 << field.lsb)


def _takes(vcpu: Vcpu, number: int, value: int) -> bool:
    return not errno_of(lambda: vcpu.set_reg(onereg.sysreg(number), value))


def _vcpu_id_32bit(scratch: Scratch) -> bool:
    """KVM_CREATE_VCPU with an id of 1 << 32: refused, or vCPU 0."""
    from kvm2.abi import ioctls

    with scratch.vm() as vm:
        backend = vm.backend
        try:
            fd = backend.ioctl(vm.fd, ioctls.KVM_CREATE_VCPU, 1 << 32)
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        backend.close(fd)
        return True

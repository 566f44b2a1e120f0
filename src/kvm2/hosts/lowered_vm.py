"""The rules that a VM made by KVM_CREATE_VM2 has on a kernel that does not know them: kept here, call by call.

After section 7 of the interface: vCPU ids below `max_vcpus`, SVE only as creation allowed it, PARange that follows the
IPA size. What the kernel enforces by itself (sizes, slots, finalised vCPUs) is left to it.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from kvm2.abi import caps, ioctls, onereg
from kvm2.abi.structs import OneReg
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_SVE, VcpuInit
from kvm2.errors import KvmError
from kvm2.hosts.kernel_profile import MMFR0, PARANGE, finalize_sve, get_reg, set_reg
from kvm2.softkvm.sysregs_id import parange_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.hosts.backend import RawKvm
    from kvm2.softkvm.memory import Memory
    from kvm2.softkvm.vmconfig import VmConfig

# Held while a vCPU is counted and made: for so short a time that one lock serves all VMs.
_CREATING = threading.Lock()

SVE_BIT = 1 << KVM_ARM_VCPU_SVE


class LoweredVm:
    """A VM of the kernel. `rules` is what KVM_CREATE_VM2 decided; None for a VM without such rules."""

    def __init__(self, raw: RawKvm, memory: Memory, rules: VmConfig | None) -> None:
        self.raw, self.memory, self.rules = raw, memory, rules
        self.vcpus = 0
        self.lock = _CREATING

    @property
    def config(self) -> VmConfig | None:
        """What creation gave; None where that cannot be told."""
        return self.rules

    def check_extension(self, value: int, cap: int) -> int:
        """KVM_CHECK_EXTENSION on the VM: the kernel's `value`, as far as creation allows it."""
        rules = self.rules
        if rules is None:
            return value
        if cap == caps.KVM_CAP_MAX_VCPUS:
            return min(value, rules.max_vcpus)
        if cap == caps.KVM_CAP_MAX_VCPU_ID:
            return min(value, rules.max_vcpu_id)
        return 0 if cap == caps.KVM_CAP_ARM_SVE and not rules.sve_allowed else value

    def create_vcpu(self, fd: int, number: int) -> tuple[int, LoweredVcpu]:
        """KVM_CREATE_VCPU: EINVAL at or above the VM's maximum."""
        rules = self.rules
        with self.lock:
            if rules is not None and (number >= rules.max_vcpu_id or self.vcpus >= rules.max_vcpus):
                why = f"vCPU id {number}: this VM takes 0..{rules.max_vcpu_id - 1} (attribute MAX_VCPUS)"
                raise KvmError(errno.EINVAL, why)
            vcpu = self.raw.ioctl(fd, ioctls.KVM_CREATE_VCPU, number)
            self.vcpus += 1
        return vcpu, LoweredVcpu(self)


class OldVm(LoweredVm):
    """A VM that KVM_CREATE_VM made: the kernel's rules only. What it got is worked out when somebody asks."""

    def __init__(self, raw: RawKvm, memory: Memory, config: Callable[[], VmConfig | None]) -> None:
        super().__init__(raw, memory, None)
        self._config = config

    @property
    def config(self) -> VmConfig | None:
        """What the `type` word gave."""
        return self._config()


class LoweredVcpu:
    """A vCPU of the kernel, with what creation demands of its SVE lengths and its PARange."""

    def __init__(self, vm: LoweredVm) -> None:
        self.vm = vm
        self.has_sve = self.vls_written = self.finalized = False

    def init(self, fd: int, arg: int) -> int:
        """KVM_ARM_VCPU_INIT, then what the VM's creation says comes with it."""
        rules, raw = self.vm.rules, self.vm.raw
        if rules is None:
            return raw.ioctl(fd, ioctls.KVM_ARM_VCPU_INIT, arg)
        wanted = VcpuInit.unpack(self.vm.memory.read(arg, VcpuInit.SIZE))
        sve = bool(wanted.features[0] & SVE_BIT)
        if sve and not rules.sve_allowed:
            raise KvmError(
                errno.EINVAL,
                "this VM was created without SVE: create it with ARM64_SVE_VLS or VCPU_NEEDS_SET_SVE_VLS (sve=...)",
            )
        result = raw.ioctl(fd, ioctls.KVM_ARM_VCPU_INIT, arg)
        self.has_sve = sve
        if sve and not self.finalized:
            self.vls_written = False  # the kernel has its own set again
            if rules.sve_vls is not None:
                data = b"".join(word.to_bytes(8, "little") for word in rules.sve_vls)
                set_reg(raw, fd, onereg.KVM_REG_ARM64_SVE_VLS, data)
                finalize_sve(raw, fd)
                self.finalized = True
        if rules.parange_follows_ipa:
            self._follow(fd, rules.ipa_bits)
        return result

    def _follow(self, fd: int, ipa_bits: int) -> None:
        now = int.from_bytes(get_reg(self.vm.raw, fd, MMFR0, 8), "little")
        wanted = parange_for(ipa_bits, now & PARANGE)
        if wanted != now & PARANGE:
            set_reg(self.vm.raw, fd, MMFR0, (now & ~PARANGE | wanted).to_bytes(8, "little"))

    def finalize(self, fd: int, arg: int) -> int:
        """KVM_ARM_VCPU_FINALIZE: EPERM where VLS has to be written first and was not."""
        config = self.vm.config
        if (
            config is not None
            and config.needs_set_sve_vls
            and self.has_sve
            and not (self.vls_written or self.finalized)
        ):
            feature = int.from_bytes(self.vm.memory.read(arg, 4), "little", signed=True)
            if feature == KVM_ARM_VCPU_SVE:
                raise KvmError(
                    errno.EPERM,
                    "this VM was created with VCPU_NEEDS_SET_SVE_VLS: write KVM_REG_ARM64_SVE_VLS first",
                )
        result = self.vm.raw.ioctl(fd, ioctls.KVM_ARM_VCPU_FINALIZE, arg)
        self.finalized = True
        return result

    def set_one_reg(self, fd: int, arg: int) -> int:
        """KVM_SET_ONE_REG: remembers that VLS was written."""
        result = self.vm.raw.ioctl(fd, ioctls.KVM_SET_ONE_REG, arg)
        rules = self.vm.rules
        if rules is not None and rules.needs_set_sve_vls and not self.vls_written:
            register = OneReg.unpack(self.vm.memory.read(arg, OneReg.SIZE)).id
            self.vls_written = register == onereg.KVM_REG_ARM64_SVE_VLS
        return result

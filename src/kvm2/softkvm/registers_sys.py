"""System registers of KVM_GET_ONE_REG and KVM_SET_ONE_REG (`kvm_arm_sys_reg_get_reg` and `_set_reg`)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import onereg
from kvm2.abi.sysregs import ID_AA64MMFR3_EL1, ID_AA64PFR2_EL1, name_of
from kvm2.errors import KvmError
from kvm2.softkvm import features as feat
from kvm2.softkvm import sysregs_cache, sysregs_id, sysregs_pmu
from kvm2.softkvm.sysregs_table import SysReg, invariants, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu

# What an id of a system register may have set; the class is checked apart, as the kernel does.
_INDEX_BITS: Final = onereg.KVM_REG_ARCH_MASK | onereg.KVM_REG_SIZE_MASK | onereg.KVM_REG_ARM_COPROC_MASK | 0xFFFF
OSLSR_OSLK = 2
S1POE_LSB, FPMR_LSB = 16, 32


def hidden(vcpu: Vcpu, reg: SysReg) -> bool:
    """sysreg_hidden: the vCPU lacks the feature that the register belongs to."""
    feature, arm = reg.visible, vcpu.vm.arm
    if feature == "pmu":
        return not vcpu.features & feat.PMU
    if feature == "sve":
        return not vcpu.has_sve()
    if feature == "ptrauth":
        return not vcpu.features & feat.PTRAUTH
    if feature == "mte":
        return not arm.mte
    if feature == "s1poe":
        return not arm.id_regs.get(ID_AA64MMFR3_EL1, 0) >> S1POE_LSB & 0xF
    if feature == "fpmr":
        return not arm.id_regs.get(ID_AA64PFR2_EL1, 0) >> FPMR_LSB & 0xF
    return feature == "sme"


def _enc(id_: int) -> int | None:
    """The encoding in an id, whatever its class; None where the id cannot be one of a system register."""
    if id_ >> 52 & 0xF != 3 or id_ & ~_INDEX_BITS:
        return None
    return id_ & 0xFFFF


def _find(vcpu: Vcpu, id_: int) -> SysReg:
    enc = _enc(id_)
    reg = None
    if enc is not None and id_ & onereg.KVM_REG_ARM_COPROC_MASK == onereg.KVM_REG_ARM64_SYSREG:
        reg = table(vcpu.vm.profile.kernel).get(enc)
    if reg is None or reg.user == "-":
        raise KvmError(errno.ENOENT, f"register {id_:#x}: this kernel has none with that id (KVM_GET_REG_LIST)")
    if hidden(vcpu, reg):
        raise KvmError(errno.ENOENT, f"{reg.name}: this vCPU was initialised without {reg.visible.upper()}")
    return reg


def _invariant(vcpu: Vcpu, id_: int) -> int | None:
    enc = _enc(id_)
    return enc if enc in invariants(vcpu.vm.profile.kernel) else None


def get(vcpu: Vcpu, id_: int) -> bytes:
    """The register's bytes; ENOENT for an id that this vCPU does not have."""
    if id_ & onereg.KVM_REG_ARM_COPROC_MASK == onereg.KVM_REG_ARM_DEMUX:
        return sysregs_cache.get(vcpu, id_)
    enc = _invariant(vcpu, id_)
    value = vcpu.vm.arm.host_register(enc) if enc is not None else read(vcpu, _find(vcpu, id_))
    return value.to_bytes(8, "little")


def read(vcpu: Vcpu, reg: SysReg) -> int:
    """What userspace reads."""
    if reg.user == "id":
        return sysregs_id.read(vcpu, reg)
    if reg.user == "pmcr":
        return sysregs_pmu.pmcr(vcpu)
    if reg.user == "count":
        return sysregs_pmu.counter(vcpu, sysregs_pmu.index(reg.enc))
    if reg.user == "razwi":
        return 0
    value = vcpu.state.sys.get(reg.store, 0)
    return value & sysregs_pmu.counter_mask(vcpu) if reg.user in ("pmset", "pmclr") else value


def put(vcpu: Vcpu, id_: int, fetch: Callable[[int], bytes]) -> None:
    """Writes the register. ENOENT: none; EINVAL: not this value; EBUSY: an ID register after the VM ran."""
    if id_ & onereg.KVM_REG_ARM_COPROC_MASK == onereg.KVM_REG_ARM_DEMUX:
        sysregs_cache.put(vcpu, id_, fetch)
        return
    enc, value = _invariant(vcpu, id_), int.from_bytes(fetch(8), "little")
    if enc is None:
        _write(vcpu, _find(vcpu, id_), value)
    elif value != vcpu.vm.arm.host_register(enc):
        raise KvmError(
            errno.EINVAL, f"{name_of(enc)} is the machine's, {vcpu.vm.arm.host_register(enc):#x}: nobody can change it"
        )


def _write(vcpu: Vcpu, reg: SysReg, value: int) -> None:
    rule = reg.user
    if rule == "id":
        sysregs_id.write(vcpu, reg, value)
    elif rule == "pmcr":
        sysregs_pmu.set_pmcr(vcpu, value)
    elif rule in ("pmset", "pmclr"):
        sysregs_pmu.change_set(vcpu, reg, value)
    elif rule != "razwi":
        if rule == "oslsr" and (value ^ int(reg.reset, 16)) & ~OSLSR_OSLK:
            raise KvmError(errno.EINVAL, f"OSLSR_EL1 = {value:#x}: only OSLK (bit 1) can be changed")
        if rule == "clidr":
            sysregs_cache.check_clidr(vcpu, value)
        vcpu.state.sys[reg.store] = value


def ids(vcpu: Vcpu) -> list[int]:
    """The ids in the order of KVM_GET_REG_LIST: invariants, system registers, caches."""
    kernel = vcpu.vm.profile.kernel
    visible = [reg.enc for reg in table(kernel).values() if reg.user != "-" and not hidden(vcpu, reg)]
    return [onereg.sysreg(enc) for enc in (*invariants(kernel), *visible)] + [
        onereg.ccsidr(index) for index in sysregs_cache.indices(vcpu)
    ]

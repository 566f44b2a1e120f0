"""SVE: the set of vector lengths, its finalisation, and the Z, P and FFR registers.

After `set_sve_vls` and `sve_reg_to_region` of arch/arm64/kvm/guest.c and reset.c. On a VM made by KVM_CREATE_VM2 the
creation decides more: attribute 7 finalises at KVM_ARM_VCPU_INIT, attribute 1 bit 0 makes writing VLS a duty.

>>> host = (1, 2, 4)
>>> [hex(bitmap(host, top)) for top in host]
['0x1', '0x3', '0xb']
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import onereg
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_SVE
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvm2.softkvm.vcpu import Vcpu

VLS_BYTES: Final = 64
Z_BYTES, P_BYTES = 256, 32
ID_SHIFT, ID_MASK, SLICE_MASK = 5, 0x1F, 0x1F
_FIRST_Z, _LAST_Z = onereg.sve_z(0), onereg.sve_z(31, 31)
_FIRST_P, _LAST_FFR = onereg.sve_p(0), onereg.sve_ffr(31)
NUM_P = 16


def bitmap(vqs: Iterable[int], top: int) -> int:
    """The vector lengths (quadwords) up to `top` as KVM_REG_ARM64_SVE_VLS has them: bit vq-1."""
    return sum(1 << vq - 1 for vq in vqs if vq <= top)


def sets(vqs: tuple[int, ...]) -> str:
    """The sets that can be had on a host, for messages."""
    return ", ".join(f"{bitmap(vqs, top):#x}" for top in vqs)


def reset(vcpu: Vcpu) -> None:
    """The SVE part of a vCPU's reset. Before finalisation the set is the host's again, and a write is forgotten.

    A VM whose creation named the set (attribute 7) gets exactly that one, finalised.
    """
    if not vcpu.has_sve_feature() or vcpu.sve_finalized:
        return
    vcpu.sve_max_vq = vcpu.vm.profile.sve_vqs[-1]
    vcpu.vls_written = False
    named = vcpu.vm.config.sve_vls
    if named is not None:
        vcpu.sve_max_vq = sum(word << 64 * index for index, word in enumerate(named)).bit_length()
        vcpu.sve_finalized = True


def finalize(vcpu: Vcpu, feature: int) -> None:
    """KVM_ARM_VCPU_FINALIZE. EINVAL: not SVE, or a vCPU without it; EPERM: done already, or VLS not written yet."""
    if feature != KVM_ARM_VCPU_SVE or not vcpu.has_sve():
        raise KvmError(
            errno.EINVAL, f"feature {feature}: only SVE ({KVM_ARM_VCPU_SVE}) is finalised, on a vCPU that has it"
        )
    if vcpu.sve_finalized:
        raise KvmError(errno.EPERM, "the SVE vector lengths of this vCPU are final already")
    if vcpu.vm.config.needs_set_sve_vls and not vcpu.vls_written:
        raise KvmError(
            errno.EPERM,
            "this VM was created with VCPU_NEEDS_SET_SVE_VLS: write KVM_REG_ARM64_SVE_VLS first; "
            f"this host takes {sets(vcpu.vm.profile.sve_vqs)}",
        )
    vcpu.sve_finalized = True


def _need_sve(vcpu: Vcpu, what: str) -> None:
    if not vcpu.has_sve():
        raise KvmError(errno.ENOENT, f"{what}: this vCPU was initialised without SVE")


def _get_vls(vcpu: Vcpu) -> bytes:
    _need_sve(vcpu, "KVM_REG_ARM64_SVE_VLS")
    return bitmap(vcpu.vm.profile.sve_vqs, vcpu.sve_max_vq).to_bytes(VLS_BYTES, "little")


def _set_vls(vcpu: Vcpu, fetch: Callable[[int], bytes]) -> None:
    _need_sve(vcpu, "KVM_REG_ARM64_SVE_VLS")
    if vcpu.sve_finalized:
        raise KvmError(errno.EPERM, "the SVE vector lengths of this vCPU are final")
    wanted, host = int.from_bytes(fetch(VLS_BYTES), "little"), vcpu.vm.profile.sve_vqs
    top = wanted.bit_length()
    if not wanted or wanted != bitmap(host, top):
        raise KvmError(
            errno.EINVAL, f"vector lengths {wanted:#x}: it must be the host's own set up to a maximum: {sets(host)}"
        )
    vcpu.sve_max_vq, vcpu.vls_written = top, True


def _locate(vcpu: Vcpu, id_: int) -> tuple[str, int]:
    """("z" | "p", number; FFR is P16). EINVAL: no register; ENOENT: no SVE, or a slice above 0; EPERM: too early."""
    number = id_ >> ID_SHIFT & ID_MASK
    if _FIRST_Z <= id_ <= _LAST_Z:
        kind = "z"
    elif _FIRST_P <= id_ <= _LAST_FFR:
        kind = "p"
    else:
        raise KvmError(errno.EINVAL, f"register {id_:#x}: Z0-Z31 have 256 bytes, P0-P15 and FFR 32, VLS 64")
    _need_sve(vcpu, f"register {id_:#x}")
    if id_ & SLICE_MASK:
        raise KvmError(errno.ENOENT, f"slice {id_ & SLICE_MASK}: a register is one slice up to 2048 bits")
    if not vcpu.sve_finalized:
        raise KvmError(errno.EPERM, "SVE registers exist after KVM_ARM_VCPU_FINALIZE(KVM_ARM_VCPU_SVE)")
    return kind, number


def get(vcpu: Vcpu, id_: int) -> bytes:
    """KVM_GET_ONE_REG of a KVM_REG_ARM64_SVE id; what lies above the vector length reads as zero."""
    if id_ == onereg.KVM_REG_ARM64_SVE_VLS:
        return _get_vls(vcpu)
    kind, number = _locate(vcpu, id_)
    if kind == "z":
        return vcpu.state.v[number][: 16 * vcpu.sve_max_vq].ljust(Z_BYTES, b"\0")
    value = vcpu.state.ffr if number == NUM_P else vcpu.state.p[number]
    return value[: 2 * vcpu.sve_max_vq].ljust(P_BYTES, b"\0")


def put(vcpu: Vcpu, id_: int, fetch: Callable[[int], bytes]) -> None:
    """KVM_SET_ONE_REG of a KVM_REG_ARM64_SVE id; only the bytes of the vector length are read."""
    if id_ == onereg.KVM_REG_ARM64_SVE_VLS:
        _set_vls(vcpu, fetch)
        return
    kind, number = _locate(vcpu, id_)
    if kind == "z":
        vcpu.state.v[number] = fetch(16 * vcpu.sve_max_vq).ljust(Z_BYTES, b"\0")
        return
    value = fetch(2 * vcpu.sve_max_vq).ljust(P_BYTES, b"\0")
    if number == NUM_P:
        vcpu.state.ffr = value
    else:
        vcpu.state.p[number] = value


def ids(vcpu: Vcpu) -> list[int]:
    """The ids, VLS first, so that restoring in the order of KVM_GET_REG_LIST works; none without SVE."""
    if not vcpu.has_sve():
        return []
    registers = [*map(onereg.sve_z, range(32)), *map(onereg.sve_p, range(NUM_P)), onereg.sve_ffr()]
    return [onereg.KVM_REG_ARM64_SVE_VLS, *registers]

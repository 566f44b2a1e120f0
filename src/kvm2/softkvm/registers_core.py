"""KVM_REG_ARM_CORE registers: ids that are offsets into `struct kvm_regs`, in 32-bit words.

After `get_core_reg` and `set_core_reg` of arch/arm64/kvm/guest.c, in their order of checks.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi.onereg import KVM_REG_ARM64, KVM_REG_ARM_CORE
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_EL1_32BIT, Regs
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu

WORDS: Final = Regs.SIZE // 4
SP, PC, PSTATE, SP_EL1, ELR_EL1, SPSR = 62, 64, 66, 68, 70, 72
SPSR_END, VREGS, FPSR, FPCR = 82, 84, 212, 213

MODE_MASK, MODE_32BIT = 0x1F, 0x10
AA32_USR, AA32_SYS = 0x10, 0x1F
AA32_PRIVILEGED = (0x11, 0x12, 0x13, 0x17, 0x1B, AA32_SYS)
AA64 = (0x0, 0x4, 0x5)  # EL0t, EL1t, EL1h


def _size_of(vcpu: Vcpu, word: int) -> int:
    """Bytes of the register that starts at a word; 0 where none does, or where an SVE vCPU has it elsewhere."""
    if word < SPSR_END:
        return 0 if word & 1 else 8
    if VREGS <= word < FPSR:
        return 0 if word & 3 or vcpu.has_sve() else 16
    return 4 if word in (FPSR, FPCR) else 0


def _locate(vcpu: Vcpu, id_: int) -> tuple[int, int]:
    """(word, size in bytes). ENOENT outside the structure; EINVAL in a hole, misaligned, or with another size."""
    word, size = id_ & 0xF000_FFFF, 1 << (id_ >> 52 & 0xF)
    if word >= WORDS or word + size // 4 >= WORDS:
        raise KvmError(errno.ENOENT, f"core register at word {word}: struct kvm_regs has {WORDS} words")
    expected = _size_of(vcpu, word)
    if not expected:
        reason = (
            "on a vCPU with SVE, V registers are the low bits of Z (KVM_REG_ARM64_SVE)"
            if word >= VREGS
            else "no register"
        )
        raise KvmError(errno.EINVAL, f"core register at word {word}: {reason}")
    if size != expected:
        raise KvmError(errno.EINVAL, f"core register at word {word} has {expected} bytes, not {size}")
    return word, size


def get(vcpu: Vcpu, id_: int) -> bytes:
    """The register's bytes."""
    word, size = _locate(vcpu, id_)
    if size == 16:
        return vcpu.state.v[(word - VREGS) // 4][:16]
    return _read(vcpu, word).to_bytes(size, "little")


def _read(vcpu: Vcpu, word: int) -> int:
    state = vcpu.state
    if word < SP:
        return state.x[word // 2]
    if word >= SPSR:
        return state.fpsr if word == FPSR else state.fpcr if word == FPCR else state.spsr[(word - SPSR) // 2]
    values = {SP: state.sp_el0, PC: state.pc, PSTATE: state.pstate, SP_EL1: state.sp_el1, ELR_EL1: state.elr_el1}
    return values[word]


def put(vcpu: Vcpu, id_: int, fetch: Callable[[int], bytes]) -> None:
    """Writes the register. EINVAL for a PSTATE whose mode this vCPU cannot be in."""
    word, size = _locate(vcpu, id_)
    data = fetch(size)
    if size == 16:
        old = vcpu.state.v[(word - VREGS) // 4]
        vcpu.state.v[(word - VREGS) // 4] = data + old[16:]
    else:
        value = int.from_bytes(data, "little")
        if word == PSTATE:
            _check_mode(vcpu, value)
        _write(vcpu, word, value)
    _narrow(vcpu)


def _check_mode(vcpu: Vcpu, pstate: int) -> None:
    mode, wide = pstate & MODE_MASK, bool(vcpu.features >> KVM_ARM_VCPU_EL1_32BIT & 1)
    if mode == AA32_USR:
        allowed = vcpu.vm.arm.has_aarch32_el0()
    elif mode in AA32_PRIVILEGED:
        allowed = wide
    else:
        allowed = mode in AA64 and not wide
    if not allowed:
        raise KvmError(errno.EINVAL, f"PSTATE {pstate:#x}: mode {mode:#x} is none that this vCPU can be in")


def _write(vcpu: Vcpu, word: int, value: int) -> None:
    state = vcpu.state
    if word < SP:
        state.x[word // 2] = value
    elif word == SP:
        state.sp_el0 = value
    elif word == PC:
        state.pc = value
    elif word == PSTATE:
        state.pstate = value
    elif word == SP_EL1:
        state.sp_el1 = value
    elif word == ELR_EL1:
        state.elr_el1 = value
    elif word == FPSR:
        state.fpsr = value
    elif word == FPCR:
        state.fpcr = value
    else:
        state.spsr[(word - SPSR) // 2] = value


def _narrow(vcpu: Vcpu) -> None:
    """In an AArch32 mode the registers that it can see have 32 bits."""
    state = vcpu.state
    if not state.pstate & MODE_32BIT:
        return
    visible = 15 if state.pstate & MODE_MASK in (AA32_USR, AA32_SYS) else 31
    for number in range(visible):
        state.x[number] &= 0xFFFFFFFF
    state.pc &= 0xFFFFFFFF


def ids(vcpu: Vcpu) -> list[int]:
    """The ids, in the order of KVM_GET_REG_LIST."""
    found = []
    for word in range(WORDS):
        size = _size_of(vcpu, word)
        if size:
            found.append(KVM_REG_ARM64 | KVM_REG_ARM_CORE | (size.bit_length() - 1) << 52 | word)
    return found

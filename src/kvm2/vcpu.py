"""A vCPU: initialise it, read and write its registers, run it."""

from __future__ import annotations

import errno
import struct
import time
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

from kvm2.abi import exits as abi
from kvm2.abi import ioctls, onereg
from kvm2.abi.layout import Structure
from kvm2.abi.structs import EnableCap, MpState, OneReg
from kvm2.abi.structs_arm64 import VcpuEvents, VcpuInit
from kvm2.errors import KvmError, UsageError
from kvm2.exits import Exit, Interrupted, decode
from kvm2.handle import Buffer, checked_word
from kvm2.hosts.backend import Runner
from kvm2.names import capability, capability_words, feature_bits
from kvm2.registers import Registers, register_id
from kvm2.x86_vcpu import X86Vcpu

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvm2.vm import Vm

KVM_RUN = ioctls.KVM_RUN
IMMEDIATE_EXIT = abi.IMMEDIATE_EXIT_OFFSET
FAULTED = (errno.EFAULT, getattr(errno, "EHWPOISON", 133))


class Vcpu(X86Vcpu):
    """One vCPU of a VM; `id` is the number it was made with.

    `regs` is by the host's architecture: a `Registers` (arm64) or an `X86Registers` (x86-64). What only one of them has
    is refused on the other with a UsageError.
    """

    regs: Any  # either, so that both can be used without a cast

    def __init__(self, vm: Vm, fd: int, id: int) -> None:
        super().__init__(vm.backend, fd, vm._memories)
        self.vm = vm
        self.id = id
        self._area = vm.backend.kvm_run(fd)
        runner = getattr(vm.backend, "runner", None)
        # A kernel has a shorter way into KVM_RUN than `ioctl`; whoever has none is called the long way.
        self._runner = runner(fd) if runner else Runner(vm.backend.ioctl)
        self._arch = vm.arch
        if self._arch == "x86_64":
            from kvm2.x86_registers import X86Registers

            self.regs = X86Registers(self)
        else:
            self.regs = Registers(self)

    @property
    def kvm_run(self) -> memoryview:
        """The shared area, `struct kvm_run`."""
        self.fd  # noqa: B018 - EBADF once closed
        return self._area

    def init(self, features: Iterable[str | int] = ("psci_0_2",), *, target: int | None = None) -> None:
        """KVM_ARM_VCPU_INIT, with features by name ("psci_0_2", "sve", "pmu_v3", ...) or bit number.

        `target` None is the VM's preferred one. Every register gets its reset value; the first init of a VM decides
        the features of all its vCPUs.
        """
        self._only_on("arm64", "KVM_ARM_VCPU_INIT", "an x86-64 vCPU is ready once it is made: set_cpuid, regs, run")
        if target is None:
            target = self.vm.preferred_target().target
        self.ioctl(ioctls.KVM_ARM_VCPU_INIT, VcpuInit(target, features=feature_bits(features)))

    def finalize(self, feature: str | int = "sve") -> None:
        """KVM_ARM_VCPU_FINALIZE of a feature; for SVE it fixes the vector lengths."""
        self._only_on("arm64", "KVM_ARM_VCPU_FINALIZE")
        words = feature_bits((feature,))
        number = next(32 * i + word.bit_length() - 1 for i, word in enumerate(words) if word)
        value = Buffer(struct.pack("=i", number))
        self.ioctl(ioctls.KVM_ARM_VCPU_FINALIZE, value)

    def get_reg(self, register: int | str) -> int | bytes:
        """KVM_GET_ONE_REG, by id or name: a number up to 8 bytes, else `bytes` in the guest's order.

        Names are "x0", "sp", "pc", "v3", "z3", and system registers as the Arm ARM has them: "ID_AA64MMFR0_EL1".
        """
        self._only_on("arm64", "KVM_GET_ONE_REG", "x86-64 has vcpu.regs[name], get_regs, get_sregs, get_msrs")
        number = register_id(register)
        value = Buffer(onereg.size_of(number))
        self.ioctl(ioctls.KVM_GET_ONE_REG, OneReg(number, value.address))
        data = value.bytes()
        return int.from_bytes(data, "little") if len(data) <= 8 else data

    def set_reg(self, register: int | str, value: int | bytes) -> None:
        """KVM_SET_ONE_REG; UsageError where `value` does not have the register's size."""
        self._only_on("arm64", "KVM_SET_ONE_REG", "x86-64 has vcpu.regs[name], set_regs, set_sregs, set_msrs")
        number = register_id(register)
        size = onereg.size_of(number)
        if isinstance(value, int):
            value = checked_word(str(register), value, 8 * size).to_bytes(size, "little")
        if len(value) != size:
            raise UsageError(f"{register} has {size} bytes, the value has {len(value)}")
        data = Buffer(value)
        self.ioctl(ioctls.KVM_SET_ONE_REG, OneReg(number, data.address))

    def reg_list(self) -> tuple[int, ...]:
        """KVM_GET_REG_LIST: the ids of every register, in the host's order."""
        self._only_on("arm64", "KVM_GET_REG_LIST", "x86-64 has kvm.msr_index_list()")
        room = 0
        while True:
            data = Buffer(struct.pack("=Q", room) + bytes(8 * room))
            try:
                self.ioctl(ioctls.KVM_GET_REG_LIST, data)
            except KvmError as error:
                needed = struct.unpack_from("=Q", data.bytes())[0]
                if error.errno != errno.E2BIG or needed <= room:
                    raise
                room = needed
                continue
            count = struct.unpack_from("=Q", data.bytes())[0]
            return struct.unpack_from(f"={count}Q", data.bytes(), 8)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: KVM_MP_STATE_RUNNABLE 0; arm64 STOPPED 5, SUSPENDED 10; x86-64 1 to 4."""
        return self.exchange(ioctls.KVM_GET_MP_STATE, MpState(0)).mp_state

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE."""
        self.ioctl(ioctls.KVM_SET_MP_STATE, MpState(checked_word("mp_state", state, 32)))

    def get_events(self) -> Any:
        """KVM_GET_VCPU_EVENTS: pending exceptions, by the `VcpuEvents` of the architecture."""
        if self._arch == "x86_64":
            return self._x86_get_events()
        return self.exchange(ioctls.KVM_GET_VCPU_EVENTS, VcpuEvents())

    def set_events(self, events: Structure) -> None:
        """KVM_SET_VCPU_EVENTS: inject an exception; on arm64 an SError or an external data abort."""
        self._set_structure("KVM_SET_VCPU_EVENTS", events)

    def enable_cap(self, cap: str | int, *args: int) -> int:
        """KVM_ENABLE_CAP on the vCPU, with up to four words."""
        return self.ioctl(ioctls.KVM_ENABLE_CAP, EnableCap(cap=capability(cap), args=capability_words(args)))

    def set_guest_debug(self, debug: Structure) -> None:
        """KVM_SET_GUEST_DEBUG: single step, breakpoints, watchpoints, by the `GuestDebug` of the architecture."""
        self._set_structure("KVM_SET_GUEST_DEBUG", debug)

    def _set_structure(self, call: str, value: Structure) -> None:
        """A call that both architectures have, each with a structure of its own."""
        row = ioctls.named(call, self._arch)[0]
        expected = row.payload
        if not isinstance(value, Structure) or type(value) is not expected:
            where = f"{expected.__module__}.{expected.__name__}" if isinstance(expected, type) else expected
            raise UsageError(f"{call} on {self._arch} takes a {where}, not {value!r}")
        self.ioctl(row.number, value)

    def set_signal_mask(self, mask: int | None) -> None:
        """KVM_SET_SIGNAL_MASK with the kernel's 64-bit mask; None takes it away."""
        data = None if mask is None else Buffer(struct.pack("=IQ", 8, checked_word("mask", mask, 64)))
        self.ioctl(ioctls.KVM_SET_SIGNAL_MASK, data if data else 0)

    def kick(self) -> None:
        """Get the vCPU out of `run`, from any thread: an `Interrupted` exit. Before a run it ends that run at once."""
        fd = self.fd
        self._area[IMMEDIATE_EXIT] = 1
        self._backend.kick(fd)

    def run_once(self) -> Exit:
        """KVM_RUN until the next exit; KvmError where KVM refuses. Reply to a read before the next run."""
        runner = self._runner
        runner.thread = get_ident()
        try:
            runner.ioctl(self._fd, KVM_RUN)
        except OSError as error:
            return self._failed(error)
        finally:
            runner.thread = 0
        return decode(self._area, self._arch)

    def _failed(self, error: OSError) -> Exit:
        if self._fd < 0:
            raise self._closed_error() from None
        if error.errno == errno.EINTR:
            self._area[IMMEDIATE_EXIT] = 0
            return Interrupted()
        if error.errno in FAULTED and self._area[abi.EXIT_REASON_OFFSET] == abi.KVM_EXIT_MEMORY_FAULT:
            return decode(self._area, self._arch)  # the one exit that comes with an errno
        explained = self._runner.explained
        raise error if explained is None or isinstance(error, KvmError) else explained(error) from None

    def run(self) -> Iterator[Exit]:
        """Every exit, one after the other, until one that `ends` (power-off, reset, crash, failure) has been given.

        The vCPU runs between two steps of the iteration: reply to a read (`Mmio`, `Io`) within the loop's body.
        """
        area, arch = self._area, self._arch
        while True:
            # As in run_once: one call more for each exit would be felt.
            runner = self._runner
            runner.thread = get_ident()
            try:
                runner.ioctl(self._fd, KVM_RUN)
            except OSError as error:
                exit = self._failed(error)
            else:
                exit = decode(area, arch)
            finally:
                runner.thread = 0
            yield exit
            if exit.ends:
                return

    def close(self) -> None:
        """Close the vCPU's descriptor; a run in another thread is got back first."""
        if self._fd >= 0:
            running, self._runner = self._runner, Runner(self._refuse)  # also for whoever is between two runs
            end = time.monotonic() + 1
            while running.thread and time.monotonic() < end:
                self.kick()
                time.sleep(0.001)
        super().close()

    def _refuse(self, fd: int, request: int) -> int:
        raise self._closed_error()

    def __repr__(self) -> str:
        return f"<Vcpu {self.id}{' closed' if self.closed else ''}>"


def vector_lengths(vcpu: Vcpu) -> tuple[int, ...]:
    """The vector lengths in bits that KVM_REG_ARM64_SVE_VLS of an SVE vCPU names, ascending."""
    words = int.from_bytes(cast("bytes", vcpu.get_reg("sve_vls")), "little")
    return tuple(128 * (bit + 1) for bit in range(512) if words >> bit & 1)

"""A vCPU: initialise it, read and write its registers, run it."""

from __future__ import annotations

import errno
import struct
import threading
from typing import TYPE_CHECKING, cast

from kvm2.abi import exits as abi
from kvm2.abi import ioctls, onereg
from kvm2.abi.structs import EnableCap, MpState, OneReg
from kvm2.abi.structs_arm64 import VcpuEvents, VcpuInit
from kvm2.errors import KvmError, UsageError
from kvm2.exits import HOT, Exit, Interrupted, Mmio, decode
from kvm2.handle import Buffer, DeviceAttributes, checked_word
from kvm2.names import capability, capability_words, feature_bits
from kvm2.registers import Registers, register_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvm2.abi.structs_arm64 import GuestDebug
    from kvm2.vm import Vm

KVM_RUN = ioctls.KVM_RUN
MMIO = abi.KVM_EXIT_MMIO
IMMEDIATE_EXIT = abi.IMMEDIATE_EXIT_OFFSET
FAULTED = (errno.EFAULT, getattr(errno, "EHWPOISON", 133))


class Vcpu(DeviceAttributes):
    """One vCPU of a VM; `id` is the number it was made with."""

    def __init__(self, vm: Vm, fd: int, id: int) -> None:
        super().__init__(vm.backend, fd, vm._memories)
        self.vm = vm
        self.id = id
        self._area = vm.backend.kvm_run(fd)
        self._running = threading.Lock()
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
        if target is None:
            target = self.vm.preferred_target().target
        self.ioctl(ioctls.KVM_ARM_VCPU_INIT, VcpuInit(target, features=feature_bits(features)))

    def finalize(self, feature: str | int = "sve") -> None:
        """KVM_ARM_VCPU_FINALIZE of a feature; for SVE it fixes the vector lengths."""
        words = feature_bits((feature,))
        number = next(32 * i + word.bit_length() - 1 for i, word in enumerate(words) if word)
        value = Buffer(struct.pack("=i", number))
        self.ioctl(ioctls.KVM_ARM_VCPU_FINALIZE, value)

    def get_reg(self, register: int | str) -> int | bytes:
        """KVM_GET_ONE_REG, by id or name: a number up to 8 bytes, else `bytes` in the guest's order.

        Names are "x0", "sp", "pc", "v3", "z3", and system registers as the Arm ARM has them: "ID_AA64MMFR0_EL1".
        """
        number = register_id(register)
        value = Buffer(onereg.size_of(number))
        self.ioctl(ioctls.KVM_GET_ONE_REG, OneReg(number, value.address))
        data = value.bytes()
        return int.from_bytes(data, "little") if len(data) <= 8 else data

    def set_reg(self, register: int | str, value: int | bytes) -> None:
        """KVM_SET_ONE_REG; UsageError where `value` does not have the register's size."""
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
        """KVM_GET_MP_STATE: KVM_MP_STATE_RUNNABLE 0, STOPPED 5, SUSPENDED 10."""
        return self.exchange(ioctls.KVM_GET_MP_STATE, MpState(0)).mp_state

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE."""
        self.ioctl(ioctls.KVM_SET_MP_STATE, MpState(checked_word("mp_state", state, 32)))

    def get_events(self) -> VcpuEvents:
        """KVM_GET_VCPU_EVENTS: pending exceptions."""
        return self.exchange(ioctls.KVM_GET_VCPU_EVENTS, VcpuEvents())

    def set_events(self, events: VcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS: inject an SError or an external data abort."""
        self.ioctl(ioctls.KVM_SET_VCPU_EVENTS, events)

    def enable_cap(self, cap: str | int, *args: int) -> int:
        """KVM_ENABLE_CAP on the vCPU, with up to four words."""
        return self.ioctl(ioctls.KVM_ENABLE_CAP, EnableCap(cap=capability(cap), args=capability_words(args)))

    def set_guest_debug(self, debug: GuestDebug) -> None:
        """KVM_SET_GUEST_DEBUG: single step, breakpoints, watchpoints."""
        self.ioctl(ioctls.KVM_SET_GUEST_DEBUG, debug)

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
        """KVM_RUN until the next exit; KvmError where KVM refuses. Reply to an `Mmio` read before the next run."""
        area = self._area
        with self._running:
            try:
                self._backend.ioctl(self._fd, KVM_RUN, 0)
            except KvmError as error:
                return self._failed(error)
        reason, address, raw, size, is_write = HOT.unpack_from(area)
        if reason == MMIO:
            return Mmio(address, size, is_write != 0, raw, area)
        return decode(area)

    def _failed(self, error: KvmError) -> Exit:
        if self._fd < 0:
            raise self._closed_error() from None
        if error.errno == errno.EINTR:
            self._area[IMMEDIATE_EXIT] = 0
            return Interrupted()
        if error.errno in FAULTED and HOT.unpack_from(self._area)[0] == abi.KVM_EXIT_MEMORY_FAULT:
            return decode(self._area)  # the one exit that comes with an errno
        raise error

    def run(self) -> Iterator[Exit]:
        """Every exit, one after the other, until one that `ends` (power-off, reset, crash, failure) has been given.

        The vCPU runs between two steps of the iteration: reply to an `Mmio` read within the loop's body.
        """
        area, unpack, ioctl = self._area, HOT.unpack_from, self._backend.ioctl
        while True:
            with self._running:
                try:
                    ioctl(self._fd, KVM_RUN, 0)
                except KvmError as error:
                    exit = self._failed(error)
                else:
                    reason, address, raw, size, is_write = unpack(area)
                    if reason == MMIO:
                        exit = Mmio(address, size, is_write != 0, raw, area)
                    else:
                        exit = decode(area)
            yield exit
            if exit.ends:
                return

    def close(self) -> None:
        """Close the vCPU's descriptor; a run in another thread is got back first."""
        if self._fd >= 0 and self._running.locked():
            self.kick()
            if self._running.acquire(timeout=1):
                self._running.release()
        super().close()

    def __repr__(self) -> str:
        return f"<Vcpu {self.id}{' closed' if self.closed else ''}>"


def vector_lengths(vcpu: Vcpu) -> tuple[int, ...]:
    """The vector lengths in bits that KVM_REG_ARM64_SVE_VLS of an SVE vCPU names, ascending."""
    words = int.from_bytes(cast("bytes", vcpu.get_reg("sve_vls")), "little")
    return tuple(128 * (bit + 1) for bit in range(512) if words >> bit & 1)

"""A virtual CPU: its life from KVM_CREATE_VCPU over KVM_ARM_VCPU_INIT to KVM_RUN, without the running itself.

Every method that answers an ioctl takes the ioctl's argument and returns what the kernel returns; a refusal is a
KvmError. Structures are read from and written to the client's memory in the order of `kvm_arch_vcpu_ioctl`.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvm2.abi.structs import (
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_STOPPED,
    KVM_MP_STATE_SUSPENDED,
    MpState,
    OneReg,
    RegList,
)
from kvm2.abi.structs_arm64 import VcpuInit
from kvm2.errors import KvmError
from kvm2.softkvm import (
    features,
    registers,
    smccc,
    stolen_time,
    sve,
    sysregs_guest,
    sysregs_id,
    sysregs_pmu,
    sysregs_reset,
    vcpu_attrs,
    vcpu_debug,
    vcpu_events,
)
from kvm2.softkvm.cpu.state import CpuState
from kvm2.softkvm.timers import VcpuTimers, physical_count
from kvm2.softkvm.vgic.state import VgicCpu

if TYPE_CHECKING:
    from kvm2.abi.structs_arm64 import GuestDebug
    from kvm2.softkvm.vm import Vm


class Running(Protocol):
    """The execution of a vCPU, as far as this room needs it."""

    def pull(self) -> None:
        """Brings `vcpu.state` up to date with the core."""

    def wake(self) -> None:
        """The power state changed: look again."""

    def interrupt_lines_changed(self) -> None:
        """The interrupt controller's lines to this vCPU changed."""

    def interrupt_pending(self) -> None:
        """An interrupt is pending that may have changed no line."""


class PowerOn(NamedTuple):
    """A reset that PSCI CPU_ON asked for."""

    pc: int
    x0: int
    big_endian: bool


class Vcpu:
    """One vCPU. Public state for the run loop and for looking at: `state` (registers), `mp_state`, `features`.

    `dirty`: `state` was changed since the core last took it. `execution`: what runs it, once there is a descriptor.
    """

    def __init__(self, vm: Vm, vcpu_id: int) -> None:
        self.vm, self.vcpu_id = vm, vcpu_id
        self.lock = threading.RLock()  # held by whoever is in an ioctl of this vCPU: the kernel's `vcpu->mutex`
        self.state = CpuState()
        self.dirty = True
        self.execution: Running | None = None
        self.has_run = False
        self.initialized = False
        self.own_features = 0  # where each vCPU has its own (6.1)
        self.mp_state = KVM_MP_STATE_RUNNABLE
        self.power_on: PowerOn | None = None
        self.sve_max_vq = 0
        self.sve_finalized = False
        self.vls_written = False
        self.ccsidr: list[int] | None = None
        self.steal_base = smccc.INVALID_GPA
        self.stolen_ns = 0
        self.gic = VgicCpu(self)
        self.irq_input = self.fiq_input = False  # KVM_IRQ_LINE of a VM without an interrupt controller
        self.pmu_irq: int | None = None
        self.pmu_created = False
        self.serror_pending = False
        self.serror_esr = 0
        self.exception_pending = False  # a synchronous exception to EL1 is entered before the next instruction
        self.fault_esr = self.fault_address = 0  # of the last exit, for an injected external abort
        self.guest_debug: GuestDebug | None = None
        self.step_pending = False  # userspace's step is made, its exception waits (DBG_SS_ACTIVE_PENDING)
        self.signal_mask: bytes | None = None
        self.timers = VcpuTimers(self)
        if not vm.arm.counter_offset_set:
            vm.set_counter_offsets(voffset=physical_count(), poffset=0)

    # ---- the core holds the registers while it runs

    def pull(self) -> None:
        """Before `state` is read or written."""
        if self.execution is not None:
            self.execution.pull()

    def reload_gic(self) -> None:
        """The CPU interface was restored: it takes the values at the next KVM_RUN, as it implements them."""
        self.pull()
        self.dirty = True

    # ---- features

    @property
    def features(self) -> int:
        """Bit map of KVM_ARM_VCPU_*: the VM's (vcpu_has_feature), or this vCPU's own in 6.1."""
        return self.vm.arm.features if features.vm_wide_features(self.vm) else self.own_features

    def has_sve_feature(self) -> bool:
        """Whether KVM_ARM_VCPU_INIT asked for SVE."""
        return bool(self.features & features.SVE)

    def has_sve(self) -> bool:
        """Whether the vCPU has SVE (vcpu_has_sve): true from its first reset with the feature on."""
        return bool(self.features & features.SVE and self.sve_max_vq)

    def check_initialized(self) -> None:
        """ENOEXEC before KVM_ARM_VCPU_INIT."""
        if not self.initialized:
            raise KvmError(errno.ENOEXEC, "KVM_ARM_VCPU_INIT comes first")

    def check_finalized(self) -> None:
        """EPERM while the SVE vector lengths are open."""
        if self.has_sve() and not self.sve_finalized:
            raise KvmError(errno.EPERM, "a vCPU with SVE needs KVM_ARM_VCPU_FINALIZE(KVM_ARM_VCPU_SVE) first")

    def check_runnable(self) -> None:
        """What KVM_RUN asks first (kvm_arch_vcpu_run_pid_change)."""
        self.check_initialized()
        self.check_finalized()

    def on_first_run(self) -> None:
        """What the first KVM_RUN fixes: ID registers without a GIC that the VM does not have, PMU counters."""
        if self.has_run:
            return
        sysregs_id.finalise(self.vm)
        self.timers.enable()
        self.pull()
        sysregs_pmu.first_run(self)
        self.dirty = True

    # ---- reset and power

    def reset(self) -> None:
        """kvm_reset_vcpu: registers as after a reset, then what a CPU_ON that waits asks for."""
        request, self.power_on = self.power_on, None
        self.pull()
        sve.reset(self)
        sysregs_reset.reset_core(self)
        sysregs_reset.reset_sys(self)
        if request is not None:
            self.exception_pending = False
            sysregs_reset.apply_power_on(self, request.pc, request.x0, request.big_endian)
        self.dirty = True

    def request_reset(self, pc: int, x0: int, big_endian: bool) -> None:
        """PSCI CPU_ON from another vCPU: this one resets itself when it next runs or its registers are looked at."""
        self.power_on = PowerOn(pc, x0, big_endian)

    def apply_reset(self) -> None:
        """Does a reset that waits."""
        if self.power_on is not None:
            self.reset()

    def before_entry(self) -> bool:
        """The run loop calls this before the guest is entered. True: a reset or an exception that waited changed
        `state`, and `dirty` is set."""
        waited = self.power_on is not None or self.exception_pending
        self.apply_reset()
        if self.exception_pending:
            self.exception_pending = False
            self.pull()
            vcpu_events.enter_el1(self)
        return waited

    def set_power(self, mp_state: int) -> None:
        """Changes the power state; a vCPU in KVM_RUN looks again."""
        self.mp_state = mp_state
        if self.execution is not None:
            self.execution.wake()

    def stopped(self) -> bool:
        """Powered off: KVM_RUN blocks."""
        return self.mp_state == KVM_MP_STATE_STOPPED

    def suspended(self) -> bool:
        """KVM_MP_STATE_SUSPENDED: KVM_RUN waits for an interrupt, then exits with a wake-up event."""
        return self.mp_state == KVM_MP_STATE_SUSPENDED

    def interrupt_lines_changed(self) -> None:
        """The vGIC signals an interrupt, or no longer does."""
        if self.execution is not None:
            self.execution.interrupt_lines_changed()

    def interrupt_pending(self) -> None:
        """An interrupt waits here; whether it is signalled or not, WFI ends."""
        if self.execution is not None:
            self.execution.interrupt_pending()

    def runnable(self) -> bool:
        """kvm_arch_vcpu_runnable: an interrupt waits for a vCPU that is not powered off."""
        if self.stopped():
            return False
        if self.irq_input or self.fiq_input or self.gic.irq_line or self.gic.fiq_line:
            return True
        vgic = self.vm.vgic
        if vgic is None or not (self.gic.listed or self.gic.lpis.members):
            return False
        with vgic.lock:
            return self.gic.interface.has_pending()

    # ---- KVM_ARM_VCPU_INIT and what follows it

    def vcpu_init(self, arg: int) -> int:
        """KVM_ARM_VCPU_INIT: `features.set_target` has the checks. An SError that was pending and the lines of
        KVM_IRQ_LINE are gone."""
        init = VcpuInit.unpack(self.vm.memory.read(arg, VcpuInit.SIZE))
        power_off = features.set_target(self, init)
        self.serror_pending = self.irq_input = self.fiq_input = False  # bits of HCR_EL2, which is set anew
        self.set_power(KVM_MP_STATE_STOPPED if power_off else KVM_MP_STATE_RUNNABLE)
        return 0

    def finalize(self, arg: int) -> int:
        """KVM_ARM_VCPU_FINALIZE of a feature, an int at `arg`."""
        self.check_initialized()
        sve.finalize(self, int.from_bytes(self.vm.memory.read(arg, 4), "little", signed=True))
        return 0

    # ---- registers

    def _register(self, arg: int) -> OneReg:
        self.check_initialized()
        reg = OneReg.unpack(self.vm.memory.read(arg, OneReg.SIZE))
        self.apply_reset()
        self.pull()
        return reg

    def get_one_reg(self, arg: int) -> int:
        """KVM_GET_ONE_REG."""
        reg = self._register(arg)
        self.vm.memory.write(reg.addr, registers.get(self, reg.id))
        return 0

    def set_one_reg(self, arg: int) -> int:
        """KVM_SET_ONE_REG."""
        reg = self._register(arg)
        registers.put(self, reg.id, lambda size: self.vm.memory.read(reg.addr, size))
        self.dirty = True
        return 0

    def get_reg_list(self, arg: int) -> int:
        """KVM_GET_REG_LIST: E2BIG with n filled in where the list is longer than the client's room."""
        self.check_initialized()
        self.check_finalized()
        memory = self.vm.memory
        room = RegList.unpack(memory.read(arg, RegList.SIZE)).n & 0xFFFFFFFF
        ids = registers.ids(self)
        memory.write(arg, RegList(n=len(ids)).pack())
        if room < len(ids):
            raise KvmError(errno.E2BIG, f"{len(ids)} registers, room for {room}")
        memory.write(arg + RegList.SIZE, b"".join(id_.to_bytes(8, "little") for id_ in ids))
        return 0

    def guest_read(self, enc: int) -> int | None:
        """What an MRS of a trapped register reads; None: an undefined instruction."""
        return sysregs_guest.access(self, enc, write=False, value=0)

    def guest_sysreg(self, enc: int, write: bool, value: int) -> int | None:
        """A trapped MRS or MSR: the value read (0 for a write); None: undefined, the guest gets the exception."""
        return sysregs_guest.access(self, enc, write, value)

    # ---- the rest of the vCPU's ioctls

    def get_mp_state(self, arg: int) -> int:
        """KVM_GET_MP_STATE; works before KVM_ARM_VCPU_INIT."""
        self.vm.memory.write(arg, MpState(mp_state=self.mp_state).pack())
        return 0

    def set_mp_state(self, arg: int) -> int:
        """KVM_SET_MP_STATE: RUNNABLE, STOPPED or SUSPENDED; anything else is EINVAL."""
        wanted = MpState.unpack(self.vm.memory.read(arg, MpState.SIZE)).mp_state
        if wanted not in (KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, KVM_MP_STATE_SUSPENDED):
            raise KvmError(errno.EINVAL, f"mp_state {wanted}: arm64 has RUNNABLE (0), STOPPED (5) and SUSPENDED (10)")
        self.set_power(wanted)
        return 0

    def get_vcpu_events(self, arg: int) -> int:
        """KVM_GET_VCPU_EVENTS."""
        return vcpu_events.get(self, arg)

    def set_vcpu_events(self, arg: int) -> int:
        """KVM_SET_VCPU_EVENTS."""
        return vcpu_events.put(self, arg)

    def set_signal_mask(self, arg: int) -> int:
        """KVM_SET_SIGNAL_MASK; 0 takes the mask away."""
        return vcpu_debug.set_signal_mask(self, arg)

    def set_guest_debug(self, arg: int) -> int:
        """KVM_SET_GUEST_DEBUG."""
        return vcpu_debug.set_guest_debug(self, arg)

    def enable_cap(self, arg: int) -> int:
        """KVM_ENABLE_CAP on a vCPU: arm64 has none there."""
        raise KvmError(errno.EINVAL, "arm64 enables capabilities on the VM, not on a vCPU")

    def has_device_attr(self, arg: int) -> int:
        """KVM_HAS_DEVICE_ATTR on a vCPU: PMU, timer and stolen-time attributes."""
        return vcpu_attrs.has(self, arg)

    def get_device_attr(self, arg: int) -> int:
        """KVM_GET_DEVICE_ATTR on a vCPU."""
        return vcpu_attrs.get(self, arg)

    def set_device_attr(self, arg: int) -> int:
        """KVM_SET_DEVICE_ATTR on a vCPU."""
        return vcpu_attrs.put(self, arg)

    def start_stolen_time(self) -> int:
        """PV_TIME_ST: the guest physical address of the stolen-time structure, zeroed; all ones without one."""
        return stolen_time.start(self)

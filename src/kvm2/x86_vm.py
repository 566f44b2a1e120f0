"""What a VM has on x86-64 alone: interrupt chips, the i8254, the clock, places that KVM needs for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from kvm2.handle import DeviceAttributes, checked_word
from kvm2.names import IRQCHIPS, lookup
from kvm2.x86_calls import X86Calls

if TYPE_CHECKING:
    from kvm2.abi.structs import ClockData
    from kvm2.abi.structs_x86_vm import Irqchip, MsrFilter, PitState2

KVM_PIT_SPEAKER_DUMMY = 1


class X86Vm(DeviceAttributes, X86Calls):
    """The x86-64 part of `Vm`. On other hosts each call is a UsageError."""

    def get_irqchip(self, chip: int | str) -> Irqchip:
        """KVM_GET_IRQCHIP of "pic-master", "pic-slave" or "ioapic".

        The answer's `chip` is a `PicState` or an `IoapicState`: `PicState.unpack(answer.chip)`.
        """
        from kvm2.abi.structs_x86_vm import Irqchip

        number = checked_word("irqchip", lookup(chip, IRQCHIPS, "irqchip"), 32)
        return cast("Irqchip", self._x86_get("KVM_GET_IRQCHIP", Irqchip(number)))

    def set_irqchip(self, state: Irqchip) -> None:
        """KVM_SET_IRQCHIP."""
        self._x86_set("KVM_SET_IRQCHIP", state)

    def create_pit(self, *, speaker: bool = False) -> None:
        """KVM_CREATE_PIT2: an i8254, after `create_irqchip`; with `speaker` port 0x61 is a dummy in the kernel."""
        from kvm2.abi.structs_x86_vm import PitConfig

        self._x86_set("KVM_CREATE_PIT2", PitConfig(flags=KVM_PIT_SPEAKER_DUMMY * speaker))

    def get_pit(self) -> PitState2:
        """KVM_GET_PIT2."""
        return cast("PitState2", self._x86_get("KVM_GET_PIT2"))

    def set_pit(self, state: PitState2) -> None:
        """KVM_SET_PIT2."""
        self._x86_set("KVM_SET_PIT2", state)

    def set_pit_reinject(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: whether ticks of the i8254 that were missed are injected later."""
        from kvm2.abi.structs_x86_vm import ReinjectControl

        self._x86_set("KVM_REINJECT_CONTROL", ReinjectControl(pit_reinject=int(reinject)))

    def get_clock(self) -> ClockData:
        """KVM_GET_CLOCK: the VM's kvmclock, `clock` in nanoseconds."""
        return cast("ClockData", self._x86_get("KVM_GET_CLOCK"))

    def set_clock(self, clock: ClockData) -> None:
        """KVM_SET_CLOCK; of the flags KVM takes KVM_CLOCK_REALTIME only."""
        self._x86_set("KVM_SET_CLOCK", clock)

    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR: three pages below 4 GiB that no slot has, for KVM itself (older Intel)."""
        self._x86_call("KVM_SET_TSS_ADDR", checked_word("address", address, 64))

    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page below 4 GiB for the same; before the first vCPU."""
        self._x86_word("KVM_SET_IDENTITY_MAP_ADDR", address)

    def set_boot_cpu_id(self, id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: which vCPU starts; before the first vCPU."""
        self._x86_call("KVM_SET_BOOT_CPU_ID", checked_word("vcpu id", id, 32))

    def set_msr_filter(self, msr_filter: MsrFilter) -> None:
        """KVM_X86_SET_MSR_FILTER: which MSRs the guest may touch itself; the others exit or fault."""
        self._x86_set("KVM_X86_SET_MSR_FILTER", msr_filter)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: what new vCPUs get, in kHz (KVM_CAP_VM_TSC_CONTROL)."""
        return self._x86_call("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ for new vCPUs."""
        self._x86_call("KVM_SET_TSC_KHZ", checked_word("kHz", khz, 32))

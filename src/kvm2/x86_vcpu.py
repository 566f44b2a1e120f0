"""What a vCPU has on x86-64 alone: registers as structures, CPUID, MSRs, the local APIC, interrupts."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from kvm2.abi import exits as abi
from kvm2.errors import UsageError
from kvm2.handle import Buffer, DeviceAttributes, checked_word
from kvm2.x86_calls import X86Calls, row_of
from kvm2.x86_msrs import get_msrs, set_msrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvm2.abi.structs import Translation
    from kvm2.abi.structs_x86 import (
        CpuidEntry2,
        Debugregs,
        Fpu,
        LapicState,
        MsrEntry,
        Regs,
        Sregs,
        Sregs2,
        VcpuEvents,
        Xcrs,
    )
    from kvm2.vm import Vm

_WINDOW = abi.Run.LAYOUT.at("request_interrupt_window").offset


class X86Vcpu(DeviceAttributes, X86Calls):
    """The x86-64 part of `Vcpu`. On other hosts each call is a UsageError. `regs` has every register by name."""

    vm: Vm
    _area: memoryview

    # -- registers as structures of abi.structs_x86

    def get_regs(self) -> Regs:
        """KVM_GET_REGS: general registers, RIP, RFLAGS."""
        return cast("Regs", self._x86_get("KVM_GET_REGS"))

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS: all of them. `vcpu.regs.update(rip=..., rax=...)` changes some."""
        self._x86_set("KVM_SET_REGS", regs)

    def get_sregs(self) -> Sregs:
        """KVM_GET_SREGS: segments, descriptor tables, control registers, EFER."""
        return cast("Sregs", self._x86_get("KVM_GET_SREGS"))

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS."""
        self._x86_set("KVM_SET_SREGS", sregs)

    def get_sregs2(self) -> Sregs2:
        """KVM_GET_SREGS2: the same, with the PAE page-directory pointers."""
        return cast("Sregs2", self._x86_get("KVM_GET_SREGS2"))

    def set_sregs2(self, sregs: Sregs2) -> None:
        """KVM_SET_SREGS2."""
        self._x86_set("KVM_SET_SREGS2", sregs)

    def get_fpu(self) -> Fpu:
        """KVM_GET_FPU: x87 and SSE registers."""
        return cast("Fpu", self._x86_get("KVM_GET_FPU"))

    def set_fpu(self, fpu: Fpu) -> None:
        """KVM_SET_FPU."""
        self._x86_set("KVM_SET_FPU", fpu)

    def get_debugregs(self) -> Debugregs:
        """KVM_GET_DEBUGREGS: the guest's DR0..DR3, DR6, DR7."""
        return cast("Debugregs", self._x86_get("KVM_GET_DEBUGREGS"))

    def set_debugregs(self, registers: Debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self._x86_set("KVM_SET_DEBUGREGS", registers)

    def get_xcrs(self) -> Xcrs:
        """KVM_GET_XCRS: XCR0."""
        return cast("Xcrs", self._x86_get("KVM_GET_XCRS"))

    def set_xcrs(self, xcrs: Xcrs) -> None:
        """KVM_SET_XCRS."""
        self._x86_set("KVM_SET_XCRS", xcrs)

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE, or KVM_GET_XSAVE2 where the area is larger than 4096 bytes (AMX)."""
        size = self._xsave_size()
        area = Buffer(size)
        self._x86_call("KVM_GET_XSAVE2" if size > row_of("KVM_GET_XSAVE").size else "KVM_GET_XSAVE", area)
        return area.bytes()

    def set_xsave(self, area: bytes) -> None:
        """KVM_SET_XSAVE with as many bytes as `get_xsave` gives; UsageError otherwise."""
        size = self._xsave_size()
        if len(area) != size:
            raise UsageError(f"an XSAVE area of {len(area)} bytes; this VM's has {size}")
        self._x86_call("KVM_SET_XSAVE", Buffer(area))

    def _xsave_size(self) -> int:
        self._only_on("x86_64", "KVM_GET_XSAVE")
        return max(self.vm.check_extension("XSAVE2"), row_of("KVM_GET_XSAVE").size)

    # -- CPUID and MSRs

    def get_cpuid(self) -> tuple[CpuidEntry2, ...]:
        """KVM_GET_CPUID2: the leaves that the guest sees."""
        return self._x86_list("KVM_GET_CPUID2")

    def set_cpuid(self, entries: Sequence[CpuidEntry2]) -> None:
        """KVM_SET_CPUID2, before the first run; `kvm.supported_cpuid()` is what this host can give."""
        self._x86_send_list("KVM_SET_CPUID2", entries)

    def get_msrs(self, indices: Iterable[int]) -> tuple[MsrEntry, ...]:
        """KVM_GET_MSRS: in the order of `indices`; KvmError names the first that the kernel refuses."""
        return get_msrs(self, indices)

    def set_msrs(self, msrs: Mapping[int, int] | Sequence[MsrEntry]) -> None:
        """KVM_SET_MSRS: {index: value}, or what `get_msrs` gave; KvmError names the first that the kernel refuses."""
        from kvm2.abi.structs_x86 import MsrEntry

        if hasattr(msrs, "items"):
            words = {checked_word("MSR index", i, 32): checked_word(f"MSR {i:#x}", v, 64) for i, v in msrs.items()}
            return set_msrs(self, [MsrEntry(index, data=value) for index, value in words.items()])
        return set_msrs(self, msrs)

    # -- interrupts

    def get_lapic(self) -> LapicState:
        """KVM_GET_LAPIC: the registers of the local APIC in the kernel (`vm.create_irqchip()`), one each 16 bytes."""
        return cast("LapicState", self._x86_get("KVM_GET_LAPIC"))

    def set_lapic(self, state: LapicState) -> None:
        """KVM_SET_LAPIC."""
        self._x86_set("KVM_SET_LAPIC", state)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: queue an external interrupt, in a VM without `create_irqchip`.

        The guest must be able to take it: see `ready_for_interrupt` and `request_irq_window`.
        """
        self._x86_word("KVM_INTERRUPT", checked_word("vector", vector, 8))

    @property
    def ready_for_interrupt(self) -> bool:
        """kvm_run.ready_for_interrupt_injection, as the last exit left it."""
        return bool(self._area[abi.Run.LAYOUT.at("ready_for_interrupt_injection").offset])

    def request_irq_window(self, wanted: bool = True) -> None:
        """kvm_run.request_interrupt_window: exit with `IrqWindowOpen` as soon as the guest can take an interrupt."""
        self._only_on("x86_64", "kvm_run.request_interrupt_window")
        self._area[_WINDOW] = int(wanted)

    def nmi(self) -> None:
        """KVM_NMI: queue a non-maskable interrupt."""
        self._x86_call("KVM_NMI")

    def smi(self) -> None:
        """KVM_SMI: queue a system-management interrupt (KVM_CAP_X86_SMM)."""
        self._x86_call("KVM_SMI")

    def _x86_get_events(self) -> VcpuEvents:
        return cast("VcpuEvents", self._x86_get("KVM_GET_VCPU_EVENTS"))

    # -- time and translation

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the frequency of the guest's time-stamp counter."""
        return self._x86_call("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (KVM_CAP_TSC_CONTROL)."""
        self._x86_call("KVM_SET_TSC_KHZ", checked_word("kHz", khz, 32))

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was stopped, so that it does not take it for a lockup."""
        self._x86_call("KVM_KVMCLOCK_CTRL")

    def translate(self, address: int) -> Translation:
        """KVM_TRANSLATE: what a linear address means by the guest's page tables."""
        from kvm2.abi.structs import Translation

        start = Translation(linear_address=checked_word("address", address, 64))
        return cast("Translation", self._x86_get("KVM_TRANSLATE", start))

"""What /dev/kvm tells of an x86-64 host: CPUID leaves and MSRs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.x86_calls import X86Calls
from kvm2.x86_msrs import get_msrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm2.abi.structs_x86 import CpuidEntry2, MsrEntry


class X86Kvm(X86Calls):
    """The x86-64 part of `Kvm`. On other hosts each call is a UsageError."""

    def supported_cpuid(self) -> tuple[CpuidEntry2, ...]:
        """KVM_GET_SUPPORTED_CPUID: the leaves that this host can give a guest, as `Vcpu.set_cpuid` takes them."""
        return self._x86_list("KVM_GET_SUPPORTED_CPUID")

    def emulated_cpuid(self) -> tuple[CpuidEntry2, ...]:
        """KVM_GET_EMULATED_CPUID: the leaves with what KVM emulates, slowly, and a host's processor may lack."""
        return self._x86_list("KVM_GET_EMULATED_CPUID")

    def supported_hv_cpuid(self) -> tuple[CpuidEntry2, ...]:
        """KVM_GET_SUPPORTED_HV_CPUID: the Hyper-V leaves."""
        return self._x86_list("KVM_GET_SUPPORTED_HV_CPUID")

    def msr_index_list(self) -> tuple[int, ...]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs to save and restore."""
        return self._x86_list("KVM_GET_MSR_INDEX_LIST")

    def msr_feature_index_list(self) -> tuple[int, ...]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that describe features; `get_msrs` reads them."""
        return self._x86_list("KVM_GET_MSR_FEATURE_INDEX_LIST")

    def get_msrs(self, indices: Iterable[int]) -> tuple[MsrEntry, ...]:
        """KVM_GET_MSRS on /dev/kvm: feature MSRs by number, in the same order; KvmError names a refused one."""
        return get_msrs(self, indices)

    def mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED: MCG_CAP as this host can give it."""
        from kvm2.handle import Buffer

        value = Buffer(8)
        self._x86_call("KVM_X86_GET_MCE_CAP_SUPPORTED", value)
        return int.from_bytes(value.bytes(), "little")

"""The machine around an arm64 guest: memory, UART, vCPUs.

with kvm2.open("neoverse-n1-4k") as kvm:
    machine = Machine(kvm, VmSpec(memory=(MemoryRange(1 << 30, 64 << 20),)))
    machine.load(read_image(path, machine.memory))
    result = machine.run()
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvm2.board.loop import Board, RunResult, Unclaimed, check_ranges
from kvm2.board.params import Params
from kvm2.board.pl011 import SIZE as UART_SIZE
from kvm2.board.pl011 import Pl011
from kvm2.errors import GuestError, KvmError, UsageError
from kvm2.spec import MemoryRange, VmSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.board.loader import Image
    from kvm2.exits import Mmio
    from kvm2.kvm import Kvm
    from kvm2.vcpu import Vcpu
    from kvm2.vm import Vm

__all__ = ["DEFAULT_MEMORY", "UART_BASE", "Machine", "RunResult", "Unclaimed", "check_memory"]

DEFAULT_MEMORY = (MemoryRange(1 << 30, 64 << 20),)
UART_BASE = 0x0900_0000


class Machine(Board):
    """One VM with its board, made through KVM_CREATE_VM2 (or an existing `vm`), ready to load a guest and run once.

    `spec.memory` is the RAM, the first range being where flat images go; `cpus` vCPUs are made, all but the first
    powered off. With `top`, a small slot is mapped at the end of the IPA space where the RAM does not reach.
    """

    def __init__(
        self,
        kvm: Kvm,
        spec: VmSpec,
        *,
        vm: Vm | None = None,
        cpus: int = 1,
        sink: Callable[[int], object] | None = None,
        top: bool = False,
    ) -> None:
        memory = spec.memory or DEFAULT_MEMORY
        check_memory(memory)
        super().__init__(kvm, spec, memory, vm, cpus, sink)
        self.ipa_bits = ipa_bits_of(self.vm)
        self.top = self.map_top(self.ipa_bits) if top else None
        self.uart = Pl011(self.send)
        self.vcpus = [self.vm.create_vcpu(number) for number in range(cpus)]
        self.sve_vls = 0
        for vcpu in self.vcpus:
            self.sve_vls = initialise(vcpu, spec)

    def load(self, image: Image, *, params: bool = True) -> int:
        """Put the image and the parameter block into memory, and vCPU 0 at the entry; the block's address, or 0."""
        image.load(self.vm)
        address = self.place_params(image) if params else 0
        if address:
            self.vm.write(address, self._params().pack())
        boot = self.vcpus[0].regs
        boot.pc, boot.x0 = image.entry, address
        return address

    def _params(self) -> Params:
        return Params(
            ipa_bits=self.ipa_bits,
            host_ipa_bits=self.kvm.check_extension("ARM_VM_IPA_SIZE"),
            page_shift=page_shift_of(self.vm),
            cpus=len(self.vcpus),
            ranges=self.ranges,
            sve_vls=self.sve_vls,
            uart=UART_BASE,
            top=(self.top.base, self.top.size) if self.top else (0, 0),
        )

    def mmio(self, exit: Mmio) -> None:
        """The UART; elsewhere a read gives 0."""
        offset = exit.address - UART_BASE
        if 0 <= offset < UART_SIZE:
            if exit.is_write:
                self.uart.write(offset, exit.size, exit.value)
            else:
                exit.reply(self.uart.read(offset, exit.size) & ((1 << 8 * exit.size) - 1))
            return
        if not exit.is_write:
            exit.reply(0)
        self.nothing_there("memory", exit.address, exit.size, exit.is_write)


def initialise(vcpu: Vcpu, spec: VmSpec) -> int:
    """KVM_ARM_VCPU_INIT with what a VM of `spec` has, powered off unless it is vCPU 0; the first word of SVE_VLS.

    With `spec.sve` the vCPU is finalised with the VM's lengths, or, for "vcpu", with the host's own.
    """
    vcpu.init(["psci_0_2"] + ["power_off"] * (vcpu.id > 0) + ["sve"] * (spec.sve is not None))
    if spec.sve is None:
        return 0
    if spec.sve == "vcpu":
        # The rule of KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS: the host's own set, written back, then finalised.
        vcpu.set_reg("sve_vls", vcpu.get_reg("sve_vls"))
        vcpu.finalize("sve")
    words = vcpu.get_reg("sve_vls")
    first: int = struct.unpack_from("<Q", words)[0] if isinstance(words, bytes) else words
    return first


def check_memory(memory: tuple[MemoryRange, ...]) -> None:
    """UsageError where ranges overlap each other or the UART, or are empty."""
    check_ranges(memory)
    for piece in memory:
        if piece.base < UART_BASE + UART_SIZE and piece.end > UART_BASE:
            raise UsageError(f"memory {piece} covers the UART at {UART_BASE:#x}: leave that page free")


def ipa_bits_of(vm: Vm) -> int:
    """The VM's IPA size in bits: attribute 2, or on a mainline kernel what the software KVM shows of its own VM."""
    try:
        bits: int = vm.get_attr(2).physaddr_bits
    except KvmError as error:
        from kvm2.hosts.soft import format_of

        found = format_of(vm.backend, vm.fd)
        if found is None:
            raise GuestError(f"this host runs no arm64 guest: its VM has no IPA size to read back ({error})") from error
        return found.ipa_bits
    return bits


def page_shift_of(vm: Vm) -> int:
    """The VM's stage-2 granule, as `ipa_bits_of`; this machine's page size where neither says."""
    try:
        shift: int = vm.get_attr(8).page_shift
    except KvmError:
        from kvm2.hosts.soft import format_of

        found = format_of(vm.backend, vm.fd)
        return found.page_shift if found is not None else 12
    return shift

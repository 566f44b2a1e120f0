"""The machine around an x86-64 guest: memory from address 0, a 16550 UART, ports for power-off and reset.

with kvm2.open("/dev/kvm") as kvm:
    machine = X86Machine(kvm, VmSpec())
    machine.load(read_image(path, machine.memory, "x86_64"))
    result = machine.run()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.board.loop import Board, check_ranges
from kvm2.board.params import Params
from kvm2.board.uart16550 import SIZE as UART_SIZE
from kvm2.board.uart16550 import Uart16550
from kvm2.board.x86_entry import enter
from kvm2.errors import KvmError, UsageError
from kvm2.exits import InternalError
from kvm2.spec import MemoryRange, VmSpec
from kvm2.x86_exits import Hlt, Shutdown

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.abi.structs_x86 import CpuidEntry2
    from kvm2.board.loader import Image
    from kvm2.exits import Exit, Io, Mmio
    from kvm2.kvm import Kvm
    from kvm2.vcpu import Vcpu
    from kvm2.vm import Vm

DEFAULT_MEMORY = (MemoryRange(0, 64 << 20),)
LEAST_RAM = 1 << 20
UART_PORT = 0x3F8
# ACPI's PM1a control register where QEMU's PC has it: SLP_EN with sleep type 0 is power-off.
POWER_PORT, SLP_EN, SLP_TYPE = 0x604, 1 << 13, 7 << 10
# The reset control register of PC chip sets: bit 2 resets.
RESET_PORT, RESET = 0xCF9, 1 << 2
# Pages that older Intel processors need for real mode, where QEMU has them; no slot may lie there.
IDENTITY_MAP, TSS = 0xFEFFC000, 0xFEFFD000
ADDRESS_SIZES, TOPOLOGY = 0x8000_0008, (0xB, 0x1F)
NO_LEAF_BITS = 36  # MAXPHYADDR of processors without that leaf (Intel SDM volume 3, 4.1.4)


class X86Machine(Board):
    """One x86-64 VM with its board and one vCPU, ready to load a guest and run once.

    `spec.memory` is the RAM; the first range begins at 0. With `top`, a small slot is mapped at the end of the guest
    physical address space where the RAM does not reach.
    """

    params_below = 1 << 32  # EDI holds its address
    bits_name = "physical address bits"
    nothing_reads = "all ones"

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
        if cpus != 1:
            raise UsageError(
                f"cpus = {cpus}: this board has no interrupt controller, by which x86 starts the others: allowed is 1"
            )
        super().__init__(kvm, spec, memory, vm, cpus, sink)
        leaves = kvm.supported_cpuid()
        self.host_ipa_bits, self.ipa_bits = physical_bits(leaves)
        self.top = self.map_top(self.ipa_bits) if top else None
        self.uart = Uart16550(self.send)
        self.vm.set_identity_map_addr(IDENTITY_MAP)
        self.vm.set_tss_addr(TSS)
        vcpu = self.vm.create_vcpu(0)
        vcpu.set_cpuid([_of_vcpu(leaf, vcpu.id) for leaf in leaves])
        self.vcpus = [vcpu]

    def load(self, image: Image, *, params: bool = True) -> int:
        """Put the image and the parameter block into memory, and the vCPU at the entry; the block's address, or 0."""
        image.load(self.vm)
        address = self.place_params(image) if params else 0
        if address:
            self.vm.write(address, self._params().pack())
        enter(self.vm, self.vcpus[0], image, self.memory[0], address)
        return address

    def _params(self) -> Params:
        return Params(
            ipa_bits=self.ipa_bits,
            host_ipa_bits=self.host_ipa_bits,
            page_shift=12,
            cpus=len(self.vcpus),
            ranges=self.ranges,
            uart=UART_PORT,
            top=(self.top.base, self.top.size) if self.top else (0, 0),
        )

    def mmio(self, exit: Mmio) -> None:
        """Nothing is there: a read gives all ones."""
        if not exit.is_write:
            exit.reply(b"\xff" * exit.size)
        self.nothing_there("memory", exit.address, exit.size, exit.is_write)

    def io(self, exit: Io) -> None:
        """The UART, power-off and reset; elsewhere a read gives all ones."""
        port, size = exit.port, exit.size
        offset = port - UART_PORT
        if offset >= 0 and offset + size <= UART_SIZE:
            # A byte-wide device: a wider access is one of each byte, to the ports that follow.
            registers = [offset + i for i in range(size)] * exit.count
            if exit.is_write:
                for register, byte in zip(registers, exit.data, strict=True):
                    self.uart.write(register, byte)
            else:
                exit.reply(bytes(self.uart.read(register) for register in registers))
            return
        if exit.is_write and self._ends(port, size, exit.values):
            return
        if not exit.is_write:
            exit.reply(b"\xff" * (size * exit.count))
        self.nothing_there("port", port, size, exit.is_write, exit.count)

    def _ends(self, port: int, size: int, values: tuple[int, ...]) -> bool:
        """Whether a write is to a port that can end the guest."""
        if port == POWER_PORT and size == 2:
            for value in values:
                if value & SLP_EN and not value & SLP_TYPE:
                    self.finish("shutdown", "", 0)
            return True
        if port == RESET_PORT and size == 1:
            if any(value & RESET for value in values):
                self.finish("reset", "", 0)
            return True
        return False

    def other(self, vcpu: Vcpu, exit: Exit) -> None:
        """A halt, which nothing can end here; a triple fault; what KVM could not emulate."""
        if isinstance(exit, Hlt):
            where = f"HLT before RIP {vcpu.regs.rip:#x}"
            self.finish("halted", f"vCPU {vcpu.id} waits for an interrupt ({where}), and this board has none", vcpu.id)
        elif isinstance(exit, Shutdown):
            self.finish("crash", f"vCPU {vcpu.id}: triple fault{_where(vcpu)}", vcpu.id)
        elif isinstance(exit, InternalError):
            what = f"KVM could not go on, {exit!r}"
            if exit.instruction:
                what = f"KVM could not emulate the instruction that begins {exit.instruction.hex(' ')}"
            self.finish("failed", f"vCPU {vcpu.id}: {what}{_where(vcpu)}", vcpu.id)
        else:
            super().other(vcpu, exit)


def check_memory(memory: tuple[MemoryRange, ...]) -> None:
    """UsageError where ranges are empty or overlap, or the first is not real mode's memory."""
    check_ranges(memory)
    first = memory[0]
    if first.base or first.size < LEAST_RAM:
        raise UsageError(
            f"memory {first}: the first range of an x86-64 guest begins at 0 and has at least {LEAST_RAM:#x} bytes, "
            "for it is entered in real mode or finds its tables there: --memory 64M@0"
        )


def physical_bits(leaves: tuple[CpuidEntry2, ...]) -> tuple[int, int]:
    """(MAXPHYADDR, bits of a guest physical address that can be mapped) by the CPUID leaves that KVM can give.

    The second is GuestPhysAddrSize, which KVM gives where its second-stage tables have fewer levels, else the first.
    """
    eax = next((leaf.eax for leaf in leaves if leaf.function == ADDRESS_SIZES), NO_LEAF_BITS)
    return eax & 0xFF, eax >> 16 & 0xFF or eax & 0xFF


def _of_vcpu(leaf: CpuidEntry2, id: int) -> CpuidEntry2:
    """KVM gives the APIC id of the CPU that was asked; the guest's is its vCPU's."""
    values = {field.name: getattr(leaf, field.name) for field in leaf.LAYOUT.fields}
    if leaf.function == 1:
        values["ebx"] = leaf.ebx & 0x00FF_FFFF | id << 24
    elif leaf.function in TOPOLOGY:
        values["edx"] = id
    return type(leaf)(**values)


def _where(vcpu: Vcpu) -> str:
    try:
        special = vcpu.get_sregs()
        return f" at RIP {vcpu.regs.rip:#x} (CS {special.cs.selector:#x}, CR0 {special.cr0:#x}, CR3 {special.cr3:#x})"
    except KvmError:
        return ""

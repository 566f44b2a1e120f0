"""The machine that boots arm64 Linux: RAM anywhere, a vGIC, PL011, PL031, virtio devices, and a device tree.

with kvm2.open("graviton3") as kvm:
    spec = VmSpec(physaddr_bits="auto", memory=(MemoryRange(1 << 40, 1 << 30),))
    with LinuxMachine(kvm, spec, cpus=2, virtio=[Blk("root.img")]) as machine:
        machine.load_linux(read_kernel(path), initrd, "console=ttyAMA0")
        result = machine.run()
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from kvm2.abi import ioctls
from kvm2.abi import structs_irq as irq
from kvm2.board import linux_layout as layout
from kvm2.board.bus import Bus, Closeable
from kvm2.board.gic import make_gic
from kvm2.board.linux_layout import UART_BASE as UART_BASE
from kvm2.board.linux_tree import Chosen, linux_tree
from kvm2.board.loop import Board, check_ranges
from kvm2.board.machine import initialise, ipa_bits_of
from kvm2.board.pl011 import Pl011
from kvm2.board.pl031 import Pl031
from kvm2.board.virtio.mmio import VirtioMmio
from kvm2.errors import UsageError
from kvm2.handle import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvm2.board.bus import StatefulDevice
    from kvm2.board.kernel_image import KernelImage
    from kvm2.board.loader import Image
    from kvm2.board.virtio.device import Device as VirtioDevice
    from kvm2.device import Device
    from kvm2.exits import Mmio
    from kvm2.kvm import Kvm
    from kvm2.spec import VmSpec
    from kvm2.vm import Vm

KASLR_SEED_BYTES, RNG_SEED_BYTES = 8, 64
MOST_COMMAND_LINE = 2047  # COMMAND_LINE_SIZE of arch/arm64, without the NUL that ends it


class LinuxMachine(Board):
    """One VM with everything around it that arm64 Linux needs, ready to load a kernel and run once.

    `spec.memory` is the RAM (512M@1G if empty); `cpus` vCPUs are made, all but the first powered off; `virtio` are
    devices of `board.virtio`, /dev/vda being the first disk. `gic` is 2 or 3, None the host's best; `its` None makes an
    ITS where the host has one. `uart`, `rtc` and `devices` (by name, in the order of their making) are for whoever
    looks inside. Only the handles are used, so that it runs on a real arm64 KVM too.

    UsageError where RAM covers the devices' addresses; EnvironmentFault where the host makes no vGIC.
    """

    def __init__(
        self,
        kvm: Kvm,
        spec: VmSpec,
        *,
        vm: Vm | None = None,
        cpus: int = 1,
        sink: Callable[[int], object] | None = None,
        virtio: Sequence[VirtioDevice] = (),
        gic: int | None = None,
        its: bool | None = None,
    ) -> None:
        memory = spec.memory or layout.DEFAULT_MEMORY
        check_ranges(memory)
        layout.check_rooms(memory, layout.rooms_of(cpus))
        if len(virtio) > layout.MOST_VIRTIO:
            raise UsageError(
                f"{len(virtio)} virtio devices (disks, networks, the source of entropy): this machine has room for "
                f"{layout.MOST_VIRTIO}"
            )
        super().__init__(kvm, spec, memory, vm, cpus, sink)
        self.cpus = cpus
        self.bus = Bus()
        self.sve_vls = 0
        self._handles: list[Device] = []
        try:
            self._build(virtio, gic, its)
        except BaseException:
            self.close()  # what was made already, the virtio devices' files among it
            raise

    def _build(self, virtio: Sequence[VirtioDevice], gic: int | None, its: bool | None) -> None:
        vm = self.vm
        self.uart = Pl011(self.send, self.line(layout.UART_SPI))
        self.rtc = Pl031(self.line(layout.RTC_SPI))
        self.bus.add(layout.UART_BASE, self.uart, "uart", layout.UART_SPI)
        self.bus.add(layout.RTC_BASE, self.rtc, "rtc", layout.RTC_SPI)
        for number, device in enumerate(virtio):
            spi, base = layout.VIRTIO_SPI + number, layout.VIRTIO_BASE + number * layout.VIRTIO_STRIDE
            self.bus.add(base, VirtioMmio(device, vm, self.line(spi)), f"virtio{number}", spi)
        self.ipa_bits = ipa_bits_of(vm)
        for number in range(self.cpus):
            self.vcpus.append(vm.create_vcpu(number))
            self.sve_vls = initialise(self.vcpus[number], self.spec)
        self.gic = make_gic(vm, self.cpus, layout.irqs_for(len(virtio)), gic, its)
        self._handles += [device for device in (self.gic.device, self.gic.its_device) if device is not None]
        self.dtb = self._tree(Chosen())

    @property
    def devices(self) -> dict[str, StatefulDevice]:
        """The devices by name: "uart", "rtc", "virtio0", ..."""
        return {place.name: cast("StatefulDevice", place.device) for place in self.bus.places.values()}

    def line(self, spi: int) -> Callable[[bool], None]:
        """A function that sets the level of a shared interrupt, from any thread (KVM_IRQ_LINE)."""
        number = irq.KVM_ARM_IRQ_TYPE_SPI << irq.KVM_ARM_IRQ_TYPE_SHIFT | layout.FIRST_SPI + spi
        low, high = (packed(irq.IrqLevel(irq=number, level=level)) for level in (0, 1))
        vm = self.vm

        def set_level(level: bool) -> None:
            if not vm.closed:
                vm.ioctl(ioctls.KVM_IRQ_LINE, high if level else low)

        return set_level

    # -- loading

    def load_linux(
        self, kernel: KernelImage, initrd: bytes = b"", append: str = "", *, kaslr: bool = False, seed: bool = True
    ) -> layout.Placed:
        """Put a kernel, its initrd and the device tree into RAM, and vCPU 0 at the entry; where they are.

        `append` is the kernel's command line. `seed` gives it random bytes for its random number generator; `kaslr`
        some for its address too. A kernel at a random address keeps tables of its own for user space (KPTI), which
        costs a fifth of what fork and exec take, so it is not the default. UsageError where they do not fit the RAM.
        """
        if len(append.encode()) > MOST_COMMAND_LINE:
            raise UsageError(f"a command line of {len(append)} characters: arm64 Linux takes {MOST_COMMAND_LINE}")
        placed = layout.place_linux(self.memory, kernel.room, kernel.text_offset, len(initrd))
        self.vm.write(placed.kernel, kernel.data)
        if initrd:
            self.vm.write(placed.initrd, initrd)
        self.dtb = self._tree(
            Chosen(
                append,
                (placed.initrd, len(initrd)) if initrd else None,
                os.urandom(KASLR_SEED_BYTES) if kaslr else b"",
                os.urandom(RNG_SEED_BYTES) if seed else b"",
            )
        )
        self._enter(placed.kernel, placed.dtb)
        return placed

    def load(self, image: Image, *, params: bool = True) -> int:
        """A guest that is no Linux: the image into memory, vCPU 0 at its entry; the device tree's address, or 0.

        x0 has that address, as for Linux; without `params` there is no device tree in memory.
        """
        image.load(self.vm)
        at = self._free_for_tree(image) if params else 0
        self._enter(image.entry, at)
        return at

    def _free_for_tree(self, image: Image) -> int:
        for piece in self.memory:
            at = (piece.end - len(self.dtb)) & ~(layout.PAGE - 1)
            if at >= piece.base and not any(one.address < piece.end and at < one.end for one in image.segments):
                return at
        return 0

    def _enter(self, entry: int, dtb: int) -> None:
        if dtb:
            self.vm.write(dtb, self.dtb)
        boot = self.vcpus[0].regs
        boot.pc, boot.x0 = entry, dtb

    def _tree(self, chosen: Chosen) -> bytes:
        mpidrs = [int(vcpu.get_reg("MPIDR_EL1")) for vcpu in self.vcpus]
        model = f"kvm2 {self.kvm.name}"
        return linux_tree(model, self.memory, mpidrs, self.gic, self.bus.places.values(), chosen).pack()

    # -- running

    def feed(self, data: bytes) -> None:
        """Input for the console, from any thread: it waits until the guest listens, and comes in order."""
        self.uart.type_ahead(data)

    def mmio(self, exit: Mmio) -> None:
        """A device's access; elsewhere a read gives 0."""
        if self.bus.answer(exit):
            return
        if not exit.is_write:
            exit.reply(0)
        self.nothing_there("memory", exit.address, exit.size, exit.is_write)

    # -- snapshots

    def state(self) -> dict[str, Any]:
        """The devices' states by name, JSON-able; while the vCPUs do not run."""
        return {name: device.state() for name, device in self.devices.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave, on a machine made in the same way. UsageError where the devices are others."""
        devices = self.devices
        if set(devices) != set(state):
            raise UsageError(
                f"the state is of a machine with the devices {', '.join(sorted(state))}, and this one has "
                f"{', '.join(sorted(devices))}: make it with the same"
            )
        for name, device in devices.items():
            device.restore(state[name])

    def close(self) -> None:
        """Close the devices, the vCPUs and the VM."""
        for device in self.devices.values():
            if isinstance(device, Closeable):
                device.close()
        for handle in self._handles:
            handle.close()
        super().close()

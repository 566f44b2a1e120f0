"""The device tree of a Linux machine, by the bindings of Documentation/devicetree/bindings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvm2.board import linux_layout as layout
from kvm2.board.fdt import Fdt

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvm2.board.bus import Place
    from kvm2.board.fdt import Node
    from kvm2.board.gic import Gic
    from kvm2.spec import MemoryRange

# interrupt-controller/arm,gic-v3.yaml: the first cell of an interrupt, and the trigger in the third.
SPI, PPI = 0, 1
LEVEL_HIGH = 4
_PPI_CPUS_SHIFT = 8  # GICv2: which CPUs the PPI belongs to
# timer/arm,arch_timer.yaml: secure and non-secure physical, virtual, hypervisor; the PPIs that KVM's timers have.
TIMER_PPIS = (13, 14, 11, 10)
CLOCK_HZ = 24_000_000
MPIDR_AFFINITY = 0xFF_00FF_FFFF
UART, RTC, VIRTIO = "pl011", "pl031", "virtio_mmio"


@dataclass(frozen=True)
class Chosen:
    """What a boot loader says: the command line, the initrd (first address, size) and the seeds, empty for none."""

    append: str = ""
    initrd: tuple[int, int] | None = None
    kaslr_seed: bytes = b""
    rng_seed: bytes = b""


def linux_tree(
    model: str,
    memory: Sequence[MemoryRange],
    mpidrs: Sequence[int],
    gic: Gic,
    places: Iterable[Place],
    chosen: Chosen,
) -> Fdt:
    """The whole tree. `mpidrs` are the vCPUs' MPIDR_EL1; `places` are the devices, named "uart", "rtc", "virtio..."."""
    tree = Fdt(boot_cpu=mpidrs[0] & 0xFFFF_FFFF)
    root = tree.root
    root.text("compatible", "linux,dummy-virt")
    root.text("model", model)
    root.cells("#address-cells", 2)
    root.cells("#size-cells", 2)
    root.flag("dma-coherent")  # devices see what caches hold: Linux warns of large cache lines (A64FX) otherwise
    parent = root.child("intc", layout.GIC_DIST)
    root.cells("interrupt-parent", parent.phandle)
    _choose(root, chosen)
    for piece in sorted(memory, key=lambda one: one.base):
        node = root.child("memory", piece.base)
        node.text("device_type", "memory")
        node.wide("reg", piece.base, piece.size)
    _cpus(root, mpidrs)
    psci = root.child("psci")
    psci.text("compatible", "arm,psci-1.0", "arm,psci-0.2")
    psci.text("method", "hvc")
    _timer(root, gic, len(mpidrs))
    _gic(parent, gic)
    _devices(root, places)
    return tree


def _choose(root: Node, chosen: Chosen) -> None:
    node = root.child("chosen")
    if chosen.append:
        node.text("bootargs", chosen.append)
    node.text("stdout-path", f"/{UART}@{layout.UART_BASE:x}")
    if chosen.initrd is not None:
        start, size = chosen.initrd
        node.wide("linux,initrd-start", start)
        node.wide("linux,initrd-end", start + size)
    if chosen.kaslr_seed:
        node.raw("kaslr-seed", chosen.kaslr_seed)
    if chosen.rng_seed:
        node.raw("rng-seed", chosen.rng_seed)
    root.child("aliases").text("serial0", f"/{UART}@{layout.UART_BASE:x}")


def _cpus(root: Node, mpidrs: Sequence[int]) -> None:
    numbers = [mpidr & MPIDR_AFFINITY for mpidr in mpidrs]
    wide = any(number >> 32 for number in numbers)
    cpus = root.child("cpus")
    cpus.cells("#address-cells", 2 if wide else 1)
    cpus.cells("#size-cells", 0)
    for number in numbers:
        node = cpus.child("cpu", number)
        node.text("device_type", "cpu")
        node.text("compatible", "arm,armv8")
        (node.wide if wide else node.cells)("reg", number)
        node.text("enable-method", "psci")


def _timer(root: Node, gic: Gic, cpus: int) -> None:
    # A GICv2 wants to know the CPUs; a GICv3's PPIs belong to all.
    flags = LEVEL_HIGH | (((1 << cpus) - 1) << _PPI_CPUS_SHIFT if gic.version == 2 else 0)
    node = root.child("timer")
    node.text("compatible", "arm,armv8-timer")
    node.cells("interrupts", *(cell for ppi in TIMER_PPIS for cell in (PPI, ppi, flags)))
    node.flag("always-on")


def _gic(node: Node, gic: Gic) -> None:
    node.cells("#interrupt-cells", 3)
    node.flag("interrupt-controller")
    node.cells("#address-cells", 2)
    node.cells("#size-cells", 2)
    node.flag("ranges")
    if gic.version == 2:
        node.text("compatible", "arm,cortex-a15-gic")
        frames = ((layout.GIC_DIST, layout.GICV2_DIST_SIZE), (layout.GICV2_CPU, layout.GICV2_CPU_SIZE))
        node.wide("reg", *(number for frame in frames for number in frame))
        return
    node.text("compatible", "arm,gic-v3")
    regions = [number for room in gic.redistributors for number in (room.base, room.size)]
    node.wide("reg", layout.GIC_DIST, layout.GIC_DIST_SIZE, *regions)
    if len(gic.redistributors) > 1:
        node.cells("#redistributor-regions", len(gic.redistributors))
    if gic.its is not None:
        its = node.child("msi-controller", gic.its.base)
        its.text("compatible", "arm,gic-v3-its")
        its.flag("msi-controller")
        its.cells("#msi-cells", 1)
        its.wide("reg", gic.its.base, gic.its.size)


def _devices(root: Node, places: Iterable[Place]) -> None:
    clock = root.child("apb-pclk")
    clock.text("compatible", "fixed-clock")
    clock.cells("#clock-cells", 0)
    clock.cells("clock-frequency", CLOCK_HZ)
    clock.text("clock-output-names", "clk24mhz")
    for place in places:
        kind = {"uart": UART, "rtc": RTC}.get(place.name, VIRTIO)
        node = root.child(kind, place.base)
        node.wide("reg", place.base, place.end - place.base)
        if place.spi is not None:
            node.cells("interrupts", SPI, place.spi, LEVEL_HIGH)
        if kind == UART:
            node.text("compatible", "arm,pl011", "arm,primecell")
            node.cells("clocks", clock.phandle, clock.phandle)
            node.text("clock-names", "uartclk", "apb_pclk")
        elif kind == RTC:
            node.text("compatible", "arm,pl031", "arm,primecell")
            node.cells("clocks", clock.phandle)
            node.text("clock-names", "apb_pclk")
        else:
            node.text("compatible", "virtio,mmio")

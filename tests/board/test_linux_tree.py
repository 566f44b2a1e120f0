import shutil
import subprocess

import pytest

from kvm2.board import linux_layout as layout
from kvm2.board.bus import Bus
from kvm2.board.fdt import read_fdt
from kvm2.board.gic import Gic
from kvm2.board.linux_tree import Chosen, linux_tree
from kvm2.board.pl011 import Pl011
from kvm2.board.pl031 import Pl031
from kvm2.spec import MemoryRange

RAM = (MemoryRange(1 << 47, 1 << 30), MemoryRange(1 << 30, 64 << 20))
ITS = layout.Room("ITS", layout.GIC_ITS, layout.GIC_ITS_SIZE)


class Frame:
    size = layout.VIRTIO_STRIDE


def places():
    bus = Bus()
    bus.add(layout.UART_BASE, Pl011(print), "uart", layout.UART_SPI)
    bus.add(layout.RTC_BASE, Pl031(), "rtc", layout.RTC_SPI)
    bus.add(layout.VIRTIO_BASE, Frame(), "virtio0", layout.VIRTIO_SPI)
    bus.add(layout.VIRTIO_BASE + 0x200, Frame(), "virtio1", layout.VIRTIO_SPI + 1)
    return bus.places.values()


def tree(gic=None, cpus=2, chosen=None, mpidrs=None):
    gic = gic or Gic(3, 64, layout.redistributors(cpus), ITS)
    mpidrs = mpidrs or [1 << 31 | number for number in range(cpus)]
    return linux_tree("kvm2 test", RAM, mpidrs, gic, places(), chosen or Chosen())


TREES = {
    "v3": tree(chosen=Chosen("quiet", (1 << 31, 12345), b"12345678", bytes(64))),
    "v3-many": tree(Gic(3, 64, layout.redistributors(200)), 200),
    "v2": tree(Gic(2, 64), 8),
}


@pytest.mark.skipif(not shutil.which("dtc"), reason="needs dtc (device-tree-compiler)")
@pytest.mark.parametrize("name", TREES)
def test_dtc_finds_nothing_wrong(name):
    done = subprocess.run(
        ["dtc", "-I", "dtb", "-O", "dts", "-"], input=TREES[name].pack(), capture_output=True, timeout=30, check=True
    )
    assert done.stderr.decode() == ""


def test_memory_is_where_the_spec_has_it():
    read = read_fdt(TREES["v3"].pack())
    assert read.node(f"/memory@{1 << 47:x}").numbers("reg", 8) == (1 << 47, 1 << 30)
    assert read.node("/memory@40000000").numbers("reg", 8) == (1 << 30, 64 << 20)
    assert read.node("/memory@40000000").texts("device_type") == ("memory",)


def test_cpus_are_named_by_their_affinity_and_started_by_psci():
    read = read_fdt(TREES["v3"].pack())
    assert list(read.node("/cpus").children) == ["cpu@0", "cpu@1"]
    assert read.node("/cpus/cpu@1").numbers("reg") == (1,) and read.node("/cpus/cpu@1").texts("enable-method") == (
        "psci",
    )
    assert read.node("/psci").texts("method") == ("hvc",) and "arm,psci-0.2" in read.node("/psci").texts("compatible")
    wide = read_fdt(tree(mpidrs=[0, 1 << 32]).pack())
    assert wide.node("/cpus").numbers("#address-cells") == (2,)
    assert wide.node("/cpus/cpu@100000000").numbers("reg", 8) == (1 << 32,)


def test_the_interrupt_controller():
    v3 = read_fdt(TREES["v3"].pack())
    node = v3.node("/intc@8000000")
    assert node.texts("compatible") == ("arm,gic-v3",)
    assert node.numbers("reg", 8) == (0x8000000, 0x10000, 0x80A0000, 0x40000)
    assert v3.root.numbers("interrupt-parent") == node.numbers("phandle")
    its = v3.node("/intc@8000000/msi-controller@8080000")
    assert its.numbers("reg", 8) == (0x8080000, 0x20000)
    many = read_fdt(TREES["v3-many"].pack()).node("/intc@8000000")
    assert many.numbers("#redistributor-regions") == (2,) and len(many.numbers("reg", 8)) == 6
    v2 = read_fdt(TREES["v2"].pack())
    assert v2.node("/intc@8000000").numbers("reg", 8) == (0x8000000, 0x1000, 0x8010000, 0x2000)
    assert v2.node("/timer").numbers("interrupts")[2] == 0xFF04
    assert v3.node("/timer").numbers("interrupts") == (1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4)


def test_devices_with_their_interrupts_and_clocks():
    read = read_fdt(TREES["v3"].pack())
    assert "dma-coherent" in read.node("/").properties  # of every device below
    assert read.node("/pl011@9000000").numbers("interrupts") == (0, 1, 4)
    assert read.node("/pl031@9010000").numbers("interrupts") == (0, 2, 4)
    assert read.node("/virtio_mmio@a000200").numbers("interrupts") == (0, 17, 4)
    assert read.node("/virtio_mmio@a000200").numbers("reg", 8) == (0xA000200, 0x200)
    clock = read.node("/apb-pclk").numbers("phandle")
    assert read.node("/pl011@9000000").numbers("clocks") == clock * 2


def test_chosen_says_what_a_boot_loader_says():
    chosen = read_fdt(TREES["v3"].pack()).node("/chosen")
    assert chosen.texts("bootargs") == ("quiet",) and chosen.texts("stdout-path") == ("/pl011@9000000",)
    assert chosen.numbers("linux,initrd-start", 8) == (1 << 31,)
    assert chosen.numbers("linux,initrd-end", 8) == ((1 << 31) + 12345,)
    assert chosen.properties["kaslr-seed"] == b"12345678" and len(chosen.properties["rng-seed"]) == 64
    bare = read_fdt(TREES["v2"].pack()).node("/chosen")
    assert set(bare.properties) == {"stdout-path"}

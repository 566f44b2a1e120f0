"""The virtual interrupt controller: devices, attributes, frames in the address space, and the interrupt line."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kvm2.abi import ioctls as io
from kvm2.abi.caps import KVM_CAP_ARM_VM_IPA_SIZE
from kvm2.abi.vm2 import ARM64_DEFAULT_IPA_BITS
from kvm2.lab.recipes.recipe import FAULT, FAULT_BYTES, PSCI, RESULTS, SECOND_HVA, SECOND_RAM, SLOT, Recipe
from kvm2.names import DEVICES

V2, V3 = DEVICES["vgic-v2"], DEVICES["vgic-v3"]
# Groups and attributes of Documentation/virt/kvm/devices/arm-vgic-v3.rst.
ADDR, NR_IRQS, CTRL = 0, 3, 4
V2_DIST, DIST, REDIST, ITS, REGION = 0, 2, 3, 4, 5
FRAME = 64 << 10
DIST_AT, REDIST_AT = 0x0800_0000, 0x080A_0000
REGIONS = (  # count, base, flags, index
    (1, 1 << 36, 0, 0),
    (1, (1 << 36) - 2 * FRAME, 0, 0),
    (2, (1 << 36) - 2 * FRAME, 0, 0),
    (4, 0x0A00_0000, 0, 1),
    (4, 0x0A00_0000, 0, 2),
    (0, 0x0B00_0000, 0, 1),
    (1, 0x0B00_0000, 1, 1),
    (1, 0x0A02_0000, 0, 2),
    (1, 0x0C00_0000, 0, 2),
)
LINES = (0x0, 0x1, 0x2, 0x1000028, 0x200001B, 0x3000000)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def frames(size: int) -> Recipe:
    """ipa/SIZE/vgic: the distributor and the redistributors around the limit."""
    limit = 1 << (size or ARM64_DEFAULT_IPA_BITS)
    recipe = Recipe(f"ipa/{size}/vgic").vm(size).device(V3)
    for attr, name in ((DIST, "DIST"), (REDIST, "REDIST")):
        for address, note in (
            (limit, "at limit"),
            (limit - FRAME // 2, "unaligned"),
            (limit - FRAME, "last 64K"),
            (limit - 2 * FRAME, "set again"),
        ):
            shown = address if note != "set again" else limit - 32 * FRAME
            recipe.attribute("set", ADDR, attr, _u64(shown), f"{name} {note}")
    return recipe


def recipes(page: int) -> Iterator[Recipe]:
    """vgic and irq."""
    types = Recipe("vgic/types").vm()
    for type in range(14):
        types.device(type, f"d{type}_1", 1, "test").device(type, f"d{type}_0", 0, "create")
    yield types
    yield _lifecycle()
    yield _run_uninit(page)
    yield Recipe("vgic/after_vcpu").vm().vcpu().device(V3).init(PSCI)
    yield Recipe("vgic/after_run").machine().load("off").run().device(V3, note="after vcpu ran")
    regions = Recipe("vgic/redist_region").vm(36).device(V3)
    for count, base, flags, index in REGIONS:
        note = f"REDIST_REGION count={count} base={base:#x} flags={flags} index={index}"
        regions.attribute("set", ADDR, REGION, _u64(count << 52 | base | flags << 12 | index), note)
    yield regions
    yield Recipe("vgic/irqchip_v2").vm().raw("vm", io.KVM_CREATE_IRQCHIP, "KVM_CREATE_IRQCHIP")
    yield Recipe("vgic/icc_sre").machine().load("icc_sre").run("ICC_SRE read, no vgic").results()
    yield _icc_sre_v3()
    lines = Recipe("irq/line").vm().vcpu().init()
    for line in LINES:
        data = _u32(line) + _u32(1)
        lines.add("raw_buf", fd="vm", nr=io.KVM_IRQ_LINE, n=0, data=data.hex(), note=f"IRQ_LINE {line:#x}")
    yield lines


def _lifecycle() -> Recipe:
    recipe = Recipe("vgic/v3_lifecycle").vm().ram().device(V3).device(V3, "gic2", note="second")
    recipe.device(V2, "gic3", note="v2 after v3").vcpu().init(PSCI).load("off")
    for group, attr, note in (
        (ADDR, DIST, "DIST"),
        (ADDR, REDIST, "REDIST"),
        (ADDR, REGION, "REDIST_REGION"),
        (ADDR, ITS, "ITS addr"),
        (ADDR, V2_DIST, "V2 DIST"),
        (99, 0, "group 99"),
        (CTRL, 0, "CTRL_INIT"),
    ):
        recipe.attribute("has", group, attr, note=f"has {note}")
    recipe.attribute("set", CTRL, 0, note="CTRL_INIT before NR_IRQS")
    recipe.attribute("get", ADDR, DIST, _u64(0), "get DIST unset")
    for number, note in ((31, "NR_IRQS 31"), (64, "NR_IRQS 64"), (96, "NR_IRQS again")):
        recipe.attribute("set", NR_IRQS, 0, _u32(number), note)
    recipe.attribute("set", ADDR, DIST, _u64(DIST_AT), "DIST").attribute("set", ADDR, DIST, _u64(DIST_AT), "DIST again")
    recipe.attribute("set", ADDR, REDIST, _u64(DIST_AT + FRAME // 2), "REDIST unaligned")
    recipe.attribute("set", ADDR, REDIST, _u64(DIST_AT), "REDIST over DIST")
    recipe.attribute("set", ADDR, REDIST, _u64(REDIST_AT), "REDIST").attribute(
        "get", ADDR, REDIST, _u64(0), "get REDIST"
    )
    recipe.attribute("set", CTRL, 0, note="CTRL_INIT").attribute("set", CTRL, 0, note="CTRL_INIT twice")
    recipe.attribute("set", NR_IRQS, 0, _u32(64), "NR_IRQS after init").vcpu(1).run("RUN after init").vcpu(2)
    return recipe.slot(1, DIST_AT, SLOT, "memslot over DIST", hva=SECOND_HVA)


def _run_uninit(page: int) -> Recipe:
    """KVM_RUN with a vGIC that was never configured is the end of the VM."""
    recipe = Recipe("vgic/run_uninit_kills_vm").machine().device(V3).load("off")
    recipe.run("RUN with a vgic that has no addresses").get("pc").state().check(KVM_CAP_ARM_VM_IPA_SIZE)
    recipe.attribute("has", ADDR, DIST, note="device ioctl after")
    recipe.slot(1, SECOND_RAM, page, "memslot after", hva=SECOND_HVA)
    return recipe.run("RUN again").vcpu(1)


def _icc_sre_v3() -> Recipe:
    recipe = Recipe("vgic/icc_sre_v3").vm().ram().device(V3).vcpu().init(PSCI)
    recipe.attribute("set", ADDR, DIST, _u64(DIST_AT)).attribute("set", ADDR, REDIST, _u64(REDIST_AT))
    recipe.attribute("set", CTRL, 0).load("icc_sre").run("ICC_SRE read, vgicv3")
    recipe.peek(RESULTS, 8).peek(FAULT, FAULT_BYTES)
    return recipe.load("mmio_load32").set("x1", DIST_AT + 8).run("read GICD_IIDR").peek(RESULTS, 8)

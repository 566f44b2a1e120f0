"""The sub-tests of KVM's selftest `aarch64/vgic_init.c`: how a vGIC is made and set up, and each refusal on the way."""

from __future__ import annotations

import pytest

import kvm2
from kvm2.abi import vgic_attrs as va

from .gic import (
    ADDR,
    CPU,
    REDIST,
    REGION,
    V2_CPU,
    V2_DIST,
    V3_DIST,
    V3_REDIST,
    Gic,
    machine,
    refused,
    region,
)

CPUS = range(4)
LIMIT = 1 << 40
GICR_TYPER = 8


def dist_rdist(gic: Gic) -> None:
    """subtest_dist_rdist: the two frames end up overlapping."""
    v3 = gic.model == "v3"
    dist, other = (V3_DIST, V3_REDIST) if v3 else (V2_DIST, V2_CPU)
    align, other_size = (0x10000, 4 * 0x20000) if v3 else (0x1000, 0x2000)
    assert gic.has(ADDR, dist) == gic.has(ADDR, other) == ""
    assert gic.has(ADDR, (1 << 64) - 1) == "ENXIO"
    assert gic.set(ADDR, dist, align // 16) == gic.set(ADDR, other, align // 16) == "EINVAL"
    assert gic.set(ADDR, dist, LIMIT) == gic.set(ADDR, other, LIMIT) == "E2BIG"
    assert gic.set(ADDR, other, LIMIT - align) == "E2BIG", "half of the redistributor is beyond the limit"
    assert gic.set(ADDR, other, 0) == ""
    assert gic.set(ADDR, other, 0xE0000) == "EEXIST"
    if v3:
        assert gic.set(ADDR, REGION, region(4, 0x100000, 0, 0)) == "EINVAL", "mixed"
    assert gic.set(ADDR, dist, other_size - align) == "", "overlaps, which only KVM_RUN sees"


@pytest.mark.parametrize("model", ["v2", "v3"])
def test_vcpus_then_vgic(model: str) -> None:
    with machine(model, CPUS) as gic:
        dist_rdist(gic)
        assert gic.run(3) == "EINVAL"
        assert gic.run(3) == "EIO", "the VM is dead"
        assert gic.has(ADDR, V3_DIST) == "EIO"


@pytest.mark.parametrize("model", ["v2", "v3"])
def test_vgic_then_vcpus(model: str) -> None:
    with machine(model) as gic:
        dist_rdist(gic)
        for number in range(1, 4):
            gic.add(number)  # the redistributors reach the distributor only with the last one
        assert gic.run(3) == "EINVAL"


def test_v2_uaccess_cpuif_no_vcpus() -> None:
    with machine("v2", ()) as gic:
        dist_rdist(gic)
        assert gic.has(CPU, 0) == gic.get(CPU, 0) == gic.set(CPU, 0) == "EINVAL"


def redist_regions(gic: Gic) -> None:
    """subtest_v3_redist_regions."""
    assert gic.has(ADDR, V3_REDIST) == ""
    for value, why in (
        (region(4, 0x100000, 2, 0), "flags"),
        (region(0, 0x100000, 0, 0), "count 0"),
        (region(2, 0x200000, 0, 1), "the first has index 0"),
        (region(2, 0x201000, 0, 1), "alignment"),
    ):
        assert gic.set(ADDR, REGION, value) == "EINVAL", why
    assert gic.set(ADDR, REGION, region(2, 0x200000, 0, 0)) == ""
    for value, why in (
        (region(2, 0x200000, 0, 1), "same place"),
        (region(1, 0x210000, 0, 2), "overlap"),
        (region(1, 0x240000, 0, 2), "index not the next one"),
    ):
        assert gic.set(ADDR, REGION, value) == "EINVAL", why
    assert gic.set(ADDR, REGION, region(1, 0x240000, 0, 1)) == ""
    assert gic.set(ADDR, REGION, region(1, LIMIT, 0, 2)) == "E2BIG"
    assert gic.set(ADDR, REGION, region(2, LIMIT - 0x30000, 0, 2)) == "E2BIG"
    assert gic.set(ADDR, V3_REDIST, 0x260000) == "EINVAL", "mixed"
    assert gic.get(ADDR, REGION, region(0, 0, 0, 0)) == region(2, 0x200000, 0, 0)
    assert gic.get(ADDR, REGION, region(0, 0, 0, 1)) == region(1, 0x240000, 0, 1)
    assert gic.get(ADDR, REGION, region(0, 0, 0, 2)) == "ENOENT"
    assert gic.set(ADDR, V3_DIST, 0x260000) == ""
    assert gic.set(ADDR, REGION, region(1, 0x260000, 0, 2)) == "EINVAL", "collides with the distributor"


def test_v3_new_redist_regions() -> None:
    with machine("v3", CPUS) as gic:
        redist_regions(gic)
        assert gic.init() == ""
        assert gic.run(3) == "ENXIO", "not enough redistributors"
    with machine("v3", CPUS) as gic:
        redist_regions(gic)
        assert gic.set(ADDR, REGION, region(1, 0x280000, 0, 2)) == ""
        assert gic.run(3) == "EBUSY", "not initialised"
    with machine("v3", CPUS) as gic:
        redist_regions(gic)
        assert refused(gic.device.set_device_attr, ADDR, REGION) == "EFAULT"
        assert gic.set(ADDR, REGION, region(1, 0x280000, 0, 2)) == ""
        assert gic.init() == ""
        assert gic.run(3) == ""


def typers(gic: Gic) -> dict[int, int | str]:
    return {number: gic.redist(number, GICR_TYPER) for number in sorted(gic.vcpus)}


def test_v3_typer_accesses() -> None:
    with machine("v3") as gic:
        gic.add(3)
        assert gic.redist(1, GICR_TYPER) == "EINVAL", "no such vCPU"
        gic.add(1)
        assert gic.redist(1, GICR_TYPER) == "EBUSY", "not initialised"
        gic.add(2)
        assert gic.init() == ""
        assert typers(gic) == {number: number * 0x100 for number in CPUS}
        assert gic.set(ADDR, REGION, region(2, 0x200000, 0, 0)) == ""
        assert typers(gic) == {0: 0, 1: 0x100, 2: 0x200, 3: 0x310}
        assert gic.set(ADDR, REGION, region(10, 0x100000, 0, 1)) == "EINVAL", "collision"
        assert gic.set(ADDR, REGION, region(10, 0x20000, 0, 1)) == ""
        assert typers(gic) == {0: 0, 1: 0x100, 2: 0x210, 3: 0x310}
        assert gic.redist(3, GICR_TYPER + 4) == 3, "the affinity is in the upper word"


def test_v3_last_bit_redist_regions() -> None:
    with machine("v3", (0, 3, 5, 4, 1, 2)) as gic:
        assert gic.init() == ""
        for index, base in enumerate((0x100000, 0x240000, 0x200000)):
            assert gic.set(ADDR, REGION, region(2, base, 0, index)) == ""
        assert typers(gic) == {0: 0, 1: 0x100, 2: 0x200, 3: 0x310, 4: 0x410, 5: 0x500}


def test_v3_last_bit_single_rdist() -> None:
    with machine("v3", (0, 3, 5, 4, 1, 2)) as gic:
        assert gic.init() == ""
        assert gic.set(ADDR, V3_REDIST, 0x10000) == ""
        assert typers(gic) == {0: 0, 1: 0x100, 2: 0x210, 3: 0x300, 4: 0x400, 5: 0x500}


def test_v3_redist_ipa_range_check_at_vcpu_run() -> None:
    with machine("v3") as gic:
        assert gic.set(ADDR, V3_REDIST, LIMIT - 3 * 0x20000) == "", "room for three, and there is one vCPU"
        assert gic.set(ADDR, V3_DIST, 0) == ""
        for number in range(1, 4):
            gic.add(number)
        assert refused(gic.add, 4) == "EINVAL", "with four there the region leaves the IPA space"
        assert gic.init() == ""
        assert gic.run(2) == "EINVAL"


def test_v3_its_region() -> None:
    with machine("v3", CPUS) as gic:
        its = gic.vm.create_device("vgic-its")
        for address, expected in (
            (0x401000, "EINVAL"),
            (LIMIT, "E2BIG"),
            (LIMIT - 0x10000, "E2BIG"),
            (0x400000, ""),
            (0x300000, "EEXIST"),
        ):
            value = address.to_bytes(8, "little")
            assert refused(its.set_device_attr, ADDR, va.KVM_VGIC_ITS_ADDR_TYPE, value) == expected


@pytest.mark.parametrize(("model", "host"), [("v3", "ls2088"), ("v2", "ls2088"), ("v3", ""), ("v2", "")])
def test_kvm_device(model: str, host: str) -> None:
    with machine(model, CPUS, host, 40) as gic:
        other = "vgic-v2" if model == "v3" else "vgic-v3"
        assert refused(gic.vm.create_device, 0) == "ENODEV"
        assert refused(gic.vm.create_device, f"vgic-{model}") == "EEXIST"
        assert refused(gic.vm.create_device, other) == ("EEXIST" if host else "ENODEV")
        assert refused(lambda: gic.vm.create_device(f"vgic-{model}", test=True)) == ""


def test_no_vcpu_after_initialisation_and_none_beyond_a_gicv2s_eight() -> None:
    for model in ("v2", "v3"):
        with machine(model) as gic:
            assert gic.init() == ""
            assert refused(gic.vm.create_vcpu, 1) == "EBUSY"
    with machine("v2", range(8)) as gic:
        assert refused(gic.vm.create_vcpu, 8) == "EINVAL"
        assert gic.vm.check_extension("MAX_VCPUS") == 8
    with kvm2.open("ls2088") as kvm, kvm.create_vm2() as vm:
        vcpus = [vm.create_vcpu(number) for number in range(9)]
        assert refused(vm.create_device, "vgic-v2") == "E2BIG" and len(vcpus) == 9
        assert refused(vm.create_device, "vgic-v3") == ""
    with machine("v3") as gic:
        assert gic.vm.check_extension("MAX_VCPUS") == 512
    with machine("v3", ()) as gic:
        assert gic.has(REDIST, 0) == gic.has(va.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0) == "EINVAL", "no vCPU"

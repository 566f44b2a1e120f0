"""The largest common VM: every host takes it, and nothing larger is taken by all."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kvm2.abi.vm2 import Vm2AttrInfo
from kvm2.errors import KvmError
from kvm2.kvm import Kvm
from kvm2.lab.common_spec import common_spec
from kvm2.softkvm import profile
from kvm2.softkvm.door import SoftKvm
from kvm2.spec import VmSpec

ARM64 = [host for host in map(profile.load, profile.names()) if host.arch == "arm64"]
WITH_LIST = [host for host in ARM64 if host.create_vm2 & 1]
PAIRS = list(itertools.combinations(WITH_LIST, 2))


def takes(host: profile.Profile, spec: VmSpec) -> bool:
    with Kvm(SoftKvm(host), host.name) as kvm:
        try:
            lengths = {7: Vm2AttrInfo(type=7, mask=sum(1 << vq - 1 for vq in host.sve_vqs))}
            kvm.create_vm2(spec.attributes(lengths)).close()
        except KvmError:
            return False
    return True


@pytest.mark.parametrize("part", range(4))
def test_nothing_larger_is_valid_on_both(part: int) -> None:
    """Every pair of described hosts: the VM works on both, and one bit, one length, one vCPU more does not."""
    for one, other in PAIRS[part::16]:
        common = common_spec([one, other])
        if common.conflicts:
            assert "protected" in common.conflicts[0] or "granule" in common.conflicts[0]
            continue
        assert common.ok and set(common.checked.values()) == {"yes"}, (one.name, other.name, common)
        spec = common.spec
        assert spec is not None and isinstance(spec.physaddr_bits, int) and spec.max_vcpus is not None
        for larger in (
            replace(spec, physaddr_bits=spec.physaddr_bits + 1),
            replace(spec, max_vcpus=spec.max_vcpus + 1),
            *(replace(spec, sve=bits) for bits in range(128 + (spec.sve or 0), 2049, 128)),
        ):
            both = takes(one, larger) and takes(other, larger)
            assert not both or _other_sets(one, other, larger), (one.name, other.name, larger)


def _other_sets(one: profile.Profile, other: profile.Profile, spec: VmSpec) -> bool:
    """A larger SVE maximum may work on both, but with other lengths below it."""
    top = (spec.sve or 0) // 128 if isinstance(spec.sve, int) else 0
    return [vq for vq in one.sve_vqs if vq <= top] != [vq for vq in other.sve_vqs if vq <= top]


def load(*names: str) -> list[profile.Profile]:
    return [profile.load(name) for name in names]


def test_each_limit_names_the_host_that_sets_it() -> None:
    common = common_spec(load("graviton3", "a64fx-4k", "max-4k-gicv2"))
    assert common.values == {
        "page_shift": 12,
        "physaddr_bits": 40,
        "sve": 256,
        "gic": [],
        "features": ["power_off", "psci_0_2", "pmu_v3", "sve"],
        "max_vcpus": 8,
        "machine_types": 1,
    }
    assert common.reasons["physaddr_bits"] == "a64fx-4k has 40 (PARange 0b0010)"
    assert common.reasons["sve"] == "384 bits: on max-4k-gicv2, not on graviton3, a64fx-4k"
    assert common.reasons["max_vcpus"] == "max-4k-gicv2 has 8"
    assert common.reasons["gic"].endswith("max-4k-gicv2: v2")
    assert "a64fx-4k has no ptrauth_address" in common.reasons["features"]


def test_page_sizes_that_differ() -> None:
    common = common_spec(load("apple-m1", "neoverse-n1-4k"))
    assert common.ok and common.values["page_shift"] in (12, 14) and common.spec is not None
    assert common.spec.page_shift == common.values["page_shift"]


def test_a_real_host_is_really_asked_and_has_its_page_size_alone() -> None:
    m1, n1 = load("apple-m1", "neoverse-n1-4k")
    opened: list[Kvm] = []

    def open_n1() -> Kvm:
        opened.append(Kvm(SoftKvm(n1), "n1"))
        return opened[-1]

    common = common_spec([m1, n1], {"neoverse-n1-4k": open_n1})
    assert common.ok and common.values["page_shift"] == 12 and [kvm.closed for kvm in opened] == [True]
    both = common_spec([m1, n1], {"neoverse-n1-4k": open_n1, "apple-m1": open_n1})
    assert both.conflicts == ["granule: none is common (apple-m1: 16K, neoverse-n1-4k: 4K)"]


def test_conflicts_are_said() -> None:
    protected = common_spec(load("max-4k-protected", "graviton2"))
    assert not protected.ok and protected.spec is None
    assert protected.conflicts[0].startswith("IPA size: max-4k-protected gives 52 bits and more (protected host")
    arches = common_spec(load("apple-m1", "x86-64"))
    assert arches.conflicts == ["architectures: apple-m1 is arm64, x86-64 is x86_64"]


def test_protected_hosts_among_themselves() -> None:
    assert common_spec(load("max-4k-protected", "max-4k-6.12")).values["physaddr_bits"] == 52


def test_hosts_without_the_call_are_asked_by_their_type_word() -> None:
    common = common_spec(load("mainline-6.1", "type-enum", "graviton3"))
    assert common.ok and common.values["physaddr_bits"] == 48
    refused = common_spec(load("mainline-m1", "graviton3"))
    if refused.spec is not None and refused.spec.page_shift == 12:
        assert refused.checked["mainline-m1"].startswith("no KVM_CREATE_VM2")

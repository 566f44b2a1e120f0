"""Described hosts: each loads and is consistent, and those that were recorded answer as recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvm2.abi import caps as cap
from kvm2.abi import sysregs
from kvm2.errors import HostError
from kvm2.softkvm import profile, profile_rules

DATA = Path(__file__).parent.parent / "data" / "hosts" / "recorded.json"
RECORDED = json.loads(DATA.read_text())
ARM64 = [name for name in profile.names() if profile.load(name).arch == "arm64"]
OTHERS = [name for name in profile.names() if name not in ARM64]


def numbered(table: dict[str, int]) -> dict[int, int]:
    return {int(key): value for key, value in table.items()}


# Read by a guest, or of a feature that no recorded vCPU had enabled: not in the register dumps.
NOT_DUMPED = {
    "max-4k-mte": {sysregs.ID_AA64PFR1_EL1},
    "a64fx-4k": {sysregs.DCZID_EL0, sysregs.CNTFRQ_EL0},
    "a64fx-4k-6.1": {sysregs.DCZID_EL0, sysregs.CNTFRQ_EL0},
}


@pytest.mark.parametrize("name", RECORDED)
class TestRecorded:
    def test_capabilities(self, name: str) -> None:
        host, seen = profile.load(name), RECORDED[name]
        answers = {number: value for number, value in host.caps.items() if number != cap.KVM_CAP_CREATE_VM2}
        assert answers == numbered(seen["caps"])
        on_vm = {number: value for number, value in {**answers, **host.vm_caps}.items() if value}
        assert on_vm == numbered(seen["vm_caps"])
        assert host.enable_caps == frozenset(seen["enable_caps"])

    def test_registers(self, name: str) -> None:
        host, seen = profile.load(name), numbered(RECORDED[name]["registers"])
        if not seen:  # its recorded vCPUs were refused: those of the same core on 6.12, but for the kernel's own
            sibling = profile.load("cortex-a57-4k")
            different = {enc for enc, value in host.registers.items() if sibling.registers.get(enc) != value}
            assert name == "a57-4k-6.1" and different == {sysregs.CLIDR_EL1, sysregs.PMCR_EL0}
            return
        # KVM lists no PMCEID registers: only a guest reads them, and the live kernels' guests did (kvm2 probe).
        apart = NOT_DUMPED.get(name, set()) | {sysregs.PMCEID0_EL0, sysregs.PMCEID1_EL0}
        assert host.registers[sysregs.PMCEID0_EL0] == 0x20001
        assert {enc: value for enc, value in host.registers.items() if value and enc not in apart} == {
            enc: value for enc, value in seen.items() if enc not in apart
        }
        assert host.firmware == numbered(RECORDED[name]["firmware"])

    def test_targets_and_masks(self, name: str) -> None:
        host, seen = profile.load(name), RECORDED[name]
        assert host.targets == tuple(seen["targets"])
        assert host.preferred_target == seen["preferred_target"]
        assert host.writable_masks == numbered(seen["writable_masks"])

    def test_sizes(self, name: str) -> None:
        host, accepted = profile.load(name), [size for size in RECORDED[name]["ipa_sizes"] if size < 256]
        if host.mode == "protected":
            assert 1 in accepted  # whatever it is: the size is not looked at
        else:
            assert max(accepted) == host.ipa_limit
            assert min(size for size in accepted if size) == 32


# PARange, LPA2 at both stages, page shift -> limit: worked out by hand from kvm_set_ipa_limit.
GOLDEN = {
    "apple-m1": 36,
    "apple-m2": 36,
    "nested-36": 36,
    "raspberry-pi-4": 44,
    "raspberry-pi-5": 40,
    "graviton2": 48,
    "graviton3": 48,
    "rk3588": 40,
    "rk3399": 40,
    "a64fx": 40,
    "kunpeng-920": 48,
    "jetson-orin": 48,
    "jetson-xavier": 40,
    "armada-8040": 44,
    "ls2088": 44,
    "snapdragon-x": 44,
    "ampere-altra": 48,
    "cortex-a76-4k": 40,
    "neoverse-n1-16k": 48,
    "max-16k-nolpa2": 48,
    "max-4k-nopauth": 52,
    "max-4k-vq2": 52,
    "armv9-64k-52": 52,
    "armv9-4k-52cap": 48,
    "lpa2-4k-52": 52,
    "lpa2-16k-52": 52,
    "neoverse-n1-64k": 48,
    "armv8-32": 32,
    "armv8-42-64k": 42,
    "armv9-56": 52,
    "mainline-6.1": 48,
    "mainline-m1": 36,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_limits(name: str) -> None:
    assert profile.load(name).ipa_limit == GOLDEN[name]


def independent_limit(mmfr0: int, page_shift: int, kernel: str) -> int:
    """kvm_set_ipa_limit, written apart from the product."""
    bits = [32, 36, 40, 42, 44, 48, 52][min(mmfr0 & 0xF, 6)]
    tgran4, tgran16, tgran4_2, tgran16_2 = (mmfr0 >> lsb & 0xF for lsb in (28, 20, 40, 32))
    lpa2 = {12: (tgran4, tgran4_2) == (1, 3), 14: (tgran16, tgran16_2) == (2, 3), 16: False}[page_shift]
    large = page_shift == 16 or (lpa2 and kernel != "6.1")
    return bits if large else min(bits, 48)


@pytest.mark.parametrize("name", ARM64)
def test_consistent(name: str) -> None:
    host = profile.load(name)
    mmfr0 = host.registers[sysregs.ID_AA64MMFR0_EL1]
    assert host.ipa_limit == independent_limit(mmfr0, host.page_shift, host.kernel)
    assert host.ipa_limit == host.caps[cap.KVM_CAP_ARM_VM_IPA_SIZE] == host.ipa_limit_for(host.page_shift)
    assert host.page_shift in host.granules
    assert all(32 <= host.ipa_limit_for(granule) <= host.pa_bits for granule in host.granules)
    assert host.ipa_limit_for(13) == 0
    pfr0 = host.registers[sysregs.ID_AA64PFR0_EL1]
    assert bool(pfr0 >> 32 & 0xF) == bool(host.sve_vqs) == (profile_rules.SVE in host.features)
    assert host.caps.get(cap.KVM_CAP_ARM_SVE, 0) == bool(host.sve_vqs)
    assert ("v3" in host.gic) == bool(pfr0 >> 24 & 0xF)
    assert host.max_vcpus == host.caps[cap.KVM_CAP_MAX_VCPUS] <= host.max_vcpu_id
    assert (profile_rules.EL1_32BIT in host.features) == (pfr0 >> 4 & 0xF == 2)
    vhe = host.registers.get(sysregs.ID_AA64MMFR1_EL1, 0) >> 8 & 0xF
    assert vhe or host.mode in ("nvhe", "protected")
    assert host.not_executed() == list(dict.fromkeys(host.not_executed()))
    assert host.title and host.type_word


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str) -> None:
    host = profile.load(name)
    assert host.ipa_limit == 0 and not host.registers and not host.features and not host.granules
    assert host.caps[cap.KVM_CAP_MAX_VCPUS] == host.max_vcpus
    assert "creation only" in host.not_executed()[0]
    assert host.type_word == {"x86_64": "x86-64"}.get(host.arch, host.arch)


def test_the_recorded_and_the_unpublished_shapes_are_there() -> None:
    lab = {*RECORDED, "cortex-a76-4k", "neoverse-n1-16k", "max-16k-nolpa2", "max-4k-nopauth", "max-4k-vq2"}
    assert len(lab) == 24 and lab <= set(profile.names())


def test_unpublished_shapes() -> None:
    a76, n1 = profile.load("cortex-a76-4k"), profile.load("neoverse-n1-4k")
    different = {enc for enc in {*a76.registers, *n1.registers} if a76.registers.get(enc) != n1.registers.get(enc)}
    assert {sysregs.name_of(enc): a76.registers[enc] for enc in different} == {
        "MIDR_EL1": 0x414FD0B1,
        "ID_AA64PFR1_EL1": 0x10,
        "ID_AA64MMFR0_EL1": 0x101122,
    }
    nopauth = profile.load("max-4k-nopauth")
    assert nopauth.registers[sysregs.ID_AA64ISAR1_EL1] == 0x11111100211002
    assert not {5, 6} & nopauth.features and cap.KVM_CAP_ARM_PTRAUTH_ADDRESS not in nopauth.caps
    assert profile.load("max-4k-vq2").sve_vqs == (1, 2)
    nolpa2 = profile.load("max-16k-nolpa2")
    assert nolpa2.registers[sysregs.ID_AA64MMFR0_EL1] == 0x22200101126 and nolpa2.page_shift == 14
    assert profile.load("neoverse-n1-16k").caps[cap.KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES] == (32 << 20) | (16 << 10)


def test_64k_pages() -> None:
    host = profile.load("armv9-64k-52")
    assert host.caps[cap.KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES] == (512 << 20) | (64 << 10)
    assert host.ipa_limit_for(12) == 48 and not host.lpa2
    assert host.vcpu_mmap_size == 128 << 10


def test_mmap_size() -> None:
    sizes = {name: profile.load(name).vcpu_mmap_size for name in ("max-4k-6.12", "max-16k-6.12", "x86-64", "s390x")}
    assert sizes == {"max-4k-6.12": 8192, "max-16k-6.12": 32768, "x86-64": 12288, "s390x": 4096}


def test_type_words_and_answers_of_create_vm2() -> None:
    for word in ("none", "log2-v3", "log2", "ps", "enum", "delta5", "delta", "pointer"):
        assert profile.load(f"type-{word}").type_word == word
    assert cap.KVM_CAP_CREATE_VM2 not in profile.load("mainline-6.12").caps
    assert profile.load("max-4k-6.12").caps[cap.KVM_CAP_CREATE_VM2] == 15
    assert profile.load("x86-64-snp").caps[cap.KVM_CAP_VM_TYPES] == 0b11101


def test_gicv2_alone_has_eight_vcpus() -> None:
    for name in ("max-4k-gicv2", "raspberry-pi-4", "raspberry-pi-5"):
        assert profile.load(name).max_vcpus == 8
    assert profile.load("rk3399").max_vcpus == 512


def test_machines_say_what_is_assumed() -> None:
    grace, pi = profile.load("nvidia-grace"), profile.load("raspberry-pi-4")
    assert "pa_bits" in grace.assumed and "sve_vqs" not in grace.assumed
    assert grace.sources["pa_bits"] == "assumed: as neoverse-n2"
    assert "pa_bits" not in pi.assumed and "44 bits" in pi.sources["pa_bits"] and "kernel" in pi.assumed
    assert profile.load("max-4k-6.12").assumed == ()


def test_what_is_not_executed_follows_the_registers() -> None:
    joined = "\n".join(profile.load("max-4k-mte").not_executed())
    assert all(word in joined for word in ("FEAT_MTE", "FEAT_SVE2", "FEAT_I8MM", "FEAT_LPA2", "EL1_32BIT", "PMU"))
    assert profile.load("cortex-a72").not_executed() == [
        "KVM_ARM_VCPU_EL1_32BIT: a vCPU in AArch32 at EL1 is refused at KVM_RUN",
        "PMU counting: counters read as they were set",
    ]
    assert not any("EL1_32BIT" in line for line in profile.load("neoverse-n1").not_executed())


def test_unknown_name() -> None:
    with pytest.raises(HostError, match=r"no described host 'aple-m1': did you mean apple-m1"):
        profile.load("aple-m1")
    with pytest.raises(HostError, match="no described host ''"):
        profile.load("")

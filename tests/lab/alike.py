"""What of a described host its answers depend on: two hosts with the same of this answer alike."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

from kvm2.abi import caps as cap
from kvm2.abi import onereg
from kvm2.abi import sysregs as sr
from kvm2.errors import KvmError
from kvm2.softkvm import profile_rules as rules
from kvm2.softkvm.limits import limits_of
from kvm2.softkvm.profile import Profile
from kvm2.softkvm.typeword import word_of
from kvm2.softkvm.vm import Vm
from kvm2.softkvm.vmconfig import VmConfig

from ..softkvm.vcpus import PMU, PSCI, PTRAUTH, SVE, Client, Page

ABOUT_THE_FILE = {"name", "title", "basis", "sources", "assumed", "bases"}
# A guest reads the emulated core's own of these, so the software KVM cannot show what a file states.
OF_THE_CORE = {sr.DCZID_EL0, sr.CNTFRQ_EL0}
CHAIN = 1 << 0x1E  # of PMCEID0_EL0: the event that KVM adds itself
PMU_REGISTERS = {sr.PMCR_EL0, sr.PMCEID0_EL0, sr.PMCEID1_EL0}


def facts(host: Profile) -> dict[str, Any]:
    """Every field that an answer depends on, by name."""
    found = {field.name: getattr(host, field.name) for field in fields(host) if field.name not in ABOUT_THE_FILE}
    found["registers"] = _registers(host)
    found["cpus"] = min(host.cpus, host.max_vcpus)  # KVM_CAP_NR_VCPUS
    found["caps"] = {number: answer for number, answer in host.caps.items() if answer}
    found["vm_caps"] = {number: answer for number, answer in {**host.caps, **host.vm_caps}.items() if answer}
    if host.caps.get(cap.KVM_CAP_ARM_MTE, 0) > 0:
        found["enable_caps"] |= {cap.KVM_CAP_ARM_MTE}  # what is announced can be enabled
    found["gic"] = frozenset(host.gic)
    found["mode"] = "vhe" if host.mode == "hvhe" else host.mode
    if host.arch != "arm64":
        return found
    found["type_word"] = _type_words(host)
    found["quirks"] = host.quirks - _untold(host)
    if "own-target-only" in _untold(host):
        found |= {"targets": (), "preferred_target": 0}
    return found


def _registers(host: Profile) -> dict[int, int]:
    """As a vCPU with every feature sees them; those that it does not list as the host is described."""
    found = {enc: value for enc, value in host.registers.items() if enc not in OF_THE_CORE}
    if host.arch != "arm64":
        return found
    if rules.PMU_V3 not in host.features:
        found = {enc: value for enc, value in found.items() if enc not in PMU_REGISTERS}
    config = VmConfig(
        host.ipa_limit, host.page_shift, max_vcpus=host.max_vcpus, max_vcpu_id=host.max_vcpu_id, sve_allowed=True
    )
    vm = Vm(host, Page(), config)
    vm.arm.mte = host.caps.get(cap.KVM_CAP_ARM_MTE, 0) > 0
    vcpu = Client(vm)
    bits = {rules.PMU_V3: PMU, rules.SVE: SVE, rules.PTRAUTH_ADDRESS: PTRAUTH}
    vcpu.init(PSCI | sum(mask for feature, mask in bits.items() if feature in host.features))
    if rules.SVE in host.features:
        vcpu.finalize()
    listed = {onereg.parse(one).index for one in vcpu.reg_list() if onereg.parse(one).kind == "sysreg"}
    found |= {enc: vcpu.sys(enc) for enc in listed if enc in found or enc in sr.ID_SPACE}
    if sr.PMCEID0_EL0 in found:
        found[sr.PMCEID0_EL0] |= CHAIN
    return {enc: value for enc, value in found.items() if value}


def _type_words(host: Profile) -> dict[int, int]:
    """Which words KVM_CREATE_VM takes, and the IPA size that each gives; a list's address counts as size 0."""
    word, limits, found = word_of(host.type_word), limits_of(host), {}
    for value in (*range(0x120), 4096, 1 << 31, 1 << 31 | 40):
        with suppress(KvmError):
            found[value] = 0 if word.is_pointer(value) else word.decode(value, limits)[0]
    return found


def _untold(host: Profile) -> set[str]:
    """Quirks that this host has no occasion to show."""
    both, _ = rules.targets(host.registers.get(sr.MIDR_EL1, 0), own_only=False)
    untold = {"own-target-only"} if len(both) == 1 else set()
    if host.page_shift == 16:
        untold.add("no-lpa2")
    if host.caps[cap.KVM_CAP_MAX_VCPUS] == 1:
        untold.add("per-vcpu-features")
    return untold

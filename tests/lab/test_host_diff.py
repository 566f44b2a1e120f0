"""What differs between hosts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kvm2.lab.host_diff import compare, differences
from kvm2.softkvm import profile

from .alike import facts


def rows(*names: str) -> dict[tuple[str, str], tuple[str, ...]]:
    return {(row.subject, row.name): row.values for row in differences([profile.load(name) for name in names])}


def test_a_host_does_not_differ_from_itself() -> None:
    host = profile.load("max-4k-6.1")
    assert differences([host, host]) == []
    assert len(compare([host, host])) > 200


@pytest.mark.parametrize(
    ("line", "key", "values"),
    [
        ("pa_bits = 44", ("limits", "IPA limit"), ("48 bits", "44 bits")),
        ("pa_bits = 44", ("ID registers", "ID_AA64MMFR0_EL1.PARange"), ("5", "4")),
        ("pa_bits = 44", ("capabilities", "KVM_CAP_ARM_VM_IPA_SIZE"), ("48", "44")),
        ("sve_vqs = [1, 2]", ("SVE", "lengths in bits"), ("none", "128, 256")),
        ("sve_vqs = [1, 2]", ("vCPU features", "sve"), ("no", "yes")),
        ('gic = ["v2"]', ("GIC", "for guests"), ("its, v3", "v2")),
        ('gic = ["v2"]', ("limits", "vCPUs"), ("512", "8")),
        ('quirks = ["smc-not-handled"]', ("habits", "smc-not-handled"), ("no", "yes")),
        ("cnp = false", ("ID registers", "ID_AA64MMFR2_EL1.CnP"), ("1", "0")),
        ("create_vm2 = 0", ("attributes", "MAX_VCPUS"), ("1-512, default 512", "-")),
        ("ipa_limit = 40", ("limits", "IPA limit"), ("48 bits", "40 bits")),
        ('enable_caps = ["KVM_CAP_HALT_POLL"]', ("KVM_ENABLE_CAP", "KVM_CAP_ARM_NISV_TO_USER"), ("yes", "no")),
        ("[writable_masks]\nCTR_EL0 = 0", ("writable masks", "CTR_EL0"), ("0x300f000f", "0x0")),
        ("[registers]\nREVIDR_EL1 = 7", ("ID registers", "REVIDR_EL1"), ("0x0", "0x7")),
        ("[firmware]\nWORKAROUND_1 = 1", ("firmware", "WORKAROUND_1"), ("2", "1")),
        ("[vm_caps]\nKVM_CAP_STEAL_TIME = 0", ("capabilities of a VM", "KVM_CAP_STEAL_TIME"), ("1", "0")),
    ],
)
def test_each_difference_is_shown(tmp_path: Path, line: str, key: tuple[str, str], values: tuple[str, ...]) -> None:
    path = tmp_path / "other.toml"
    path.write_text(f'base = "neoverse-n1-4k"\n{line}\n')
    found = rows("neoverse-n1-4k", str(path))
    assert found[key] == values


def test_whatever_answers_depend_on_is_compared() -> None:
    """Any two described hosts that do not answer alike have a difference that is shown, and the other way round."""
    hosts = [profile.load(name) for name in profile.names()]
    for one, other in itertools.pairwise(hosts):
        assert bool(differences([one, other])) == (facts(one) != facts(other)), (one.name, other.name)


def test_three_hosts_of_two_architectures() -> None:
    found = rows("x86-64", "apple-m1", "s390x")
    assert found["limits", "architecture"] == ("x86_64", "arm64", "s390x")
    assert found["limits", "VM types"] == ("0x3", "-", "-")

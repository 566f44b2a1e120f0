"""Hosts that nobody wrote: random facts through a host file, a probe, and the file that it writes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from kvm2.abi import sysregs as sr
from kvm2.errors import HostError
from kvm2.lab.probe import probe
from kvm2.lab.probe_toml import _value
from kvm2.softkvm import profile
from kvm2.softkvm.door import SoftKvm
from kvm2.softkvm.profile_keys import GICS, MODES, QUIRKS, TYPE_WORDS, WITHOUT
from kvm2.softkvm.profile_rules import PA_BITS
from kvm2.softkvm.sysregs_fields import fields

from .alike import facts

BASES = ("max-4k-6.12", "max-4k-6.1", "neoverse-n1-4k", "cortex-a57-4k", "cortex-a53-4k", "max-4k-mte", "a64fx-4k-6.1")
# Registers whose fields can be anything: no key of a host file and no check reads them.
FREE = ("ID_AA64ISAR0_EL1", "ID_AA64MMFR3_EL1", "ID_ISAR1_EL1", "MVFR1_EL1", "ID_AA64FPFR0_EL1", "ID_AA64MMFR2_EL1")
CAPS = ("KVM_CAP_PTP_KVM", "KVM_CAP_STEAL_TIME", "KVM_CAP_USER_MEMORY2", "KVM_CAP_IRQ_ROUTING", "KVM_CAP_ARM_USER_IRQ")
ENABLES = ("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "KVM_CAP_ARM_NISV_TO_USER", "KVM_CAP_HALT_POLL",
           "KVM_CAP_ARM_SYSTEM_SUSPEND")  # fmt: skip
MASKED = ("ID_AA64MMFR0_EL1", "ID_AA64ISAR0_EL1", "CTR_EL0", "CLIDR_EL1", "ID_AA64SMFR0_EL1")
PAGES = (12, 14, 16)


def _sve(top: int, more: set[int]) -> list[int]:
    """A set of lengths that a core can have: every power of two below the largest."""
    return sorted({1 << bit for bit in range(5) if 1 << bit < top} | {top} | {vq for vq in more if vq < top})


def subset(choices: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(choices), unique=True)


@st.composite
def registers(draw: st.DrawFn) -> dict[str, int]:
    """Random values of every field that the kernel knows."""
    found = {}
    for name in draw(subset(FREE)):
        value = 0
        for field in fields(sr.SYSREGS[name]) or ():
            value |= draw(st.integers(0, (1 << field.width) - 1)) << field.lsb
        found[name] = value
    if draw(st.booleans()):
        found["MIDR_EL1"] = draw(st.sampled_from((0x411FD070, 0x413FD0C1, 0x500F0000, 0x410FD034, 0x610F0000)))
    if draw(st.booleans()):
        found["ACTLR_EL1"], found["AMAIR_EL1"] = draw(st.integers(0, 1 << 63)), draw(st.integers(0, 1 << 63))
    return found


HOSTS = st.fixed_dictionaries(
    {"base": st.sampled_from(BASES), "page_shift": st.sampled_from(PAGES)},
    optional={
        "pa_bits": st.sampled_from(PA_BITS),
        "granules": st.lists(st.sampled_from(PAGES), unique=True, min_size=1).map(sorted),
        "lpa2": st.booleans(),
        "vmid_bits": st.sampled_from((8, 16)),
        "fwb": st.booleans(),
        "cnp": st.booleans(),
        "sve_vqs": st.one_of(st.just([]), st.builds(_sve, st.integers(1, 16), st.sets(st.integers(1, 16)))),
        "gic": subset(GICS),
        "mode": st.sampled_from(MODES),
        "without": subset(WITHOUT),
        "type_word": st.sampled_from(TYPE_WORDS["arm64"]),
        "create_vm2": st.sampled_from((0, 1, 2, 3, 8, 9, 15)),
        "cpus": st.integers(1, 600),
        "max_vcpus": st.integers(1, 512),
        "max_vcpu_id": st.integers(512, 16384),
        "nr_memslots": st.integers(1, 32767),
        "ipa_limit": st.integers(32, 52),
        "quirks": subset(tuple(QUIRKS)),
        "enable_caps": subset(ENABLES),
        "registers": registers(),
        "firmware": st.fixed_dictionaries({f"WORKAROUND_{number}": st.integers(0, 3) for number in (1, 2, 3)}),
        "caps": st.dictionaries(st.sampled_from(CAPS), st.integers(-100, 1 << 20), max_size=3),
        "vm_caps": st.dictionaries(
            st.sampled_from((*CAPS, "KVM_CAP_MSI_DEVID")), st.integers(-100, 1 << 20), max_size=3
        ),
        "writable_masks": st.dictionaries(st.sampled_from(MASKED), st.integers(0, (1 << 64) - 1), max_size=3),
    },
)


def text_of(wanted: dict[str, object]) -> str:
    plain = [f"{key} = {_value(value)}" for key, value in wanted.items() if not isinstance(value, dict)]
    for name, table in wanted.items():
        if isinstance(table, dict):
            plain += [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(plain) + "\n"


def difference(here: dict[str, object], there: dict[str, object]) -> str:
    """The entries that differ, of tables their own."""
    lines = []
    for key in here:
        one, other = here[key], there[key]
        if isinstance(one, dict) and isinstance(other, dict):
            lines += [f"{key} {k:#x}: {one.get(k)} {other.get(k)}" for k in one | other if one.get(k) != other.get(k)]
        elif one != other:
            lines.append(f"{key}: {one} {other}")
    return "\n".join(lines)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(HOSTS)
@example({"base": "max-4k-6.12", "page_shift": 12, "lpa2": False, "quirks": ["no-lpa2"]})
@example({"base": "max-4k-6.12", "page_shift": 12, "type_word": "delta", "pa_bits": 36})
def test_a_random_host_is_found(wanted: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "random.toml"
        path.write_text(text_of(wanted))
        try:
            host = profile.load(path)
        except HostError:
            assume(False)  # a host on which no kernel could run
        # A kernel before 4.20 on a host below 40 bits has no VM at all to look at, and none of them has pKVM.
        assume(host.type_word != "none" or (host.ipa_limit >= 40 and host.mode != "protected"))
        kvm = SoftKvm(host)
        found = probe(kvm, "random")
        assert kvm.fds() == []
        here, there = facts(found.profile()), facts(host)
        assert difference(here, there) == "", text_of(wanted)

"""`--working-caps`: a described host that announces only what the software KVM executes.

As a rule answers follow the host, because that is what a VMM must be tested against. A VMM that is to run here as it is
wants the opposite: no capability that ends in ENOSYS or in a refused KVM_RUN.

>>> from kvm2.abi.caps import KVM_CAP_ARM_SVE, KVM_CAP_BINARY_STATS_FD
>>> from kvm2.softkvm.profile import load
>>> host = load("max-4k-6.12")
>>> [(p.caps.get(KVM_CAP_BINARY_STATS_FD, 0), p.caps.get(KVM_CAP_ARM_SVE, 0)) for p in (host, working(host))]
[(1, 1), (0, 1)]
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvm2.abi import caps
from kvm2.softkvm.profile_rules import EL1_32BIT, PMU_V3

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvm2.softkvm.profile import Profile

# Statistics, dirty rings; AArch32, the PMU and MTE.
NOT_WORKING = frozenset(
    {
        caps.KVM_CAP_BINARY_STATS_FD,
        caps.KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        caps.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
        caps.KVM_CAP_ARM_EL1_32BIT,
        caps.KVM_CAP_ARM_PMU_V3,
        caps.KVM_CAP_ARM_MTE,
    }
)


def working(profile: Profile) -> Profile:
    """The same host with the capabilities and vCPU features that work here."""

    def kept(answers: Mapping[int, int]) -> dict[int, int]:
        return {cap: value for cap, value in answers.items() if cap not in NOT_WORKING}

    return replace(
        profile,
        caps=kept(profile.caps),
        vm_caps=kept(profile.vm_caps),
        enable_caps=profile.enable_caps - NOT_WORKING,
        features=profile.features - {EL1_32BIT, PMU_V3},
    )
